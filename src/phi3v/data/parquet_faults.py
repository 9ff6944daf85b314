"""What is wrong with a Parquet file: its ends, its footer, or the row group, column and row at which it breaks.

In comes a path, out comes half a sentence, or None. `ends_fault` reads eight bytes and comes before any reader;
`parquet_fault` goes through the whole file and comes after one has failed. Rows and row groups count from 0.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_MARK = b"PAR1"
_READ_AT_ONCE = 1024
_FAILURES = (pa.ArrowException, OSError, ValueError)


def ends_fault(path: Path) -> str | None:
    """What begin and end of a file show: both are the word PAR1."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(_MARK))
        file.seek(max(0, size - len(_MARK)))
        tail = file.read()
    if head != _MARK:
        return f"it is no Parquet file, which begins with PAR1 ({size} bytes): save it again, or name it as what it is"
    return None if tail == _MARK else f"it is cut off behind {size} bytes: copy it again"


def count_records(path: Path) -> int:
    """The rows of a file, by its footer."""
    return int(pq.read_metadata(path).num_rows)


def parquet_fault(path: Path) -> str | None:
    """The first place at which a file does not read.

    Example: a page of the second row group that does not unpack -> "row group 1, column 'title': nothing reads from row
    1000 on (Corrupt snappy compressed data.): copy the file again, or save it without these rows".
    """
    if (found := ends_fault(path)) is not None:
        return found
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if (twice := next((name for place, name in enumerate(names) if name in names[:place]), None)) is not None:
                return f"it names the column {twice[:80]!r} twice: rename one of them"
            return _bad_group(file)
    except _FAILURES as error:
        return f"its footer, which says what is in it, does not read ({_words(error)}): copy it again"


def _bad_group(file: pq.ParquetFile) -> str | None:
    """The first row group of an open file that does not read whole, with column and row."""
    first = 0
    for group in range(file.num_row_groups):
        for column in file.schema_arrow.names:
            found = _good_rows(file, group, column, _READ_AT_ONCE)
            if found[1] is not None:
                good, words = _good_rows(file, group, column, 1)
                place = f"row group {group}, column {column!r}: nothing reads from row {first + good} on"
                return f"{place} ({words or found[1]}): copy the file again, or save it without these rows"
        first += file.metadata.row_group(group).num_rows
    return None


def _good_rows(file: pq.ParquetFile, group: int, column: str, at_once: int) -> tuple[int, str | None]:
    """How many rows of a column read well in steps of `at_once`, texts being UTF-8, and what the next step says."""
    good = 0
    try:
        for batch in file.iter_batches(at_once, row_groups=[group], columns=[column]):
            batch.validate(full=True)
            good += batch.num_rows
    except _FAILURES as error:
        return good, _words(error)
    return good, None


def _words(error: BaseException) -> str:
    """An exception as part of a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
