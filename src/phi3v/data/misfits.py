"""Parquet files that are read as one table: the columns of all, and the file whose values do not go with the others.

In come the paths of the files, in the order in which they are read. `datasets` reads all as the first one is: a column
that a file lacks is empty there, one that the first file lacks has to be told (`all_columns`), and the values of a
column have to become the type of the first file that has it; the file where they cannot is looked for after a failure
(`find_misfit`). What else may be wrong with a file by itself is the business of `faults`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

_FAILURES = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)


def all_columns(paths: Sequence[Path]) -> dict[str, Any]:
    """What `datasets` has to be told where a file has columns that the first one lacks; nothing where none has.

    Example: a.parquet with the column title and b.parquet with title and price -> {"features": those of both}.
    """
    schemas = [pq.read_schema(path) for path in paths]
    if all(set(schema.names) <= set(schemas[0].names) for schema in schemas):
        return {}
    kinds: dict[str, Any] = {}
    for schema in schemas:
        for name, kind in datasets.Features.from_arrow_schema(schema).items():
            kinds.setdefault(name, kind)  # the first file's type wins
    return {"features": datasets.Features(kinds)}


def find_misfit(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first of some Parquet files whose values cannot become what the files before it have, and why.

    Example: numbers as title of a.parquet and lists of them in b.parquet -> (b.parquet, "its column 'title' is
    list<element: int64>, and that of a.parquet is int64: save all with the same type"); int32 and int64 go together.
    """
    if paths[0].suffix.lower() != ".parquet":
        return None
    return _odd_type(paths) or _other_type(paths)


def _odd_type(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first Parquet file with a column of a type that `datasets` has no word for, as a map."""
    for path in paths:
        for field in pq.read_schema(path):
            try:
                datasets.Features.from_arrow_schema(pa.schema([field]))
            except _FAILURES:
                told = f"its column {field.name[:80]!r} is {_shown(field.type)}, a type that is not read"
                return path, f"{told}: save the file without that column, or its cells as text"
    return None


def _other_type(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first Parquet file with a column whose values do not become the type of the files before it."""
    known: dict[str, tuple[Path, pa.DataType, Any]] = {}
    try:
        for path in paths:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                kinds = datasets.Features.from_arrow_schema(schema)
                for name in schema.names:
                    its = schema.field(name).type
                    first, that, kind = known.setdefault(name, (path, its, kinds[name]))
                    if first != path and not _is_castable(file, name, datasets.Features({name: kind}).arrow_schema):
                        told = f"its column {name[:80]!r} is {_shown(its)}, and that of {first.name} is {_shown(that)}"
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


def _shown(kind: pa.DataType) -> str:
    """A type on one line."""
    return " ".join(str(kind).split())[:120]
