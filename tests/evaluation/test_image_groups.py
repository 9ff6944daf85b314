"""Rows about one photo are found, counted and told, and taken together wherever rows are drawn or flipped."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import phi3v
from phi3v.cli import app
from phi3v.cli_screen import show_evaluation
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.evaluation.answers import Answers
from phi3v.evaluation.figures import rows_about
from phi3v.evaluation.image_groups import count_groups, image_groups
from phi3v.evaluation.prediction_table import prediction_table
from phi3v.evaluation.report import ReportContent, render_report
from phi3v.evaluation.result import Beside, HeldOut, build_evaluation, scoring_of
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder

PHOTOS, QUESTIONS = 12, 5


def make_row(images, index=0, answer="It is red.", question="What?") -> Row:
    parts = (*(ImagePart(place) for place in range(len(images))), TextPart(question))
    turns = (Message("user", parts), Message("assistant", (TextPart(answer),)))
    return Row(turns, tuple(images), {}, "made.csv", index)


def test_images_are_the_same_by_address_content_or_file():
    here, there = ImageRef("a.jpg", root="/data/x"), ImageRef("x/./a.jpg", root="/data")
    other = ImageRef("a.jpg", root="/data/y")
    some, same, unlike = (ImageRef(name, data=data) for name, data in (("a", b"1"), ("b", b"1"), ("a", b"2")))
    web = ImageRef("/cache/1", url="https://a.de/a.jpg"), ImageRef(url="https://a.de/a.jpg")
    sets = [
        [here],
        [there],
        [other],
        [],
        [],
        [some],
        [same],
        [unlike],
        [web[0]],
        [web[1]],
        [here, other],
        [other, here],
    ]
    rows = [make_row(images) for images in sets]
    groups = image_groups(rows)
    assert groups.tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    assert count_groups(rows, groups) == {"rows": 10, "different": 6}
    assert image_groups([]).tolist() == []


@pytest.mark.parametrize(
    ("rows", "images", "text"),
    [
        (200, {"rows": 200, "different": 20}, "200 rows about 20 photos"),
        (200, {"rows": 180, "different": 1}, "200 rows, 180 of them about 1 photo"),
        (200, {"rows": 200, "different": 200}, "200 rows"),
        (200, {"rows": 0, "different": 0}, "200 rows"),
        (1, None, "1 row"),
    ],
)
def test_rows_and_photos_are_told(rows, images, text):
    assert rows_about({"rows": rows, "images": images}, "row") == text


def evaluation_of(own: bool):
    """60 rows about 12 photos, or each about its own; of 4 photos the base has all rows, of 9 the tuned model."""
    rows = []
    for place in range(PHOTOS * QUESTIONS):
        photo, number = divmod(place, QUESTIONS)
        name = f"{place if own else photo}.jpg"
        rows.append(make_row([ImageRef(name, root="/photos")], place, f"It is {photo}, {number}.", f"Which {number}?"))
    recipe = Recipe.from_dict({"model": "tiny", "data": {"train": "made.csv", "answer": "It is {name}, {number}."}})
    held_out = HeldOut(rows, [], "made.csv", recipe)

    def said(photos: int) -> Answers:
        texts = [row.answer if place < photos * QUESTIONS else "no" for place, row in enumerate(rows)]
        return Answers(texts, [2.0] * len(rows), [3] * len(rows), ended=[True] * len(rows))

    beside = Beside("tiny", "base", said(4))
    return build_evaluation("runs/a", held_out, scoring_of(held_out), said(9), beside, {})


def test_an_evaluation_takes_them_together(tmp_path: Path):
    together, apart = evaluation_of(False), evaluation_of(True)
    wide, narrow = (one.metrics["exact_match"] for one in (together, apart))
    assert wide["tuned"]["value"] == narrow["tuned"]["value"] == 0.75
    for side in ("tuned", "base", "difference"):
        assert wide[side]["high"] - wide[side]["low"] > 1.5 * (narrow[side]["high"] - narrow[side]["low"])
    assert (wide["p"], wide["test"], wide["won"]) == (2 / 2**5, "sign_flip", 25) and narrow["p"] < 1e-7
    parts = [one.categories["number"]["0"]["tuned"] for one in (together, apart)]
    assert parts[0] == parts[1], "of one question there is a row for each photo"
    assert together.categories["name"]["0"]["tuned"]["low"] < 0.21 < apart.categories["name"]["0"]["tuned"]["low"]
    found = json.loads(json.dumps(together.to_dict()))
    assert found["images"] == {"rows": 60, "different": 12} and apart.images == {"rows": 60, "different": 60}
    assert found["notes"][0] == "rows about the same photo are taken together in intervals and tests"
    assert [one["image_group"] for one in together.predictions] == np.repeat(np.arange(12), 5).tolist()
    columns, table = prediction_table(together.predictions)
    assert columns["image_group"] is int and table[5]["image_group"] == 1
    console = Console(width=120, record=True, file=io.StringIO())
    show_evaluation(console, found)
    page = render_report(ReportContent("a", found, predictions=together.predictions))
    for text in (console.export_text(), page):
        assert "60 held-out rows about 12 photos" in text and found["notes"][0] in text
    assert "about 60 photos" not in render_report(ReportContent("a", apart.to_dict(), predictions=apart.predictions))


def test_runs_beside_each_other_take_them_together(tmp_path: Path):
    for name, own in (("one", False), ("two", True)):
        for run, sides in ((RunFolder(tmp_path / f"{name}_a"), "tuned"), (RunFolder(tmp_path / f"{name}_b"), "base")):
            evaluation = evaluation_of(own)
            run.path.mkdir()
            run.write_recipe(Recipe.from_dict({"model": "tiny", "data": "made.csv", "output": str(run.path)}))
            run.write_versions({"torch": "2.13"})
            for line in evaluation.predictions:
                line["tuned"], line["scores"]["tuned"] = line[sides], line["scores"][sides]
            run.write_predictions(evaluation.predictions)
            run.write_evaluation(evaluation.to_dict())
        out = tmp_path / f"{name}.html"
        [first, second] = phi3v.compare([tmp_path / f"{name}_b", tmp_path / f"{name}_a"], out).runs
        gap, wanted = second["beside_first"]["exact_match"], evaluation_of(own).metrics["exact_match"]
        assert {key: gap[key] for key in ("difference", "p", "test", "won")} == {
            key: wanted[key] for key in ("difference", "p", "test", "won")
        }
        assert first["images"] == evaluation.images
        assert ("60 rows about 12 photos, 95" in out.read_text()) is not own
        shown = CliRunner().invoke(
            app, ["compare", *(str(tmp_path / f"{name}_{run}") for run in "ba"), "--out", str(out)]
        )
        assert ("60 rows about 12 photos, which are taken together" in shown.output) is not own
