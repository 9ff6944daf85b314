"""Files that cannot be read: one line that names the line of the file and the way out."""

import gzip
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.data.columns import RowOptions
from phi3v.data.faults import find_fault
from phi3v.data.opening import open_set
from phi3v.data.schema import RowProblem
from phi3v.data.sources import load_rows, stream_data
from phi3v.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"a,b\n1,2\n1,2,3,4\n", "line 3 has 4 cells, the header has 2: put quotes around a cell"),
        ("a.csv", b"", "it is empty: write a line with the names of the columns"),
        ("a.csv", b"a\n\xff\xfe\n", "line 2 is not UTF-8 text: save it as UTF-8"),
        (
            "a.csv",
            b"a,b\n",
            "a.csv cannot be read: it has no rows: write at least one line under the names of the columns",
        ),
        ("a.jsonl", b'{"a": 1}\n\n{"a":\n', "line 3 is not JSON .*: write one JSON object a line"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 holds a list: write one JSON object a line"),
        ("a.jsonl", b'{"a": "\xe9"}\n', "line 1 is not UTF-8 text: save it as UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a":}]', "line 2 is not JSON .*: write a list of objects"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}] rest', r"line 2 is not JSON \(Extra data, column 1\): write a list of obj"),
        ("a.json", b'[{"a": 1}] ]', r"line 1 is not JSON \(Extra data, column 12\)"),
        ("a.json", b'{"a": 1}\n{"a":\n', "line 2 is not JSON .*: write one JSON object a line"),
        ("a.jsonl", b"\n", "a.jsonl cannot be read: it is empty: write one JSON object a line"),
        ("a.json", b"[]", "a.json cannot be read: it has no rows"),
        ("a.json", b'{\n"a": [{"a": 1}]\n}', "it holds a mapping: write a list of objects, or one JSON object a line"),
        ("a.parquet", b"xx", "cannot be read"),
        ("a.xlsx", b"xx", "ends in none of .csv, .tsv, .json"),
    ],
)
def test_broken_files_are_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_rows(str(tmp_path / name), options=RowOptions(images=None, prompt="?", answer="{a}"))
    assert name in str(caught.value) and "\n" not in str(caught.value) and "error occurred" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("named", ["", "*.csv", "metadata.csv"])
@pytest.mark.parametrize("bad", [0, 1])
def test_text_that_is_no_utf_8_is_named_by_file_and_line_in_a_set_of_several(
    bad: int, named: str, streaming: bool, tmp_path: Path
) -> None:
    """A folder, a pattern, and folders of photos; the first file, whose header is read by itself, and the second."""
    names = ["a/metadata.csv", "b/metadata.csv"] if named == "metadata.csv" else ["a.csv", "b.csv"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"file_name,title\n1.jpg," + (b"caf\xe9\n" if number == bad else b"scarf\n"))
    with pytest.raises(DataError) as caught:
        open_set(str(tmp_path / named if named == "*.csv" else tmp_path), streaming=streaming)
    line = f"data set {tmp_path / names[bad]} cannot be read: line 2 is not UTF-8 text: save it as UTF-8"
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2.5}\n{"a": null}\n', None),
        ("a.jsonl", '\ufeff{"a": "x\u2028y"}\r\n\n{"b": [1]}\n', None),
        ("a.jsonl", '{"a": null}\n{"a": 1}\n{"a": "x"}\n', None),
        ("a.json", '[\n{"a": 1},\n{"a": "x"}\n]', None),
        ("a.json", '[{"a": 1}]', None),
        ("a.json", '{"a": 1}\n{"a": true}\n["b"]\n', "line 3 holds a list: write one JSON object a line"),
        ("a.csv", "a,b\n1\n", "line 2 has 1 cell, the header has 2: write an empty cell as nothing between two"),
        ("a.csv", "a,b\n1,\n", None),
        ("a.bin", "", None),
    ],
)
def test_faults_are_found_where_they_are(name: str, content: str, fault: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    found = find_fault(tmp_path / name)
    assert found == fault if fault is None else found is not None and found.startswith(fault)


def zipped(data: bytes) -> bytes:
    """A ZIP archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.csv", data)
    return buffer.getvalue()


TEXT = b"a,b\n1,2\n"
BINARIES = {
    "zip": (zipped(TEXT), "it is a ZIP archive, as new Excel workbooks are, and no text, whatever its name says"),
    "gzip": (gzip.compress(TEXT), "it is a file compressed with gzip, and no text"),
    "utf-16": (TEXT.decode().encode("utf-16"), "it is UTF-16 text: save it as UTF-8"),
    "parquet": (b"PAR1....PAR1", "it is a Parquet file, and no text"),
    "png": (b"\x89PNG\r\n\x1a\n", "it is an image, and no text"),
    "zeros": (TEXT + bytes(100), "it is no text: byte 8 is zero; save the rows as UTF-8 text"),
}


@pytest.mark.parametrize("kind", BINARIES)
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
def test_what_is_no_text_is_one_line_and_no_reader_sees_it(
    ending: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` would unpack an archive before it looks at what is in it."""
    content, words = BINARIES[kind]
    (tmp_path / f"a.{ending}").write_bytes(content)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("a reader sees it"))
    with pytest.raises(DataError) as caught:
        load_rows(str(tmp_path / f"a.{ending}"), options=TITLES)
    assert str(caught.value).startswith(f"data set {tmp_path / f'a.{ending}'} cannot be read: {words}")
    assert "\n" not in str(caught.value)


def test_an_archive_named_parquet_is_seen_by_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(zipped(TEXT))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("a reader sees it"))
    with pytest.raises(DataError, match=r"a.parquet cannot be read: it is no Parquet file, which begins with PAR1"):
        load_rows(str(tmp_path), options=TITLES)


TITLES = RowOptions(images=None, prompt="?", answer="{title}")


def titles(path: Path, rows: int = 300, bad_text: int | None = None) -> Path:
    """A Parquet file with row groups of 100; the title of one row may be no UTF-8."""
    words = [b"\xff\xfe" if number == bad_text else f"scarf {number}".encode() for number in range(rows)]
    column = pa.array(words, pa.binary()).view(pa.string())
    table = pa.table({"number": pa.array(range(rows)), "title": column})
    pq.write_table(table, path, row_group_size=100, compression="snappy", use_dictionary=False)
    return path


def break_group(path: Path, group: int) -> None:
    """Writes over the second half of a row group's titles."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(1)
    data, half = bytearray(path.read_bytes()), chunk.total_compressed_size // 2
    place = chunk.data_page_offset + half
    data[place : place + half] = b"\xff" * half
    path.write_bytes(bytes(data))


def test_a_broken_page_of_a_parquet_file_is_named_by_file_row_group_and_column(tmp_path: Path) -> None:
    titles(tmp_path / "train-0.parquet")
    break_group(titles(tmp_path / "train-1.parquet"), 1)
    line = (
        r"train-1.parquet cannot be read: row group 1, column 'title': nothing reads from row 100 on \(.+\): copy the"
    )
    with pytest.raises(DataError, match=line):
        load_rows(str(tmp_path), options=TITLES)
    rows = stream_data(str(tmp_path), options=TITLES, validation_split=None).train.rows(ignore, shuffled=False)
    with pytest.raises(DataError, match=line):
        for _ in range(600):
            next(rows)


def ignore(problem: RowProblem) -> None:
    """Nobody is told."""


def test_a_row_of_a_parquet_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    titles(tmp_path / "a.parquet", bad_text=234)
    with pytest.raises(DataError, match=r"a.parquet cannot be read: row group 2, column 'title': .* from row 234 on"):
        load_rows(str(tmp_path / "a.parquet"), options=TITLES)
    assert find_fault(titles(tmp_path / "b.parquet")) is None


def test_a_parquet_file_with_other_columns_is_named(tmp_path: Path) -> None:
    titles(tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "train-1.parquet")  # what is not there is empty
    pq.write_table(pa.table({"number": [1], "name": ["x"]}), tmp_path / "train-2.parquet")
    with pytest.raises(
        DataError, match=r"train-2.parquet cannot be read: its columns are number, name, and those of t"
    ):
        load_rows(str(tmp_path), options=TITLES)


@pytest.mark.parametrize(
    ("named", "header", "told"),
    [("", "number", "number"), ("*.csv", "Title,number", "Title, number"), ("", 'number," title"', "number, ' title'")],
)
def test_a_csv_file_without_a_column_of_the_first_is_named(header: str, told: str, named: str, tmp_path: Path) -> None:
    names = ["a.csv", "b.csv", "c.csv", "d.csv"]
    headers = ["number,title", "title,number", "title,more,number", header]  # in another order, or more: fine
    for name, names_of_columns in zip(names, headers, strict=True):
        cells = ",".join("1" * len(names_of_columns.split(",")))
        (tmp_path / name).write_text(f"{names_of_columns}\n{cells}\n")
    source = str(tmp_path / named if named else tmp_path)
    line = f"data set {tmp_path / 'd.csv'} cannot be read: its columns are {told}, and those of a.csv are number, title"
    for caught in (refused(source), refused_in_a_stream(source)):
        assert caught == f"{line}: save all with the same"
    (tmp_path / "d.csv").unlink()
    assert len(load_rows(source, options=TITLES)[0]) == 3


@pytest.mark.parametrize(
    ("other", "kind"),
    [([{"z": 1}], "struct<z: int64>"), (["x"], "string"), ([7] * 1000 + [2.5], "double")],
)
def test_a_parquet_file_with_a_column_of_another_type_is_named(other: list[Any], kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": [470], "more": ["a"]}), tmp_path / "a.parquet")
    for name, fine in (("b", pa.array([1], pa.int32())), ("c", ["7"])):  # these become numbers, in another order too
        pq.write_table(pa.table({"more": ["b"], "title": fine}), tmp_path / f"{name}.parquet")
    assert [row.messages[-1].text for row in load_rows(str(tmp_path), options=TITLES)[0]] == ["470", "1", "7"]
    pq.write_table(pa.table({"title": other, "more": ["d"] * len(other)}), tmp_path / "d.parquet", row_group_size=100)
    line = f"its column 'title' is {kind}, and that of a.parquet is int64: save all with the same type"
    for caught in (refused(str(tmp_path)), refused_in_a_stream(str(tmp_path))):
        assert caught == f"data set {tmp_path / 'd.parquet'} cannot be read: {line}"


def refused(source: str) -> str:
    """What is said of a set."""
    with pytest.raises(DataError) as caught:
        load_rows(source, options=TITLES)
    return str(caught.value)


def refused_in_a_stream(source: str) -> str:
    """What is said of a set when it is gone through."""
    rows = stream_data(source, options=TITLES, validation_split=None).train.rows(ignore, shuffled=False)
    with pytest.raises(DataError) as caught:
        for _ in range(1000):
            next(rows)
    return str(caught.value)


@pytest.mark.parametrize("offset", [2**31 - 100, 9 * 50 + 500])
def test_a_saved_set_with_a_text_behind_the_end_of_its_file_is_named(offset: int, tmp_path: Path) -> None:
    """The first would end the process, the second reads what lies behind the texts as text."""
    datasets.Dataset.from_dict({"title": [f"scarf {n:03}" for n in range(50)]}).save_to_disk(tmp_path / "set")
    assert len(load_rows(str(tmp_path / "set"), options=TITLES)[0]) == 50
    file = tmp_path / "set" / "data-00000-of-00001.arrow"
    data = bytearray(file.read_bytes())
    struct.pack_into("<i", data, data.index(struct.pack("<3i", 0, 9, 18)) + 4 * 50, offset)
    file.write_bytes(data)
    line = r"00001.arrow cannot be read: column 'title', rows 0 to 49: .*: copy the folder again, or save the set again"
    with pytest.raises(DataError, match=line) as caught:
        open_set(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"00001.arrow cannot be read: nothing reads from row 0 on \(.*\): copy the fold"
    ):
        open_set(str(tmp_path / "set"))
