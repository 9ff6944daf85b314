"""Tables of answers as files: Parquet, CSV or JSONL, by the ending of the name, put in place whole.

In come rows as plain values, all with the same columns; out comes one file. Beside it lies a small hidden one that says
what the file was made of, so that the same command again knows it, and no other file is written over. Knows nothing of
models or data sets.

In CSV a cell that a spreadsheet would take for a formula (it begins with =, +, -, @, a tab or a carriage return, and is
no number) gets an apostrophe in front: what a picture or a stranger's row says must not run on the reader's machine.
JSONL and Parquet hold every text as it is.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import file_digest
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError
from phi3v.plain_json import to_json
from phi3v.run_lock import RunLock
from phi3v.whole_files import fill_file, replace_file

TableRow = dict[str, Any]
_AT_ONCE = 1000
"""Rows of a Parquet file's row group."""


def check_out(out: Path) -> None:
    """Refuses a file that cannot be written, is of no kind that is known, or was not made here or was changed since.

    Raises: ConfigError.
    """
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {out}: end its name in .parquet, .csv or .jsonl, which says what is written")
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise ConfigError(f"--out {out} {why}: name a file in a folder that is there")
    if out.exists() and made_of(out) is None:
        raise ConfigError(f"--out {out} is there and is not as phi3v predict left it: name another file, or remove it")


def made_of(out: Path) -> dict[str, Any] | None:
    """What `write_table` noted of a file; None where there is no file, no note, or the file was changed since."""
    try:
        note = json.loads(_note(out).read_text(encoding="utf-8"))
        with open(out, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and note.get("sha256") == digest else None


def journal_of(out: Path) -> Path:
    """Where answers are kept until the file is written: answers.csv -> .answers.csv.phi3v.jsonl."""
    return out.with_name(f".{out.name}.phi3v.jsonl")


def lock_of(out: Path) -> RunLock:
    """What one process at a time holds that answers rows for a file: answers.csv -> .answers.csv.phi3v.lock."""
    return RunLock(out.parent, f".{out.name}.phi3v.lock", doing="written", what=f"--out {out}")


def _note(out: Path) -> Path:
    return out.with_name(f".{out.name}.phi3v.json")


def write_table(out: Path, columns: Mapping[str, type], rows: Iterable[TableRow], made: Mapping[str, Any]) -> None:
    """Writes a table.

    Args:
        out: the file, whose ending says the format.
        columns: name -> int, float, bool, str or list (of texts); a value may also be None.
        rows: the rows.
        made: what it was made of, see `made_of`.
    Raises: ConfigError where the file cannot be written.
    """
    try:
        fill_file(out, lambda path: WRITERS[out.suffix.lower()](path, columns, map(writable, rows)))
        with open(out, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        replace_file(_note(out), to_json({**made, "sha256": digest}) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error


def writable(row: TableRow) -> TableRow:
    """A row whose texts are UTF-8; half a character of a file's name is written as its escape."""
    return {name: _utf8(value) for name, value in row.items()}


def _utf8(value: Any) -> Any:
    if isinstance(value, list):
        return [_utf8(one) for one in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def plain_cell(value: Any) -> Any:
    """A value as CSV holds it: ["a.jpg"] -> '["a.jpg"]', "=1+1" -> "'=1+1", "-3" -> "-3"; None is nothing."""
    if isinstance(value, list):
        return to_json(value)
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _write_csv(path: Path, columns: Mapping[str, type], rows: Iterable[TableRow]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(map(plain_cell, columns))
        table.writerows([plain_cell(row[name]) for name in columns] for row in rows)


def _write_jsonl(path: Path, columns: Mapping[str, type], rows: Iterable[TableRow]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(to_json({name: row[name] for name in columns}) + "\n" for row in rows)


def write_parquet(
    path: Path, columns: Mapping[str, type], rows: Iterable[TableRow], about: Mapping[str, str] | None = None
) -> None:
    """Writes a table, with what its schema's metadata shall say about it: {"phi3v.rows": "9f2c..."}."""
    import pyarrow
    from pyarrow import parquet

    types = {int: pyarrow.int64(), str: pyarrow.string(), list: pyarrow.list_(pyarrow.string())}
    types |= {float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()], metadata=about)
    with parquet.ParquetWriter(path, schema) as file:
        for some in _groups(rows):
            file.write_table(pyarrow.Table.from_pylist(some, schema=schema))


def _groups(rows: Iterable[TableRow]) -> Iterator[Sequence[TableRow]]:
    waiting = iter(rows)
    while some := list(islice(waiting, _AT_ONCE)):
        yield some


WRITERS: dict[str, Callable[[Path, Mapping[str, type], Iterable[TableRow]], None]] = {
    ".parquet": write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
"""Ending -> what writes it."""
