"""Several sets in one: weights divide an epoch, the same seed gives the same rows, and images stay on one side."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from phi3v.data.columns import RowOptions
from phi3v.data.mixing import SetUse, choose, mix, set_uses, shares
from phi3v.data.sources import load_data
from phi3v.errors import DataError
from phi3v.recipe import Recipe
from phi3v.recipe_data import SetSection

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_an_epoch_is_divided_as_the_weights_say() -> None:
    assert shares([100, 20], [1, 1]) == [60, 60]
    assert shares([5, 5], [2, 1]) == [7, 3]
    assert shares([5, 0, 5], [2, 9, 1]) == [7, 0, 3] and shares([0, 0], [1, 1]) == [0, 0]  # no rows, no share
    assert shares([3, 3, 3], [1, 1, 1]) == [3, 3, 3]
    assert shares([1, 9], [1e-9, 1]) == [0, 10]
    for sizes, weights in (([7, 11, 13], [3, 1, 1.5]), ([1, 1], [1, 2])):
        assert sum(shares(sizes, weights)) == sum(sizes)
    assert shares([60, 40], [3, 1], 10) == [8, 2] and shares([3, 1], [1, 1], 10) == [2, 2]


def test_rows_repeat_equally_often_but_for_a_drawn_rest() -> None:
    drawn = choose(3, 7, 0, "a")
    assert drawn[:6] == [0, 1, 2, 0, 1, 2] and drawn[6] in (0, 1, 2)
    assert choose(5, 0, 0, "a") == [] == choose(0, 0, 0, "a")
    few = [choose(100, 10, seed, "a") for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2] and all(sorted(set(one)) == one and len(one) == 10 for one in few)
    assert mix([0, 0, 0, 1], 2, [1, 1], 0)[2:] == [3, 3]
    assert [position // 60 for position in mix([0] * 60 + [1] * 40, 2, [3, 1], 0, 8)] == [0] * 6 + [1] * 2
    uses = [SetUse("a", rows=3, epoch=2, left_out=1), SetUse("b", rows=1, epoch=2, left_out=0)]
    assert set_uses(["a", "b"], [0, 0, 0, 1], [0, 2, 3, 3]) == uses


def write(folder: Path, name: str, count: int, column: str) -> str:
    (folder / name).mkdir(parents=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (8, 6), (number, len(name), 0)).save(folder / name / f"{number}.png")
        rows.append({column: f"{number}.png", "title": f"{name} {number}"})
    (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name / "rows.jsonl")


def test_sets_have_rows_by_weight_and_keep_source_and_number(tmp_path: Path) -> None:
    large, small = write(tmp_path, "large", 30, "image"), write(tmp_path, "small", 10, "photo")
    options = RowOptions(prompt="What is it?", answer="{title}")
    sets = [
        {"source": large, "weight": 1.0},
        {"source": small, "weight": 1.0, "images": "photo", "answer": "A {title}."},
    ]
    data = load_data(sets, options=options, validation_split=None)
    assert Counter(row.source for row in data.train) == {large: 20, small: 20}
    assert data.sets == [SetUse(large, rows=30, epoch=20, left_out=10), SetUse(small, rows=10, epoch=20, left_out=0)]
    first = load_data(large, options=options, validation_split=None, max_rows=7)
    assert (len(first.train), first.sets) == (7, [SetUse(large, rows=30, epoch=7, left_out=23)])
    assert set(Counter(row.index for row in data.train if row.source == small).values()) == {2}
    assert set(Counter(row.index for row in data.train if row.source == large).values()) == {1}
    assert {row.answer[:2] for row in data.train if row.source == small} == {"A "}
    again = load_data(sets, options=options, validation_split=None)
    other = load_data(sets, options=options, validation_split=None, split_seed=1)
    assert list(data.train) == list(again.train) != list(other.train)
    plain = load_data([{"source": large}, sets[1] | {"weight": None}], options=options, validation_split=None)
    assert Counter(row.source for row in plain.train) == {large: 30, small: 10} and plain.rows_in == 40
    with pytest.raises(DataError, match="small/rows.jsonl has no weight and another set has: give every set a weight"):
        load_data([sets[0], sets[1] | {"weight": None}], options=options)


def test_the_sets_of_the_documents_are_read_and_one_of_conversations_takes_no_templates(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "shop.yaml").write_text(text.split("## Several sets")[1].split("```yaml\n")[1].split("```")[0])
    section = Recipe.load(tmp_path / "shop.yaml").data
    shop, mix = write(tmp_path, "shop", 6, "image"), write(tmp_path, "mix", 2, "image")
    spoken = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "A hat."}]
    lines = [json.dumps({"image": f"{n}.png", "conversations": spoken, "prompt": "p", "answer": "a"}) for n in range(2)]
    Path(mix).write_text("\n".join(lines))
    options, sets = RowOptions(**section.row_options), section.load_options["train"]
    sets = [{**one, "source": source, "revision": None} for one, source in zip(sets, (shop, mix), strict=True)]
    rows = list(load_data(sets, options=options, validation_split=None).train)
    assert Counter((row.source, row.question) for row in rows) == {(shop, WHAT): 6, (mix, "Which?"): 2}
    assert {row.answer for row in rows if row.source == mix} == {"A hat."}
    told = SetSection(source=mix, format="columns", prompt=None).model_dump()  # its own column, not the section's text
    assert load_data([told], options=options, validation_split=None).train[0].question == "p"
    with pytest.raises(
        DataError, match=r"whole conversations: take data.prompt and data.answer out \(.*mix/rows.jsonl"
    ):
        load_data([{**sets[1], "answer": "{answer}!"}], options=options)
    with pytest.raises(
        DataError, match=r"whole conversations: take data.prompt and data.answer out \(.*mix/rows.jsonl"
    ):
        load_data(mix, options=replace(options, format="conversations"))


WHAT = "What is shown in this image?"


def test_validation_rows_of_several_sets(tmp_path: Path) -> None:
    """Rows are held out before weights repeat any: an image of one side is never on the other."""
    one, two = write(tmp_path, "one", 12, "image"), write(tmp_path, "two", 4, "image")
    options = RowOptions(prompt="What is it?", answer="{title}")
    data = load_data(
        [{"source": one, "weight": 1.0}, {"source": two, "weight": 3.0}], options=options, validation_split=4
    )
    assert data.validation is not None and (data.origin, len(data.validation)) == ("split", 4)
    sides = [{(row.source, row.index) for row in side} for side in (data.train, data.validation)]
    assert not sides[0] & sides[1] and len(data.train) == 12
    given = load_data([{"source": one}, {"source": two}], options=options, validation=two)
    assert given.validation is not None and (len(given.train), len(given.validation)) == (16, 4)
