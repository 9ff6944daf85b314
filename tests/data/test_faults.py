"""Files that cannot be read: one line that names the line of the file and the way out."""

import gzip
import io
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from product_sets import write

from phi3v.data.columns import RowOptions
from phi3v.data.faults import find_fault
from phi3v.data.not_read import NotRead
from phi3v.data.opening import open_set
from phi3v.data.schema import RowProblem
from phi3v.data.sources import Reading, load_data, load_rows, stream_data
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
        ("a.jsonl", b'[{"a": 1}]\n', "line 1 holds a list: write one JSON object a line, or name the file .json$"),
        ("a.jsonl", b'{"a": "\xe9"}\n', "line 1 is not UTF-8 text: save it as UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a":}]', "line 2 is not JSON .*: write a list of objects"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}] rest', r"line 2 is not JSON \(Extra data, column 1\): write a list of obj"),
        (
            "a.json",
            b'[{"a": 1}, {"b": {"c": 1, "c": 1}}]',
            "record 1: an object names the key 'c' twice: take one out$",
        ),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 1, "b": 2, "a": 3}\n', "read: record 1: an object names the key 'a' twice"),
        ("a.json", b'[{"a": 1}] ]', r"line 1 is not JSON \(Extra data, column 12\)"),
        ("a.json", b'[{"a": 1},\n]', "a.json cannot be read: line [12] is not JSON .*: write a list of objects"),
        ("a.json", b'{"a": 1}\n{"a":\n', "line 2 is not JSON .*: write one JSON object a line"),
        ("a.jsonl", b"\n", "a.jsonl cannot be read: it is empty: write one JSON object a line"),
        ("a.json", b"[]", "a.json cannot be read: it has no rows"),
        ("a.json", b'{\n"a": [{"a": 1}]\n}', "it holds a mapping: write a list of objects, or one JSON object a line"),
        (
            "a.json",
            b'{"a": {"0": 1, "1": 2}, "b": {"0": 3, "1": 4}}',
            r"a whole table .*: write rows, in pandas df.to_json",
        ),
        (
            "a.json",
            b'{\n"0": {"a": 1}, "7": {"a": 2}\n}',
            "it holds a whole table as one object: write rows, in pandas",
        ),
        ("a.json", b'{"a": {"x1": 1, "x2": 2}, "b": {"x1": 3, "x2": 4}}', "it holds a whole table as one object"),
        ("a.jsonl", b'{"columns": ["a"], "index": [0], "data": [[1]]}', "it holds a whole table as one object: write"),
        ("a.parquet", b"xx", "cannot be read"),
        ("a.xlsx", b"xx", r"ends in none of .csv, .tsv, .json.*; export its rows as CSV \(UTF-8\), and name that file"),
        ("a.csv.gz", b"xx", "ends in none of .*; unpack it, and name the file or folder in it"),
        (
            "a.tar",
            gzip.compress(bytes(1024), mtime=0),
            "a.tar cannot be read: it is a file compressed with gzip, and no tar: unp",
        ),
        ("a.tar", bytes(1024), "a.tar cannot be read: it has no rows"),
        (
            "a.csv",
            b"image;title\n0.png;x\n",
            "its columns are image;title; its cells stand between ;, not commas: save",
        ),
        ("a.csv", b"image;a\n0.png;x, y\n", "line 2 has 2 cells, the header has 1: its cells stand between ;, not c"),
        ("a.csv", b"image\ta\n0.png\tx\n", "its cells stand between tabs, not commas: .* with tabs and named .tsv"),
        ("a.csv", b'b,a,c\n0.png, "x, y",3\n', "line 2 has 4 cells, the header has 3: take away the blank in front of"),
    ],
)
def test_broken_files_are_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_rows(str(tmp_path / name), options=RowOptions(images=None, prompt="?", answer="{a}"))
    assert name in str(caught.value) and "\n" not in str(caught.value) and "error occurred" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["s3://shop/a.csv", "https://shop.example/a.parquet?key=s3cret", "hf://datasets/a/b"]
)
def test_an_address_is_no_data_set(source: str) -> None:
    line = (
        r"data set \w+://[^ ?]*(\?\.\.\.)? is an address, and rows are read from this machine or the hub: download it"
    )
    with pytest.raises(DataError, match=line):
        open_set(source)


def test_a_folder_of_packed_files_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").touch()
    with pytest.raises(DataError, match="doesn't contain any data files .*; of photos.zip: unpack it, and name the fi"):
        open_set(str(tmp_path))


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
    "gzip": (gzip.compress(TEXT, mtime=0), "it is a file compressed with gzip, and no text"),
    "utf-16": (TEXT.decode().encode("utf-16"), "it is UTF-16 text: save it as UTF-8"),
    "parquet": (b"PAR1....PAR1", "it is a Parquet file, and no text"),
    "png": (b"\x89PNG\r\n\x1a\n", "it is an image, and no text"),
    "zeros": (
        TEXT + bytes(100),
        "line 3 holds a zero byte (NUL), and no text does: take it out, or save it as UTF-8",
    ),
    "a zero far behind": (
        TEXT + b"1,2\n" * 300_000 + b"3,\x004\n",
        "line 300003 holds a zero byte (NUL), and no text does",
    ),
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


@pytest.mark.parametrize("named", ["", "*"])
@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_files_with_other_columns_are_read_with_the_columns_of_all(ending: str, named: str, tmp_path: Path) -> None:
    """A column that a file lacks is empty there, and so a problem of its rows where it is used."""
    files = [{"n": "1", "title": "a"}, {"title": "b", "n": "2"}, {"title": "c", "more": "3"}, {"other": "4"}]
    for number, record in enumerate(files):
        write(tmp_path, f"{number}.{ending}", [record])
    if ending == "csv":
        (tmp_path / "4.csv").write_text("n,last\n")  # no rows
    source = str(tmp_path / f"{named}.{ending}" if named else tmp_path)
    data = load_data(source, options=TITLES, validation_split=None, reading=Reading(max_skipped=1.0))
    assert [(Path(row.source).name[0], row.answer) for row in data.train] == [("0", "a"), ("1", "b"), ("2", "c")]
    problem = RowProblem(0, "missing_value", "column 'title' is empty", str(tmp_path / f"3.{ending}"))
    assert data.problems == [problem]
    more = replace(TITLES, answer="{more}")
    for options, found in ((TITLES, ["a", "b", "c"]), (more, ["3"])):
        problems: list[RowProblem] = []
        stream = stream_data(source, options=options, validation_split=None, reading=Reading(max_skipped=1.0)).train
        passed = stream.rows(problems.append, shuffled=False)
        assert [next(passed).answer for _ in found] == found and len(problems) == (0 if options is TITLES else 2)


def test_a_column_without_a_name_is_not_read_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",title, ,Unnamed: 0\n0,a,x,y\n1.5,b,,z\n")
    options = replace(TITLES, answer="{title} {Unnamed: 0}")
    data = load_data(str(tmp_path / "a.csv"), options=options, validation_split=None)
    assert [row.answer for row in data.train] == ["a y", "b z"]
    told = [NotRead(f"{tmp_path}/a.csv, column {place}", "a column without a name") for place in (1, 3)]
    assert data.not_read == told == list(load_data(str(tmp_path), options=options).not_read)
    with pytest.raises(DataError, match=r"its columns are title, Unnamed: 0 \("):
        load_rows(str(tmp_path / "a.csv"), options=replace(TITLES, answer="{Unnamed: 2}"))
    (tmp_path / "b.csv").write_text("\n, \n1,2\n")
    with pytest.raises(
        DataError, match=r"b.csv cannot be read: none of its columns has a name: write names into the first line$"
    ):
        load_rows(str(tmp_path / "b.csv"), options=TITLES)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_parquet_file_is_passed_over_where_others_have_rows(streaming: bool, tmp_path: Path) -> None:
    schema = pa.schema([("title", pa.string())])
    for name, cells in (("a", []), ("b", ["x"]), ("c", [])):
        pq.write_table(pa.table({"title": cells}, schema=schema), tmp_path / f"{name}.parquet")
    opened = open_set(str(tmp_path), streaming=streaming)["train"]
    assert [record["title"] for record in opened.table] == ["x"]
    assert [(Path(one.file).name, one.reason) for one in opened.not_read] == [
        ("a.parquet", "it has no rows"),
        ("c.parquet", "it has no rows"),
    ]
    with pytest.raises(DataError, match="a.parquet cannot be read: it has no rows"):
        open_set(str(tmp_path / "[ac].parquet"), streaming=streaming)


def test_a_parquet_file_with_an_odd_column_is_one_line_that_names_it(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["title", "title"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    line = "it names the column 'title' twice: rename one of them"
    assert refused(str(tmp_path / "twice.parquet")).endswith(f"twice.parquet cannot be read: {line}")
    tags = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    (tmp_path / "maps").mkdir()
    pq.write_table(pa.table({"title": ["x"], "tags": tags}), tmp_path / "maps" / "a.parquet")
    pq.write_table(pa.table({"tags": tags, "title": ["y"]}), tmp_path / "maps" / "b.parquet")
    line = "its column 'tags' is map<string, int64"
    tagged = replace(TITLES, answer="{title} {tags}")
    for streaming in (False, True):
        opened = open_set(str(tmp_path / "maps"), streaming=streaming)["train"]
        assert [record["title"] for record in opened.table] == ["x", "y"]
        assert opened.not_read[0].file.endswith("a.parquet") and opened.not_read[0].reason.startswith(line)
    with pytest.raises(DataError, match=f"maps cannot be read: {line}"):
        load_rows(str(tmp_path / "maps"), options=tagged)
    pq.write_table(pa.table({"title": ["y"]}), tmp_path / "maps" / "b.parquet")
    assert f"a.parquet cannot be read: {line}" in refused(str(tmp_path / "maps"))


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
