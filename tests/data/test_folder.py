"""The data of a folder are the files in it: cards are not obeyed, links out of it are refused, splits told by names."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from phi3v.data.columns import RowOptions
from phi3v.data.folder import FolderFiles, find_files
from phi3v.data.opening import open_set
from phi3v.data.reading import Reading
from phi3v.data.sources import load_data, load_rows
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
    assert [(row.index, row.answer) for row in data.train] == [(0, "x"), (1, "x")] and data.problems == []


def test_photos_in_folders_have_labels(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 4)).save(tmp_path / name / "a.png")
    options = RowOptions(prompt="?", answer="{label}")
    data = load_data(str(tmp_path), options=options, validation_split=None)
    assert [row.answer for row in data.train] == ["cat", "dog"] and data.problems == []


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
