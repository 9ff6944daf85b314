"""Text files that would kill a parser, or be read as something else, are one line that names file and line."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest

from phi3v.data.columns import RowOptions
from phi3v.data.faults import find_fault
from phi3v.data.sources import Reading, load_data, load_rows
from phi3v.data.text_guard import find_text_fault, is_too_deep
from phi3v.errors import DataError
from phi3v.plain_json import to_json

OPTIONS = RowOptions(images=None, prompt="?", answer="{title}")
LOOSE = Reading(max_skipped=1.0)


pytestmark = pytest.mark.usefixtures("datasets_cache")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        (nested(64), False),
        (nested(65), True),
        ('{"a":' * 65, True),
        (json.dumps(["[" * 99, '"' + "{" * 99, "\\" + '"' + "[" * 99]), False),
        (json.dumps("\\")[:-1] + '"' + "[" * 65, True),
        (f"[{','.join([nested(63)] * 40)}]", False),
        ("]" * 99 + nested(65), True),
        ("[" * 100_000, True),
    ],
)
def test_nesting_is_counted_outside_of_strings(text: str, deep: bool) -> None:
    assert is_too_deep(text) is deep


@pytest.mark.parametrize("depth", [65, 2_000, 200_000])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "talk.jsonl"])
def test_deep_nesting_names_its_line(name: str, folder: bool, depth: int, tmp_path: Path) -> None:
    first = '{"messages": []}' if name == "talk.jsonl" else '{"title": "a"}'
    lines = [first, f'{{"title": {nested(depth)}}}']
    text = f"[{lines[0]},\n{lines[1]}]" if name == "b.json" else "\n".join(lines)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        load_rows(str(tmp_path if folder else tmp_path / name), options=OPTIONS)
    assert str(caught.value) == (
        f"data set {tmp_path / name} cannot be read: line 2 has lists and mappings within each other more than 64 "
        "deep: write it flat, or as text"
    )
    assert find_fault(tmp_path / name) == str(caught.value).partition("read: ")[2]


def test_one_cell_that_nests_is_a_problem_of_its_row(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": json.dumps(talk)}, {"messages": nested(70)}, {"messages": "[" * 100_000}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    data = load_data(str(tmp_path / "a.parquet"), options=RowOptions(), validation_split=None, reading=LOOSE)
    assert [row.answer for row in data.train] == ["b"]
    assert [(problem.row, problem.reason_code, problem.message) for problem in data.problems] == [
        (number, "conversation_type", "column 'messages' nests more than 64 lists and mappings") for number in (1, 2)
    ]


CELLS = ": put quotes around a cell that holds the separator"
EMPTY = ": write an empty cell as nothing between two separators"


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.csv", "image,title\na.jpg,Foo,extra\n", "line 2 has 3 cells, the header has 2" + CELLS),
        ("a.csv", "image,title\n\na.jpg,Foo\nb.jpg\n", "line 4 has 1 cell, the header has 2" + EMPTY),
        ("a.csv", 'a,b\n"x\ny,z",2\n1,2,3\n', "line 4 has 3 cells, the header has 2" + CELLS),
        ("a.tsv", "a\tb\n1,2\t3\n4\t5\t6", "line 3 has 3 cells, the header has 2" + CELLS),
        (
            "a.csv",
            'image,title\na.jpg,Foo\nb.jpg,"Bar\nc.jpg,Baz\n',
            "a quote that is opened in the row of line 3 is never closed: close it, or write it twice",
        ),
        ("a.csv", "title,b,title\n1,2,3\n", "its header names the column 'title' twice: rename one of them"),
        ("a.tsv", 'a\t"t\tu"\t"t\tu"\n1\t2\t3\n', "its header names the column 't\\tu' twice: rename one of them"),
        ("a.csv", "", "it is empty: write a line with the names of the columns, and below it a line for each row"),
        ("a.jsonl", "\n \n", "it is empty: write one JSON object a line"),
    ],
)
def test_lines_that_are_no_rows(name: str, text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        load_rows(str(tmp_path / name), options=RowOptions(images=None, prompt="?", answer="x"))
    assert str(caught.value) == f"data set {tmp_path / name} cannot be read: {fault}"


@pytest.mark.parametrize(
    "text",
    [
        '\ufefftitle,b\r\n"a,1","x ""y"", z"\r\nc,\r\n  \r\n',
        'title,b\n5" pipe,6"\n"","a\n\n,b"\n',
        "title,b\n,\n'a,b'\n",
        'title\n"a,b"\n',
        "title,b\ra,b\rc,d\r",
        " \n\ntitle,,,Title\n1,2,3,4\n",
    ],
)
def test_csv_that_is_fine_is_let_through(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert find_text_fault(tmp_path / "a.csv") is None


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.tar"])
def test_numbers_are_kept_to_the_last_digit_and_refused_where_they_cannot_be(name: str, tmp_path: Path) -> None:
    """Python makes no number of 5,000 digits, and reads 1e400 as infinite."""
    texts = [f'{{"title": {number}}}' for number in ("470", "1" * 5000, "1e400", "5")]
    if name == "a.tar":
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, text in enumerate(texts):
                info = tarfile.TarInfo(f"{number}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    else:
        (tmp_path / name).write_text("\n".join(texts) if name == "a.jsonl" else f"[{','.join(texts)}]")
    options = RowOptions(images=None, prompt="?", answer="{json.title}" if name == "a.tar" else "{title}")
    rows, problems = load_rows(str(tmp_path / name), options=options, reading=LOOSE)
    assert [row.answer for row in rows] == ["470", "1" * 5000, "5"]
    assert [(problem.row, problem.reason_code) for problem in problems] == [(2, "value_type")]


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (slice(0, 300), "a.parquet cannot be read: it is cut off behind 300 bytes: copy it again"),
        (slice(0, 0), r"a.parquet cannot be read: it is no Parquet file, which begins with PAR1 \(0 bytes\): save it"),
    ],
)
def test_damaged_parquet_files_say_what_to_do(cut: slice, words: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"title": f"abcdefgh {n}"} for n in range(50)]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[cut])
    with pytest.raises(DataError, match=words):
        load_rows(str(tmp_path / "a.parquet"), options=OPTIONS)


def test_half_a_character_in_a_path_is_a_problem_of_its_row(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"image": image, "conversations": talk} for image in ("img/\ud83d.jpg", "https://a.example/\ud83d.jpg")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"conversations": talk}])))
    data = load_data(str(tmp_path / "a.jsonl"), options=RowOptions(), validation_split=None, reading=LOOSE)
    assert [row.index for row in data.train] == [2]
    assert [(problem.row, problem.reason_code) for problem in data.problems] == [(0, "image_path"), (1, "image_path")]
    assert data.problems[0].message.startswith("column 'image' holds half a character, a lone surrogate, at place 4")
    "".join(problem.message for problem in data.problems).encode()


def test_json_of_a_run_can_always_be_written() -> None:
    text = to_json({"path": "img/\ud83d.jpg", "title": "Grüße 🙂"})
    assert text == '{"path": "img/\\ud83d.jpg", "title": "Grüße 🙂"}'
    assert json.loads(text.encode()) == {"path": "img/\ud83d.jpg", "title": "Grüße 🙂"}
