"""Text files looked through before a parser sees them: JSON that nests without end, CSV lines that are no rows.

A parser may die of 200,000 brackets, pandas takes a first cell too many for an index, and `datasets` unpacks an archive
whatever its name says. In comes the path of a CSV, TSV, JSON or JSONL file, or a text; out comes half a sentence about
the first fault, or None. Goes through the file line by line. Lines count from 1, as editors count them.
"""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

MAX_DEPTH = 64
"""Lists and mappings within each other; a conversation with image parts has 5."""

_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
_QUOTED_END = re.compile(r'(?:[^"]++|"")*+"')
_TOO_DEEP = f"lists and mappings within each other more than {MAX_DEPTH} deep: write it flat, or as text"


_BINARY = (
    (b"PK\x03\x04", "a ZIP archive, as new Excel workbooks are"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file"),
    (b"\x1f\x8b", "a file compressed with gzip"),
    (b"BZh91AY&SY", "a file compressed with bzip2"),
    (b"\xfd7zXZ\0", "a file compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF"),
    (b"\xff\xd8\xff", "an image"),
    (b"\x89PNG\r\n", "an image"),
)
"""How files begin that are no text, and what they are."""
_BEGINNING = 16  # bytes that tell what a file is
_AT_ONCE = 1 << 20  # bytes

_CLOSE = "close it, or write it twice"
EMPTY_CSV = "it is empty: write a line with the names of the columns, and below it a line for each row"


def is_too_deep(text: str) -> bool:
    """Whether a JSON text nests deeper than `MAX_DEPTH`: "[" * 65 -> True; brackets inside its strings do not count."""
    return _deepest(text.encode("utf-8", "replace"), 0)[1] > MAX_DEPTH


def find_text_fault(path: Path) -> str | None:
    """What keeps a file from its parser.

    Example: a ZIP archive named rows.csv -> "it is a ZIP archive, as new Excel workbooks are, and no text: ..."; a CSV
    file with the lines `image,title` and `a.jpg,Foo,extra` -> "line 2 has 3 cells, the header has 2: put
    quotes around a cell that holds the separator".
    """
    ending = path.suffix.lower()
    if ending not in (".json", ".jsonl", ".csv", ".tsv"):
        return None
    if (found := _binary_fault(path)) is not None:
        return found
    if ending in (".json", ".jsonl"):
        return _json_fault(path, by_line=ending == ".jsonl")
    return _cells_fault(path, "\t" if ending == ".tsv" else ",")


def encoding_fault(path: Path) -> str | None:
    """The first line that is no UTF-8: `a,b`, `caf\\xe9,2` -> "line 2 is not UTF-8 text: save it as UTF-8"."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8 text: save it as UTF-8"
    return None


def count_rows(path: Path) -> int:
    """The rows of a CSV or TSV file without faults, its header not counted: `a,b`, `1,2`, `3,4` -> 2."""
    return sum(1 for _ in _rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")) - 1


def header_names(path: Path) -> list[str]:
    """The names of the columns of a CSV or TSV file: `a,"b c",` -> ["a", "b c", ""]; none where there is no header."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file, suppress(csv.Error):
        lines = csv.reader(file, delimiter=separator)
        return next((cells for cells in lines if len(cells) > 1 or any(map(str.strip, cells))), [])
    return []


def binary_kind(path: Path) -> str | None:
    """What a file is by its first bytes, where they tell: b"\\x1f\\x8b..." -> "a file compressed with gzip"."""
    with open(path, "rb") as file:
        return _kind_of(file.read(_BEGINNING))


def _kind_of(start: bytes) -> str | None:
    """The kind of file that begins with these bytes."""
    return next((kind for mark, kind in _BINARY if start.startswith(mark)), None)


def _binary_fault(path: Path) -> str | None:
    """What a file is that begins as no text of UTF-8 does, or holds what none does."""
    with open(path, "rb") as file:
        start = file.read(_BEGINNING)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16 text: save it as UTF-8"
    if (kind := _kind_of(start)) is not None:
        return f"it is {kind}, and no text, whatever its name says: save the rows as UTF-8 text"
    return _zero_fault(path)


def _zero_fault(path: Path) -> str | None:
    """The line of the first zero byte, which the readers of CSV pass over without a word; None where there is none."""
    line = 1
    with open(path, "rb") as file:
        while chunk := file.read(_AT_ONCE):
            if (place := chunk.find(0)) >= 0:
                line += chunk.count(b"\n", 0, place)
                return f"line {line} holds a zero byte (NUL), and no text does: take it out, or save it as UTF-8 text"
            line += chunk.count(b"\n")
    return None


def _json_fault(path: Path, *, by_line: bool) -> str | None:
    """The line that nests too deeply; with `by_line` each line begins anew."""
    depth, empty = 0, True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            empty = empty and not line.strip(b" \t\r\n\xef\xbb\xbf")
            if by_line and line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
                continue
            depth, most = _deepest(line, 0 if by_line else depth)
            if most > MAX_DEPTH:
                return f"line {number} has {_TOO_DEEP}"
    return "it is empty: write one JSON object a line" if empty else None


def _deepest(text: bytes, depth: int) -> tuple[int, int]:
    """The depth behind a text that begins at `depth`, and the largest within it: b'[{"a": "[["}, [' -> (2, 2).

    A string ends with its text, since none goes over the end of a line.
    """
    if b'"' in text:
        text = b"".join(text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    most = depth
    for bracket in text.translate(None, _OTHERS):
        depth = depth + 1 if bracket in b"[{" else max(0, depth - 1)
        if depth > most:
            most = depth
            if most > MAX_DEPTH:
                break
    return depth, most


def _cells_fault(path: Path, separator: str) -> str | None:
    """The first row that has more or fewer cells than the header, or a quote that is never closed."""
    header = 0
    try:
        for number, cells in _rows(path, separator):
            if cells < 0:
                return f"a quote that is opened in the row of line {number} is never closed: {_CLOSE}"
            header = header or cells
            if cells > header:
                way_out = _way_out_of_more(path, number, separator)
            elif cells < header:
                way_out = "write an empty cell as nothing between two separators"
            else:
                continue
            return f"line {number} has {cells} cell{'s' * (cells != 1)}, the header has {header}: {way_out}"
    except UnicodeDecodeError:
        return encoding_fault(path)
    return _name_fault(path) if header else EMPTY_CSV


def _way_out_of_more(path: Path, number: int, separator: str) -> str:
    """What to do about the row of a line with more cells than the header."""
    if (told := other_separator(header_names(path))) is not None:
        return told
    with open(path, encoding="utf-8-sig") as file:
        line = next(islice(file, number - 1, None), "")
    if re.search(f'{separator} +"', line):
        return "take away the blank in front of the quotes, which are part of the text behind it"
    return "put quotes around a cell that holds the separator"


def other_separator(columns: list[str]) -> str | None:
    """What to do about a file with one column whose name holds the names of several: "image;title" -> "its cells ...".

    None for other columns.
    """
    found = next((sign for sign in ";\t|" if len(columns) == 1 and sign in columns[0]), None)
    shown = {"\t": "tabs"}.get(found or "", found)
    told = f"its cells stand between {shown}, not commas: save it with commas, or with tabs and named .tsv"
    return None if found is None else told


def _name_fault(path: Path) -> str | None:
    """The column whose name stands twice in the header of a file whose quotes are closed."""
    names = header_names(path)
    twice = next((name for place, name in enumerate(names) if name.strip() and name in names[:place]), None)
    return None if twice is None else f"its header names the column {twice[:80]!r} twice: rename one of them"


def _rows(path: Path, separator: str) -> Iterator[tuple[int, int]]:
    """Line and number of cells of each row; -1 cells where the file ends within quotes. Empty lines are passed over.

    Example: `a,b`, `1,"x`, `y,z"` -> (1, 2), (2, 2): a row may be several lines long.
    """
    field = re.compile(f'"(?:[^"]++|"")*+("?)[^{separator}\n]*+|[^{separator}\n]*+')
    begin, cells, open_quote = 0, 0, False
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            place = 0
            if open_quote:
                end = _QUOTED_END.match(line)
                if end is None:
                    continue
                place = line.find(separator, end.end())
                if place < 0:
                    open_quote = False
                    yield begin, cells + 1
                    continue
                place, cells, open_quote = place + 1, cells + 1, False
            elif not line.strip(" \r\n" if separator == "\t" else " \t\r\n"):
                continue
            else:
                begin, cells = number, 0
            if '"' not in line[place:]:
                yield begin, cells + line.count(separator, place) + 1
                continue
            while True:
                found = field.match(line, place)
                assert found is not None  # it matches nothing, too
                if found[1] == "":
                    open_quote = True
                    break
                cells += 1
                place = found.end() + 1
                if line[found.end() : place] != separator:
                    yield begin, cells
                    break
    if open_quote:
        yield begin, -1
