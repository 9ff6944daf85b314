"""Patterns of files: which they name, and where the images of their rows lie."""

from pathlib import Path

import datasets
import pytest
from PIL import Image

from phi3v.data import opening
from phi3v.data.columns import RowOptions
from phi3v.data.folder import matching
from phi3v.data.images import open_image
from phi3v.data.sources import load_data, load_rows, stream_data
from phi3v.errors import DataError

OPTIONS = RowOptions(images=None, prompt="?", answer="{title}")
pytestmark = pytest.mark.usefixtures("datasets_cache")


def fill(folder: Path, *names: str) -> None:
    """Tables of two rows."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("title\na\nb\n")


def answers(source: Path) -> list[str]:
    return [row.answer for row in load_data(str(source), options=OPTIONS, validation_split=None).train]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "chats"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_a_pattern_lie_beside_the_file_of_their_row(kind: str, streaming: bool, tmp_path: Path) -> None:
    """Each folder has a 0.png of its own width; an image root holds for all of them."""
    ending, told = ("jsonl" if kind == "chats" else kind), []
    for width, name in enumerate(("a", "b", "c"), start=1):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (width, 8)).save(tmp_path / "set" / name / "0.png")
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": name}]
        row = {"messages": turns, "images": ["0.png"]} if kind == "chats" else {"title": name, "image": "0.png"}
        rows = datasets.Dataset.from_list([row, row])
        file = str(tmp_path / "set" / name / f"rows.{ending}")
        {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[ending](file)
    pattern = str(tmp_path / "set" / "*" / f"rows.{ending}")
    for image_root in (None, str(tmp_path / "set" / "b")):
        shape = {"format": "conversations"} if kind == "chats" else {"prompt": "?", "answer": "{title}"}
        images = "images" if kind == "chats" else "image"
        options = RowOptions(images=images, image_root=image_root, **shape)
        if streaming:
            found = stream_data(pattern, options=options, validation_split=5).validation or []
        else:
            found = load_data(pattern, options=options, validation_split=None).train
        told.append([(row.answer, open_image(row.images[0]).width, row.index) for row in found][:5])
    assert told[0] == [("a", 1, 0), ("a", 1, 1), ("b", 2, 0), ("b", 2, 1), ("c", 3, 0)]
    assert told[1] == [(answer, 2, number) for answer, _, number in told[0]]


def test_a_pattern_whose_rows_have_no_known_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reading of the files counts other rows: the folder that image paths count from is then unknown."""
    fill(tmp_path / "set", "a/1.csv", "b/1.csv", "b/2.csv")
    monkeypatch.setattr(opening, "count_rows", lambda path: 3)
    assert answers(tmp_path / "set" / "b" / "*.csv") == ["a", "b"] * 2
    with pytest.raises(DataError, match=r"a/1.csv and \S*b/2.csv: it is not known which rows .* as a set of its own"):
        answers(tmp_path / "set" / "*" / "*.csv")


def test_patterns_name_files_with_braces(tmp_path: Path) -> None:
    fill(tmp_path, "08.csv", "09.csv", "10.csv", "a{b}.csv", "x.jsonl")
    names = [f"{tmp_path}/{name}.csv" for name in ("08", "09", "10")]
    assert [str(path) for path in matching(f"{tmp_path}/{{08..10}}.csv")] == names
    assert [str(path) for path in matching(f"{tmp_path}/{{0,0}}{{8..9}}.csv")] == [*names[:2], *names[:2]]
    assert [str(path) for path in matching(f"{tmp_path}/{{08,1*}}.csv")] == [names[0], names[2]]
    assert [str(path) for path in matching(f"{tmp_path}/[01]*.csv")] == names
    assert matching(f"{tmp_path}/none*.csv") == [] == matching(f"{tmp_path}/none.csv")
    with pytest.raises(DataError, match=r"data file .*/11.csv, which .*/\{08..11\}.csv names, does not exist"):
        load_rows(f"{tmp_path}/{{08..11}}.csv", options=OPTIONS)
    with pytest.raises(DataError, match="names more than 100,000 files"):
        matching(f"{tmp_path}/{{0..999999999}}.csv")
    assert len(load_rows(f"{tmp_path}/{{08..10}}.csv", options=OPTIONS)[0]) == 6
    assert len(load_rows(f"{tmp_path}/a{{b}}.csv", options=OPTIONS)[0]) == 2
