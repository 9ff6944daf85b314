"""Of several data files that are read as one table, the one that does not go with the first.

In come the paths of CSV, TSV or Parquet files, in the order in which they are read, after a failure; out comes one of
them and half a sentence, or None. `datasets` reads all as the first one is: it refuses CSV files that lack one of its
columns, and Parquet files that have a column more or values that cannot become its type; and a Parquet file with a
column of a type that it does not know. What else may be wrong with a file by itself is the business of `faults`.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from phi3v.data.text_guard import header_names

_FAILURES = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)


def find_misfit(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first of some files that cannot be read as the first one is, and why.

    Example: a.csv with the columns image, title and b.csv with image, name -> (b.csv, "its columns are image, name, and
    those of a.csv are image, title: save all with the same"). Numbers as title of a.parquet and lists of them in
    b.parquet -> (b.parquet, "its column 'title' is list<element: int64>, and that of a.parquet is int64: save all with
    the same type"); int32 and int64 go together.
    """
    if paths[0].suffix.lower() not in (".csv", ".tsv"):
        return (_odd_type(paths) or _parquet_misfit(paths)) if paths[0].suffix.lower() == ".parquet" else None
    known = header_names(paths[0])
    for path in paths[1:]:
        if (names := header_names(path)) and set(known) - set(names):
            return path, _other_columns(names, known, paths[0])
    return None


def _odd_type(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first Parquet file with a column of a type that `datasets` has no word for, as a map."""
    for path in paths:
        for field in pq.read_schema(path):
            try:
                datasets.Features.from_arrow_schema(pa.schema([field]))
            except _FAILURES:
                kind = " ".join(str(field.type).split())[:120]
                told = f"its column {field.name[:80]!r} is {kind}, a type that is not read"
                return path, f"{told}: save the file without that column, or its cells as text"
    return None


def _parquet_misfit(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first Parquet file with columns that the first one lacks, or with a column that does not become its type."""
    try:
        first = pq.read_schema(paths[0])
        wanted = datasets.Features.from_arrow_schema(first)
        for path in paths[1:]:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                if set(schema.names) - set(first.names):
                    return path, _other_columns(schema.names, first.names, paths[0])
                for name in schema.names:
                    if not _is_castable(file, name, datasets.Features({name: wanted[name]}).arrow_schema):
                        its, that = (" ".join(str(one.field(name).type).split())[:120] for one in (schema, first))
                        told = f"its column {name[:80]!r} is {its}, and that of {paths[0].name} is {that}"
                        return path, f"{told}: save all with the same type"
    except _FAILURES:  # of a file by itself
        return None
    return None


def _is_castable(file: pq.ParquetFile, column: str, wanted: pa.Schema) -> bool:
    """Whether `datasets` makes of a column what is wanted, by its own cast; some casts depend on the values."""
    if file.schema_arrow.field(column).type == wanted.field(column).type:
        return True
    for batch in file.iter_batches(columns=[column]):
        try:
            table_cast(pa.Table.from_batches([batch]), wanted)
        except _FAILURES:
            return False
    return True


def _other_columns(names: Sequence[str], known: Sequence[str], first: Path) -> str:
    """How the columns of a file differ from those of the first one."""
    its, those = (", ".join(map(_shown, columns)) for columns in (names, known))
    return f"its columns are {its}, and those of {first.name} are {those}: save all with the same"


def _shown(name: str) -> str:
    """A column's name in a list of them, quoted where it would mislead: "title" -> title, " title" -> ' title'."""
    is_plain = name.isprintable() and "," not in name and name == name.strip() != ""
    return (name if is_plain else repr(name))[:80]
