"""Data sets of every kind become the same rows; what cannot be used is named; splits are the set's own or ours."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from product_sets import png, records, write, write_photos

from phi3v.data.columns import RowOptions
from phi3v.data.images import open_image
from phi3v.data.judging import describe_problems, most_allowed
from phi3v.data.rows import Rows
from phi3v.data.schema import ImagePart, Message, TextPart
from phi3v.data.sources import load_data, load_rows
from phi3v.errors import DataError

OPTIONS = RowOptions(prompt="What is it?", answer="Product: {title}, Price: {price}")


pytestmark = pytest.mark.usefixtures("datasets_cache")


def images_folder(folder: Path) -> str:
    write_photos(folder, 5)
    lines = [f"photos/{n}.png,Scarf {n},{400 + n}" for n in range(5)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,title,price", *lines]) + "\n")
    return str(folder)


def with_bytes(**extra: Any) -> list[dict[str, Any]]:
    return [{**row, "image": {"bytes": png(n), "path": f"{n}.png"}, **extra} for n, row in enumerate(records())]


IMAGE_FEATURES = datasets.Features(
    {"image": datasets.Image(), "title": datasets.Value("string"), "price": datasets.Value("float64")}
)


def make(kind: str, folder: Path) -> str:
    """The same five products in a set of some kind."""
    if kind == "image folder":
        return images_folder(folder / "set")
    if kind == "folder of parquet":
        (folder / "set").mkdir()
        return str(Path(write(folder / "set", "train-00000.parquet", with_bytes(), IMAGE_FEATURES)).parent)
    if kind == "saved to disk":
        datasets.Dataset.from_list(with_bytes(), features=IMAGE_FEATURES).save_to_disk(folder / "set")
        return str(folder / "set")
    if kind == "splits saved to disk":
        table = datasets.Dataset.from_list(with_bytes(), features=IMAGE_FEATURES)
        datasets.DatasetDict({"train": table}).save_to_disk(folder / "set")
        return str(folder / "set")
    if kind == "parquet with Image":
        return write(folder, "a.parquet", with_bytes(), IMAGE_FEATURES)
    if kind == "parquet with structs":
        return write(folder, "a.parquet", with_bytes())
    if kind == "parquet with bytes":
        return write(folder, "a.parquet", [{**row, "image": png(n)} for n, row in enumerate(records())])
    write_photos(folder)
    return write(folder, f"a.{kind}", records())


KINDS = ["csv", "tsv", "json", "jsonl", "parquet", "parquet with Image", "parquet with structs", "parquet with bytes"]
FOLDERS = ["image folder", "folder of parquet", "saved to disk", "splits saved to disk"]


@pytest.mark.parametrize("kind", [*KINDS, *FOLDERS])
def test_every_kind_of_set_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path)
    rows, problems = load_rows(source, options=OPTIONS)
    assert (len(rows), problems) == (5, [])
    for number, row in enumerate(rows):
        assert row.messages == (
            Message("user", (ImagePart(0), TextPart("What is it?"))),
            Message("assistant", (TextPart(f"Product: Scarf {number}, Price: {400 + number}"),)),
        )
        assert row.fields == {"title": f"Scarf {number}", "price": str(400 + number)}
        assert (row.source, row.index, row.question) == (source, number, "What is it?")
        assert open_image(row.images[0]).size == (8 + number, 6)


def test_rows_are_a_sequence_that_can_be_pickled(tmp_path: Path) -> None:
    rows, _ = load_rows(make("csv", tmp_path), options=OPTIONS)
    assert isinstance(rows[1:3], Rows) and [row.index for row in rows[1:3]] == [1, 2]
    assert [row.index for row in rows.take([3, 0])] == [3, 0] and rows[-1].index == 4
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    mixed = (rows + load_rows(make("parquet with bytes", tmp_path), options=OPTIONS)[0]).take([7, 1, 0, 9, 2] * 20)
    assert list(mixed) == [mixed[position] for position in range(100)]
    with pytest.raises(IndexError):
        rows[5]


def test_a_system_turn_and_literal_braces(tmp_path: Path) -> None:
    options = RowOptions(system="Shop {title}", prompt="{{x}} {price}", answer="{title}")
    row = load_rows(make("csv", tmp_path), options=options)[0][0]
    assert [(message.role, message.text) for message in row.messages] == [
        ("system", "Shop Scarf 0"),
        ("user", "{x} 400"),
        ("assistant", "Scarf 0"),
    ]
    assert row.fields == {"title": "Scarf 0"}


def test_csv_text_stays_as_it_is_written(tmp_path: Path) -> None:
    write_photos(tmp_path, 2)
    rows = [{"image": f"photos/{n}.png", "title": title, "price": price} for n, (title, price) in enumerate(CELLS)]
    found, _ = load_rows(write(tmp_path, "a.csv", rows), options=OPTIONS)
    assert [row.answer for row in found] == ["Product: 007, Price: 19.90", "Product: NA, Price: 1e5"]


CELLS = [("007", "19.90"), ("NA", "1e5")]


def test_whole_floats_lose_their_point_and_labels_show_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "a": datasets.Value("float64"),
            "b": datasets.Value("float32"),
            "c": datasets.ClassLabel(names=["hat", "bag"]),
            "d": datasets.Value("bool"),
            "e": datasets.Value("float16"),
        }
    )
    values = [
        {"a": 470.0, "b": 0.1, "c": 1, "d": True, "e": 0.1},
        {"a": -0.0, "b": 1e9, "c": 0, "d": False, "e": 10008.0},
    ]
    source = write(tmp_path, "a.parquet", values, features)
    rows, _ = load_rows(source, options=RowOptions(images=None, prompt="?", answer="{a} {b} {c} {d} {e}"))
    assert [row.answer for row in rows] == ["470 0.1 bag true 0.1", "0 1000000000 hat false 10008"]


def test_several_images_in_a_row_keep_their_order(tmp_path: Path) -> None:
    write_photos(tmp_path)
    listed = [{"image": ["photos/1.png", "photos/0.png"], "title": "a", "price": 1}]
    row = load_rows(write(tmp_path, "a.jsonl", listed), options=OPTIONS)[0][0]
    assert row.messages[0].parts == (ImagePart(0), ImagePart(1), TextPart("What is it?"))
    assert [open_image(image).width for image in row.images] == [9, 8]
    features = datasets.Features({**IMAGE_FEATURES, "image": datasets.List(datasets.Image())})
    embedded = [{"image": [{"bytes": png(2), "path": None}], "title": "a", "price": 1.0}]
    row = load_rows(write(tmp_path, "b.parquet", embedded, features), options=OPTIONS)[0][0]
    assert open_image(row.images[0]).width == 10


def test_an_empty_list_is_a_row_without_images(tmp_path: Path) -> None:
    write_photos(tmp_path)
    listed = [{"image": ["photos/1.png"], "title": "a", "price": 1}, {"image": [], "title": "b", "price": 2}]
    for name in ("a.jsonl", "a.parquet"):
        rows, problems = load_rows(write(tmp_path, name, listed), options=OPTIONS)
        assert problems == [] and [len(row.images) for row in rows] == [1, 0]
        assert rows[1].messages[0].parts == (TextPart("What is it?"),)
    loaded = load_data(write(tmp_path, "b.jsonl", listed), options=OPTIONS, validation_split=1)
    assert (len(loaded.train), len(loaded.validation or [])) == (1, 1)
    nothing = [*listed, {"image": None, "title": "c", "price": 3}]
    with pytest.raises(DataError, match="1 of 3 rows cannot be used .1 image_missing.: row 2: "):
        load_rows(write(tmp_path, "c.jsonl", nothing), options=OPTIONS)


def bad_records() -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """60 rows of which three have a problem, and which."""
    rows = records(60)
    rows[3]["title"] = None
    rows[20]["image"] = None
    rows[41]["image"] = "photos/gone.png"
    return rows, [(3, "missing_value"), (20, "image_missing"), (41, "image_path")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_with_problems_are_left_out_and_named(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(tmp_path, 60)
    bad, expected = bad_records()
    with caplog.at_level(logging.WARNING):
        rows, problems = load_rows(write(tmp_path, f"a.{kind}", bad), options=OPTIONS)
    assert [(problem.row, problem.reason_code) for problem in problems] == expected
    assert len(rows) + len(problems) == 60 and not {row.index for row in rows} & {3, 20, 41}
    assert f"a.{kind}: 3 of 60 rows cannot be used" in caplog.text and "row 3: column 'title' is empty" in caplog.text
    assert str(problems[0]).endswith(f"a.{kind}, row 3: column 'title' is empty")
    assert not any("None" in message.text for row in rows for message in row.messages)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"title": ""}, "missing_value"),
        ({"price": float("nan")}, "missing_value"),
        ({"title": ["a"]}, "value_type"),
        ({"image": None}, "image_missing"),
        ({"image": ""}, "image_missing"),
        ({"image": 5}, "image_type"),
        ({"image": "../outside.png"}, "image_path"),
        ({"image": "photos"}, "image_path"),
        ({"image": "photos/broken.png"}, "image_unreadable"),
        ({"image": {"bytes": b"nonsense", "path": "x.png"}}, "image_unreadable"),
        ({"image": {"bytes": None, "path": None}}, "image_missing"),
    ],
)
def test_each_problem_has_its_code(change: dict, code: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    (tmp_path / "outside.png").write_bytes(png(0))
    (tmp_path / "set" / "photos" / "broken.png").write_bytes(png(0)[:20])
    source = write(tmp_path / "set", "a.parquet", [{**records(1)[0], **change}])
    with pytest.raises(DataError, match=rf"1 of 1 rows cannot be used \(1 {code}\): row 0: ") as caught:
        load_rows(source, options=OPTIONS)
    assert "\n" not in str(caught.value)


def test_too_many_problems_stop_the_run(tmp_path: Path) -> None:
    write_photos(tmp_path, 60)
    bad, _ = bad_records()
    with pytest.raises(DataError, match=r"3 of 59 rows cannot be used .*; at most 5% may be left out"):
        load_rows(write(tmp_path, "a.jsonl", bad[:59]), options=OPTIONS)


def test_paths_may_leave_the_root_when_allowed(tmp_path: Path) -> None:
    write_photos(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    source = write(tmp_path / "set", "a.jsonl", records())
    with pytest.raises(DataError, match="5 image_path"):
        load_rows(source, options=OPTIONS)
    moved = RowOptions(answer="{title}", prompt="?", image_root=str(tmp_path / "elsewhere"))
    assert len(load_rows(source, options=moved)[0]) == 5
    absolute = [{**row, "image": str(tmp_path / "elsewhere" / row["image"])} for row in records()]
    source = write(tmp_path / "set", "b.jsonl", absolute)
    with pytest.raises(DataError, match="lies outside"):
        load_rows(source, options=OPTIONS)
    allowed = RowOptions(answer="{title}", prompt="?", allow_outside_root=True)
    assert len(load_rows(source, options=allowed)[0]) == 5


def test_a_folder_may_have_the_name_of_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    images_folder(Path("csv"))
    rows, _ = load_rows("csv", options=OPTIONS, revision="abc")
    assert len(rows) == 5 and open_image(rows[2].images[0]).width == 10
    assert "data.revision abc is ignored" in caplog.text


def test_addresses_that_are_not_of_the_web_are_problems(tmp_path: Path) -> None:
    for scheme in ("file", "ftp", "s3", "hf"):
        rows = [{**row, "image": f"{scheme}://host/{n}.jpg"} for n, row in enumerate(records())]
        with pytest.raises(DataError, match="5 url_scheme.*only http and https addresses are downloaded"):
            load_rows(write(tmp_path, f"{scheme}.csv", rows), options=OPTIONS)


def test_missing_columns_name_those_that_exist(tmp_path: Path) -> None:
    source = make("csv", tmp_path)
    with pytest.raises(
        DataError, match=r"the column 'titel'.*\(did you mean 'title'\?\); its columns are image, title, price"
    ):
        load_rows(source, options=RowOptions(prompt="?", answer="{titel}"))
    with pytest.raises(DataError, match=r"data.images names the column 'photo'.*data.images: null"):
        load_rows(source, options=RowOptions(prompt="?", answer="{title}", images="photo"))
    rows, _ = load_rows(source, options=RowOptions(prompt="?", answer="{title}", images=None))
    assert rows[0].images == () and rows[0].messages[0].parts == (TextPart("?"),)


def test_a_column_that_is_not_there_is_told_with_what_people_mostly_have_then(tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text('{"version": 1, "data": [{"title": "a"}]}')
    (tmp_path / "rows.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "0.png")
    (tmp_path / "photos" / "0.txt").write_text("a hat")
    whole = (
        r"whole.json does not have; its columns are version, data .*; the file is one object: write its rows as a list"
    )
    photos = r"column 'txt', which .*photos does not have.*; what is said of photos is read from a metadata.jsonl or"
    default = r"column 'prompt', which .*rows.jsonl does not have; .* \(set data.prompt to a text, in which \{column\}"
    for name, prompt, answer, line in (
        ("whole.json", "?", "{title}", whole),
        ("photos", "?", "{txt}", photos),
        ("rows.jsonl", "{prompt}", "{title}", default),
    ):
        images = "image" if name == "photos" else None
        with pytest.raises(DataError, match=line):
            load_rows(str(tmp_path / name), options=RowOptions(images=images, prompt=prompt, answer=answer))


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("a")
    for missing, told in (
        *(
            (name, r"does not exist \(looked in .*\): relative paths")
            for name in ("gone.csv", "./gone", "data/trian.jsonl")
        ),
        (str(tmp_path / "gone"), "gone does not exist$"),
        (str(tmp_path / "*.txt"), r"\*.txt names files that end in none of .csv, .*, .tar: .*notes.txt for instance$"),
    ):
        with pytest.raises(DataError, match=told):
            load_rows(missing, options=OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty cannot be read: .* doesn't contain any data files"):
        load_rows(str(tmp_path / "empty"), options=OPTIONS)

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="someone/things cannot be read: Couldn't reach the Hub at all; it is no file"):
        load_rows("someone/things", options=OPTIONS)


def test_hub_ids_take_the_same_way_with_their_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder answers for the hub; strings in a stranger's set do not name files of this machine."""
    folder, real, asked = make("folder of parquet", tmp_path), datasets.load_dataset, []

    def hub(name: str, **options: object) -> datasets.DatasetDict:
        asked.append((name, options))
        return real(folder)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    loaded = load_data("DBQ/Burberry.Product", options=OPTIONS, revision="abc", validation_split=1)
    assert asked == [("DBQ/Burberry.Product", {"revision": "abc"})]
    assert (len(loaded.train), loaded.train[0].source) == (4, "DBQ/Burberry.Product")

    (tmp_path / "mine.png").write_bytes(png(0))
    stolen = [{**row, "image": str(tmp_path / "mine.png")} for row in records()]
    (tmp_path / "other").mkdir()
    folder = str(Path(write(tmp_path / "other", "train.parquet", stolen)).parent)
    with pytest.raises(DataError, match="5 image_path.*lies outside") as refused:
        load_rows("someone/things", options=OPTIONS)
    told = str(refused.value)
    assert (
        told.count("lies outside") == 3 and told.count(" (each: move it there, set data.image_root, or allow it") == 1
    )
    assert told.count("move it there") == 1, "the way out stands once"


def test_validation_rows_come_from_a_file_the_set_itself_or_a_split(tmp_path: Path) -> None:
    source = make("csv", tmp_path)
    split = load_data(source, options=OPTIONS, validation_split=2, split_seed=1)
    assert split.validation is not None and split.origin == "split"
    sides = [{row.index for row in split.train}, {row.index for row in split.validation}]
    assert sides[0] | sides[1] == set(range(5)) and len(sides[1]) == 2 and not sides[0] & sides[1]
    assert load_data(source, options=OPTIONS, validation_split=None).validation is None
    other = write(tmp_path, "b.jsonl", records(2))
    given = load_data(source, options=OPTIONS, validation=other)
    assert given.validation is not None and (len(given.train), len(given.validation)) == (5, 2)
    assert given.origin == "validation" and given.validation[0].source == other
    assert [row.index for row in load_data(source, options=OPTIONS, validation=other, max_rows=2).train] == [0, 1]


@pytest.mark.parametrize("own", ["validation", "test"])
def test_a_split_of_the_sets_own_is_used(own: str, tmp_path: Path) -> None:
    for split, count in (("train", 4), (own, 2)):
        folder = tmp_path / split
        write_photos(folder, count)
        lines = [
            json.dumps({"file_name": f"photos/{n}.png", "title": f"{split} {n}", "price": n}) for n in range(count)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    loaded = load_data(str(tmp_path), options=OPTIONS)
    assert loaded.validation is not None and (len(loaded.train), len(loaded.validation)) == (4, 2)
    assert loaded.origin == own and loaded.validation[1].fields["title"] == f"{own} 1"
    assert loaded.validation[0].source == f"{tmp_path} ({own})"
    rows, _ = load_rows(str(tmp_path), options=OPTIONS)
    assert [row.fields["title"] for row in rows] == [f"{own} 0", f"{own} 1"]


def test_the_split_does_not_depend_on_where_the_set_lies(tmp_path: Path) -> None:
    sides = []
    for place in ("here", "there"):
        loaded = load_data(images_folder(tmp_path / place), options=OPTIONS, validation_split=2)
        assert loaded.validation is not None
        sides.append([row.index for row in loaded.validation])
    assert sides[0] == sides[1]


def test_equal_embedded_images_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{**row, "image": png(n % 3)} for n, row in enumerate(records(30))]
    source = write(tmp_path, "a.parquet", rows)
    for seed in range(4):
        loaded = load_data(source, options=OPTIONS, validation_split=0.3, split_seed=seed)
        assert loaded.validation is not None
        assert not {row.index % 3 for row in loaded.train} & {row.index % 3 for row in loaded.validation}


def test_problems_are_counted_by_reason() -> None:
    assert describe_problems([], 0, "a.csv") == "a.csv has no rows"
    exact = {(0.29, 100): 29, (0.58, 100): 58, (0.05, 40): 2, (0.05, 39): 1, (1 / 3, 3): 1, (1.0, 7): 7, (0.0, 9): 0}
    assert {of: most_allowed(*of) for of in exact} == exact


def test_progress_bars_are_left_as_they_were(tmp_path: Path) -> None:
    os.environ.pop("HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    for wanted in (True, False):
        (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()
        load_rows(make("csv", tmp_path / str(wanted)), options=OPTIONS)
        assert datasets.are_progress_bars_disabled() is not wanted
    datasets.enable_progress_bars()
