"""Files that cannot be read: one line that names the line of the file and the way out."""

from pathlib import Path

import pytest

from phi3v.data.columns import RowOptions
from phi3v.data.faults import find_fault
from phi3v.data.sources import load_rows
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
