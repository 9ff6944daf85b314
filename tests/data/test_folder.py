"""The data of a folder are the files in it: cards are not obeyed, links out of it are refused, splits told by names."""

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from phi3v.data.columns import RowOptions
from phi3v.data.folder import FolderFiles, find_files
from phi3v.data.not_read import NamedFiles, NotRead, unnamed
from phi3v.data.opening import open_set
from phi3v.data.reading import Reading
from phi3v.data.schema import ImageRef
from phi3v.data.sources import load_data, load_rows, stream_data
from phi3v.errors import DataError

OPTIONS = RowOptions(images=None, prompt="?", answer="{title}")
ANYWHERE = RowOptions(images=None, prompt="?", answer="{title}", allow_outside_root=True)


pytestmark = pytest.mark.usefixtures("datasets_cache")


def fill(folder: Path, *names: str, text: str = "title\na\nb\n") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def answers(source: Path, options: RowOptions = OPTIONS) -> list[str]:
    return [row.answer for row in load_data(str(source), options=options, validation_split=None).train]


@pytest.mark.parametrize(
    ("names", "kind", "splits"),
    [
        (["b.csv", "a.csv", "x.txt"], "csv", {"train": ["a.csv", "b.csv"]}),
        (["train.csv", "my-val.csv", "other.csv"], "csv", {"train": ["train.csv"], "validation": ["my-val.csv"]}),
        (["testing/a.jsonl", "b.jsonl"], "json", {"test": ["testing/a.jsonl"]}),
        (
            ["data/train_sft-00000-of-00001.parquet"],
            "parquet",
            {"train_sft": ["data/train_sft-00000-of-00001.parquet"]},
        ),
        (["trained.tsv", ".hidden/x.csv", ".train.csv"], "tsv", {"train": ["trained.tsv"]}),
        (["a.csv", "dataset_infos.json", "img/a.jpg", "img/b.jpg"], "csv", {"train": ["a.csv"]}),
        (["cat/a.jpg", "dog/b.png"], "images", {"train": ["cat/a.jpg", "dog/b.png"]}),
        (
            ["train/0.tar", "train/0.parquet", "val/1.tar"],
            "shards",
            {"train": ["train/0.tar"], "validation": ["val/1.tar"]},
        ),
        (["0.tar", "x.csv", "y.csv"], "shards", {"train": ["0.tar"]}),
        (["train/0.parquet", "train/1.parquet"], "parquet", {"train": ["train/0.parquet", "train/1.parquet"]}),
        (["a.csv", "old/backup.tar"], "csv", {"train": ["a.csv"]}),
        (["1.jpg", "2.jpg", "old/backup.tar"], "images", {"train": ["1.jpg", "2.jpg"]}),
        (["train 1.png", "steam-train.png", "x.png"], "images", {"train": ["steam-train.png", "train 1.png", "x.png"]}),
        (["train-station/a.png", "port/b.png"], "images", {"train": ["port/b.png", "train-station/a.png"]}),
        (["val/a/1.png", "train/b/2.png"], "images", {"train": ["train/b/2.png"], "validation": ["val/a/1.png"]}),
        (["cat/metadata.csv", "dog/metadata.csv"], "metadata", {"train": ["cat/metadata.csv", "dog/metadata.csv"]}),
        (["metadata.csv", "photos/more.csv"], "metadata", {"train": ["metadata.csv"]}),
        (
            ["val/metadata.csv", "train/metadata.csv"],
            "metadata",
            {"train": ["train/metadata.csv"], "validation": ["val/metadata.csv"]},
        ),
    ],
)
def test_files_and_splits(names: list[str], kind: str, splits: dict[str, list[str]], tmp_path: Path) -> None:
    fill(tmp_path, *names)
    expected = {split: [tmp_path / name for name in names] for split, names in splits.items()}
    assert find_files(tmp_path) == FolderFiles(kind, expected)


def test_kinds_that_are_as_many_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv", "b.parquet")
    with pytest.raises(DataError, match="holds csv and parquet files: name the file that is meant"):
        find_files(tmp_path)


@pytest.mark.parametrize("named", ["{outside}/*.csv", "ftp://127.0.0.1:9/x.csv", "../outside/x.csv"])
def test_a_dataset_card_is_not_obeyed(named: str, tmp_path: Path) -> None:
    fill(tmp_path, "outside/x.csv", text="title\nsecret\n")
    files = json.dumps(named.format(outside=tmp_path / "outside"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"
    fill(tmp_path / "set", "README.md", text=card)
    with pytest.raises(DataError, match="set cannot be read: it doesn't contain any data files"):
        load_rows(str(tmp_path / "set"), options=OPTIONS)
    fill(tmp_path / "set", "a.csv")
    assert answers(tmp_path / "set") == ["a", "b"]


@pytest.mark.parametrize("name", ["train.csv", "metadata.csv", "a.tar"])
def test_a_link_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    fill(tmp_path, f"outside/{name}", text="title,file_name\nsecret,x.png\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).symlink_to(tmp_path / "outside" / name)
    with pytest.raises(DataError, match=rf"{name} is a link that leads outside .*set: .*data.allow_outside_root: true"):
        load_rows(str(tmp_path / "set"), options=OPTIONS)
    if name == "train.csv":
        assert answers(tmp_path / "set", ANYWHERE) == ["secret"]


@pytest.mark.timeout(60)  # a FIFO that is opened is waited for
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "tar", "txt"])
def test_a_set_that_is_no_regular_file_is_refused_before_it_is_opened(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"pipe.{kind}")
    (tmp_path / f"device.{kind}").symlink_to("/dev/null")
    fill(tmp_path, "good.csv")
    good = str(tmp_path / "good.csv")
    for path in (str(tmp_path / f"pipe.{kind}"), str(tmp_path / f"device.{kind}")):
        mixed = [{"source": good, "weight": 1}, {"source": path, "weight": 1}]
        calls: list[Any] = [
            *(partial(call, train) for call in (load_data, stream_data) for train in (path, mixed)),
            *(partial(call, good, validation=path) for call in (load_data, stream_data)),
            partial(load_rows, path),
        ]
        if kind != "txt":
            calls.append(partial(load_rows, path.replace(f".{kind}", f"*.{kind}")))
        for call in calls:
            with pytest.raises(DataError, match=rf"^data file {re.escape(path)} is no regular file: put the file its"):
                call(options=OPTIONS)


def test_links_inside_the_folder_and_odd_names_are_files(tmp_path: Path) -> None:
    fill(tmp_path, "set/store/x[1]*.csv")
    (tmp_path / "set" / "train.csv").symlink_to("store/x[1]*.csv")
    fill(tmp_path, "set/store/x1b.csv", text="title\nother\n")
    assert answers(tmp_path / "set") == ["a", "b"]
    assert answers(tmp_path / "set" / "store" / "x[1]*.csv") == ["a", "b"]


def test_several_files_of_a_split_are_one_table_and_paths_count_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    fill(tmp_path, "data/1.csv", "data/2.csv", text="title,image\nx,a.png\n")
    options = RowOptions(prompt="?", answer="{title}")
    data = load_data(str(tmp_path), options=options, validation_split=None)
    assert [(row.source, row.index, row.answer) for row in data.train] == [
        (f"{tmp_path}/data/{name}.csv", 0, "x") for name in (1, 2)
    ]
    assert data.problems == []


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_several_files_are_named_by_file_and_number_there(kind: str, streaming: bool, tmp_path: Path) -> None:
    for name, titles in (("a", ["1", "2", "3"]), ("b", ["4", None, "6"])):
        rows = datasets.Dataset.from_list([{"title": title} for title in titles])
        file = str(tmp_path / f"{name}.{kind}")
        {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](file)
    how = Reading(max_skipped=0.5)
    if streaming:
        problems: list[Any] = []
        data = stream_data(str(tmp_path), options=OPTIONS, validation_split=1, reading=how)
        assert [row.answer for row in data.validation or []] == ["1"]
        stream = data.train.rows(problems.append, shuffled=False)
        train = [next(stream) for _ in range(4)]  # row 0 of b is not the row 0 of a that is held out
        assert [row.answer for row in train] == ["2", "3", "4", "6"]
    else:
        found = load_data(str(tmp_path), options=OPTIONS, validation_split=None, reading=how)
        train, problems = list(found.train)[1:], found.problems
        with pytest.raises(DataError, match=rf"set: 1 of 6 rows .*\): .*set/b.{kind}, row 1: column 'title' is empty"):
            (tmp_path / "set").mkdir()
            for file in tmp_path.glob(f"?.{kind}"):
                file.rename(tmp_path / "set" / file.name)
            load_data(str(tmp_path / "set"), options=OPTIONS, validation_split=None)
    assert [(Path(row.source).name, row.index) for row in train] == [
        (f"a.{kind}", 1),
        (f"a.{kind}", 2),
        (f"b.{kind}", 0),
        (f"b.{kind}", 2),
    ]
    assert [str(problem) for problem in problems] == [f"{tmp_path}/b.{kind}, row 1: column 'title' is empty"]


def test_what_is_not_read_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    fill(folder, "train.jsonl", "more.jsonl", "old.csv", ".git/config", "__x.jsonl", "README.md", "a.jpg", "b.jfif")
    (folder / "link").symlink_to(tmp_path)
    found = {Path(one.file).name: (one.reason, one.by_rows) for one in find_files(folder).not_read}
    hidden, by_rows = "hidden: its name begins with . or __", "no row that can be used names it"
    assert found == {
        "more.jsonl": ("its name tells no split, and the names of others do", False),
        "old.csv": ("json files are read here: name it itself to read it", False),
        ".git": (hidden, True),
        "__x.jsonl": (hidden, True),
        "link": ("a link to a folder, which is not followed", True),
        "a.jpg": (by_rows, True),
        "b.jfif": (f"no data by its ending, and {by_rows}", True),
        "README.md": (f"no data by its ending, and {by_rows}", True),
    }
    assert {one.file for one in find_files(folder).not_read if one.file.endswith("/")} == {
        f"{folder}/.git/",
        f"{folder}/link/",
    }


def test_what_rows_name_is_read(tmp_path: Path) -> None:
    folder = str(tmp_path)
    beside = [NotRead(f"{folder}/{name}", "why", by_rows=True) for name in ("a.jpg", "b.jpg", "link/", "other/")]
    named = NamedFiles(beside)
    named.note([ImageRef("x/../a.jpg", root=folder), ImageRef("link/c.jpg", root=folder)])
    named.note(
        [ImageRef("b.jpg", data=b"x", root=folder), ImageRef(None, None, folder, True, "https://a.example/b.jpg")]
    )
    assert named.names == {f"{folder}/a.jpg", f"{folder}/link/"}
    assert unnamed([beside, beside], named.names) == [beside[1], beside[3]]


def test_splits_that_nobody_asks_for_and_photos_without_rows_are_not_read(tmp_path: Path) -> None:
    fill(tmp_path, "train.csv", "val.csv", "test.csv", text="image,title\na.png,x\nb.png,\n")
    for name in "abc":
        Image.new("RGB", (5, 4)).save(tmp_path / f"{name}.png")
    options, how = RowOptions(prompt="?", answer="{title}"), Reading(max_skipped=0.5)
    data = load_data(str(tmp_path), options=options, reading=how)
    by_rows = "no row that can be used names it"
    split = "a split that is neither trained on nor held out: name it in data.train or data.validation"
    photos = [NotRead(f"{tmp_path}/{name}.png", by_rows, by_rows=True) for name in "bc"]
    assert data.not_read == [*photos, NotRead(f"{tmp_path}:test", split)]
    given = load_data(str(tmp_path), options=options, validation=str(tmp_path / "val.csv"), reading=how)
    assert given.not_read == data.not_read
    stream = stream_data(str(tmp_path), options=options, reading=how)
    assert [one.file for one in stream.not_read] == [f"{tmp_path}:validation", f"{tmp_path}:test"]


def test_photos_are_read_by_content_where_their_ending_says_nothing(tmp_path: Path) -> None:
    folder, outside = tmp_path / "set", tmp_path / "outside.png"
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        Image.new("RGB", (5, 4)).save(folder / kind / "a.jpg")
    for name, form in (("b.jfif", "JPEG"), ("c", "PNG"), ("d.bin", "BMP"), ("e.x", "WEBP"), (".f.jpg", "JPEG")):
        Image.new("RGB", (5, 4)).save(folder / "dog" / name, form)
    Image.new("RGB", (5, 4)).save(outside)
    (folder / "dog" / "g").symlink_to(outside)
    os.mkfifo(folder / "dog" / "h")
    fill(folder, "dog/i.heic", "dog/note.txt", text="BMW")
    data = load_data(str(folder), options=RowOptions(prompt="?", answer="{label}"), validation_split=None)
    names = [Path(row.images[0].path or "").name for row in data.train]
    assert names == ["a.jpg", "a.jpg", "b.jfif", "c", "d.bin", "e.x"] and data.problems == []
    assert [row.answer for row in data.train] == ["cat", *["dog"] * 5]
    told = {Path(one.file).name: one.reason.partition(":")[0] for one in data.not_read}
    content = "by its content no JPEG, PNG, WebP, GIF, BMP or TIFF"
    assert told == {".f.jpg": "hidden", **dict.fromkeys(("g", "h", "i.heic", "note.txt"), content)}


@pytest.mark.timeout(60)  # a FIFO that is opened is waited for
def test_a_photo_that_leads_out_or_is_no_file_is_a_problem_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("set")
    (folder / "cat").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "outside.png")
    (folder / "cat" / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(folder / "cat" / "pipe.png")
    options, how = RowOptions(prompt="?", answer="{label}"), Reading(max_skipped=0.7)
    with pytest.raises(
        DataError, match=r"^data file .*/cat/link.png is a link that leads outside .*allow_outside_root"
    ):
        load_data(str(folder), options=options, validation_split=None, reading=how)
    Image.new("RGB", (5, 4)).save(folder / "cat" / "a.png")
    data = load_data(str(folder), options=options, validation_split=None, reading=how)
    assert [(row.index, row.answer) for row in data.train] == [(0, "cat")]
    assert [(one.row, one.reason_code) for one in data.problems] == [(1, "image_path"), (2, "image_path")]
    assert "outside" in data.problems[0].message and "is no regular file" in data.problems[1].message
    anywhere = RowOptions(prompt="?", answer="{label}", allow_outside_root=True)
    assert [
        row.index for row in load_data(str(folder), options=anywhere, validation_split=None, reading=how).train
    ] == [0, 1]


def test_columns_that_names_of_folders_hold_are_named(tmp_path: Path) -> None:
    for name in ("country=US/year=2024/part-0", "country=FR/year=2024/part-0"):
        (tmp_path / name).parent.mkdir(parents=True)
        datasets.Dataset.from_list([{"title": name}]).to_parquet(str(tmp_path / f"{name}.parquet"))
    opened = open_set(str(tmp_path))["train"]
    reason = "a column that names of folders hold: write it into the files"
    assert [(one.file, one.reason) for one in opened.not_read] == [
        (f"{tmp_path}/country=...", reason),
        (f"{tmp_path}/year=...", reason),
    ]
    assert opened.table.column_names == ["title"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_in_folders_of_classes_names_photos_from_its_own_place(
    kind: str, streaming: bool, tmp_path: Path
) -> None:
    for label, names in (("cat", ["a.png", "gone.png"]), ("dog", ["a.png", "../cat/b.png"])):
        (tmp_path / label).mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (5, 4)).save(tmp_path / label / name)
        rows = datasets.Dataset.from_list([{"file_name": name, "title": label} for name in names])
        file = str(tmp_path / label / f"metadata.{kind}")
        {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](file)
    options, how = RowOptions(prompt="?", answer="{title}"), Reading(max_skipped=1.0)
    if streaming:
        rows = stream_data(str(tmp_path), options=options, reading=how).train.rows(print, shuffled=False)
        train = [next(rows) for _ in range(3)]
    else:
        data = load_data(str(tmp_path), options=options, validation_split=None, reading=how)
        train = list(data.train)
        assert [(str(problem), problem.reason_code) for problem in data.problems] == [
            (
                f"{tmp_path}/cat/metadata.{kind}, row 1: image cat/gone.png does not exist "
                f"(looked for {tmp_path}/cat/gone.png)",
                "image_path",
            )
        ]
        assert [one.file for one in data.not_read] == [f"{tmp_path}/dog/b.png"]
    assert [(row.answer, row.images[0].path) for row in train] == [
        ("cat", "cat/a.png"),
        ("dog", "dog/a.png"),
        ("dog", "dog/../cat/b.png"),
    ]
    assert train[2].source == f"{tmp_path}/dog/metadata.{kind}" and train[2].index == 1


@pytest.mark.parametrize(
    ("names", "labels", "strays"),
    [
        (["cat/a.png", "dog/a.png"], ["cat", "dog"], []),
        (["cat/a.png"], ["cat"], []),
        (["a.png", "cat/b.png", "dog/black/c.png"], ["cat", "black"], ["column 'label' is empty"]),
        (["train/a.png", "train/cat/b.png", "val/cat/a.png"], ["cat"], ["column 'label' is empty"]),
        (["cat/train/a.png", "dog/train/a.png", "dog/test/b.png"], ["cat", "dog"], []),
    ],
)
def test_photos_in_folders_have_labels(names: list[str], labels: list[str], strays: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    options, how = RowOptions(prompt="?", answer="{label}"), Reading(max_skipped=0.5)
    data = load_data(str(tmp_path), options=options, validation_split=None, reading=how)
    assert [row.answer for row in data.train] == labels
    assert [problem.message for problem in data.problems] == strays


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("other", ["image", "image_file_name"])
def test_metadata_with_two_columns_of_one_photo_is_one_line(kind: str, other: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"file_name": "a.png", other: "b.png", "title": "x"}])
    file = str(tmp_path / f"metadata.{kind}")
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](file)
    told = f"{file} has the columns file_name and {other}, and both give the column image: rename or drop one of them"
    with pytest.raises(DataError, match=re.escape(told)):
        load_rows(str(tmp_path), options=OPTIONS)


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/hostname", "..", None])
def test_a_saved_set_names_files_of_its_own_alone(name: Any, tmp_path: Path) -> None:
    for folder in ("other", "set"):
        datasets.Dataset.from_list([{"title": folder}]).save_to_disk(tmp_path / folder)
    assert answers(tmp_path / "set") == ["set"]
    state = tmp_path / "set" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="as one of its files, which is no plain name in that folder"):
        load_rows(str(tmp_path / "set"), options=OPTIONS)
    state.unlink()
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(DataError, match="names '../other' as one of its files"):
        load_rows(str(tmp_path / "set"), options=OPTIONS)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_photo_that_cannot_be_listed_is_a_problem_of_its_row(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in (b"a.png", b"b.png", b"caf\xe9.png"):
        try:
            Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
            os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path), b"set", name))
        except OSError:
            pytest.skip("this file system takes UTF-8 names alone")
    (tmp_path / "set" / "z.png").symlink_to("nowhere")
    options = RowOptions(prompt="What?", answer="A hat.")
    if streaming:
        assert len(list(open_set(str(tmp_path / "set"), streaming=True)["train"].table)) == 4
        return
    rows, problems = load_rows(str(tmp_path / "set"), options=options, reading=Reading(max_skipped=0.5))
    assert [Path(row.images[0].path or "").name for row in rows] == ["a.png", "b.png"]
    assert [(problem.row, problem.reason_code) for problem in problems] == [(2, "image_path"), (3, "image_path")]
    assert "caf\\udce9.png" in problems[0].message and "z.png does not exist" in problems[1].message
