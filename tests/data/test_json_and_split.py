"""JSON as it is written, whatever Arrow would make of it; and which rows are held out, by what their images hold."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.data.columns import RowOptions
from phi3v.data.sources import Reading, load_data, load_rows

OPTIONS = RowOptions(prompt="What is it?", answer="Product: {title}, Price: {price}")


pytestmark = pytest.mark.usefixtures("datasets_cache")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (number * 20, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def records(count: int) -> list[dict[str, Any]]:
    return [{"image": f"photos/{n}.png", "title": f"Scarf {n}", "price": 400 + n} for n in range(count)]


def write_photos(folder: Path, count: int) -> None:
    (folder / "photos").mkdir(parents=True)
    for number in range(count):
        (folder / "photos" / f"{number}.png").write_bytes(png(number))


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    lines = [json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
    return str(folder / name)


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
