"""JSON as it is written, whatever Arrow would make of it; and which rows are held out, by what their images hold."""

from pathlib import Path

import pytest
from product_sets import png, records, write, write_photos

from phi3v.data import record_table
from phi3v.data.columns import RowOptions
from phi3v.data.json_table import JsonTable
from phi3v.data.sources import Reading, load_data, load_rows

OPTIONS = RowOptions(prompt="What is it?", answer="Product: {title}, Price: {price}")


pytestmark = pytest.mark.usefixtures("datasets_cache")


LITERAL = [
    "2024-05-01T10:30:00",
    "2024-05-01",
    "10:30",
    "007",
    "1e5",
    "NA",
    "null",
    " two  spaces",
    "\u00e9\u2028\U0001f600",
]
NUMBERS = {
    12345678901234567890: "12345678901234567890",
    10**30 + 1: f"{10**30 + 1}",
    470: "470",
    1.5: "1.5",
    True: "true",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "set/train.jsonl", "set/train-0.json", "photos/metadata.jsonl"])
def test_json_text_and_whole_numbers_stay_as_they_are_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    column = "file_name" if "metadata" in name else "image"
    rows = [{column: None, "title": value} for value in (*LITERAL, *NUMBERS)] + [{"late": 1, "title": "x"}]
    write(path.parent, path.name, rows)
    source = path if path.parent == tmp_path else path.parent
    found, _ = load_rows(str(source), options=RowOptions(images=None, prompt="?", answer="{title}"))
    assert [row.answer for row in found] == [*LITERAL, *NUMBERS.values(), "x"]
    late = load_rows(str(source), options=RowOptions(images=None, prompt="?", answer="{late}"), reading=ALL)[0]
    assert [(row.index, row.answer) for row in late] == [(len(rows) - 1, "1")]


ALL = Reading(max_skipped=1.0)


def test_a_folder_of_json_files_is_read_in_order_with_its_splits(tmp_path: Path) -> None:
    for name, titles in {"train-1": ["a", "2024-05-01"], "train-2": [12345678901234567890], "test": ["c"]}.items():
        write(tmp_path, f"{name}.jsonl", [{"title": title} for title in titles])
    data = load_data(str(tmp_path), options=RowOptions(images=None, prompt="?", answer="{title}"))
    assert [row.answer for row in data.train] == ["a", "2024-05-01", "12345678901234567890"]
    assert ([row.answer for row in data.validation or ()], data.origin) == (["c"], "test")


def test_records_are_the_same_one_by_one_and_in_a_row_which_opens_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [Path(write(tmp_path, f"{name}.jsonl", records(count))) for name, count in (("a", 3), ("b", 1), ("c", 2))]
    table = JsonTable(files)
    one_by_one = [table[number] for number in range(6)]
    opened: list[str] = []
    noted = lambda path, mode: opened.append(path) or open(path, mode)  # noqa: E731, SIM115
    monkeypatch.setattr(record_table, "open", noted, raising=False)
    assert list(table) == one_by_one == [*records(3), *records(1), *records(2)]
    assert opened == [str(path) for path in files]
    assert table.__getitems__([0, 2, 4, 5, 1]) == [one_by_one[number] for number in (0, 2, 4, 5, 1)]
    assert opened[3:] == [str(files[place]) for place in (0, 2, 0)]
    with pytest.raises(IndexError):
        table[-1]


def test_copies_of_a_photo_under_other_names_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(40):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number % 4))
    source = write(tmp_path, "a.jsonl", records(40))
    for seed in range(5):
        data = load_data(source, options=OPTIONS, validation_split=0.5, split_seed=seed)
        sides = [{row.index % 4 for row in rows or ()} for rows in (data.train, data.validation)]
        assert sides[0] | sides[1] == set(range(4)) and not sides[0] & sides[1] and data.problems == []


def test_a_training_row_with_a_held_out_image_is_left_out_and_named(tmp_path: Path) -> None:
    write_photos(tmp_path, 12)
    rows = [{**row, "image": [row["image"]]} for row in records(12)]
    rows += [{**row, "image": ["photos/0.png", f"photos/{n}.png"]} for n, row in enumerate(records(12)) if n]
    source = write(tmp_path, "a.jsonl", rows)
    data = load_data(source, options=OPTIONS, validation_split=0.5, split_seed=1)
    assert data.validation is not None and data.problems
    assert {problem.reason_code for problem in data.problems} == {"held_out_image"}
    numbers = [row.index for row in [*data.train, *data.validation]] + [problem.row for problem in data.problems]
    assert sorted(numbers) == list(range(23)) and data.rows_in == 23
    paths = [{image.path for row in side for image in row.images} for side in (data.train, data.validation)]
    assert not paths[0] & paths[1]
