"""Parquet files that are read as one table: the columns of all, and the file whose values do not go with the others.

In come the paths of the files, in the order in which they are read. `datasets` reads all as the first one is: a column
that a file lacks is empty there, one that the first file lacks has to be told (`columns_of`), and the values of a
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


def columns_of(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `datasets` has to be told of the columns of some files, and the columns that are not read, each with why.

    It is told where a file has columns that the first one lacks, and where one is of a type that it has no word for.
    Example: a.parquet with the column title and b.parquet with title and price -> {"features": those of both}, {}; a
    file with title and a map tags -> {"features": that of title, "columns": ["title"]} and {"tags": "its column 'tags'
    is map<...>, a type that is not read: ..."}.
    """
    schemas = [pq.read_schema(path) for path in paths]
    odd = {field.name: told for schema in schemas for field in schema if (told := _odd_type(field)) is not None}
    first, names = schemas[0], set(schemas[0].names)
    if odd:
        kept = pa.schema([field for field in first if field.name not in odd], metadata=first.metadata)
        differ = any(set(schema.names) != names for schema in schemas) or len(names) < len(first)
        if differ or not len(kept):  # the file with such a column is refused
            return {}, {}
        return {"features": datasets.Features.from_arrow_schema(kept), "columns": kept.names}, odd
    if all(set(schema.names) <= names for schema in schemas):
        return {}, {}
    features: dict[str, Any] = {}
    for schema in schemas:
        for name, kind in datasets.Features.from_arrow_schema(schema).items():
            features.setdefault(name, kind)  # the first file's type wins
    return {"features": datasets.Features(features)}, {}


def find_misfit(paths: Sequence[Path]) -> tuple[Path, str] | None:
    """The first of some Parquet files whose values cannot become what the files before it have, and why.

    Example: numbers as title of a.parquet and lists of them in b.parquet -> (b.parquet, "its column 'title' is
    list<element: int64>, and that of a.parquet is int64: save all with the same type"); int32 and int64 go together.
    """
    if paths[0].suffix.lower() != ".parquet":
        return None
    for path in paths:
        if (told := next(filter(None, map(_odd_type, pq.read_schema(path))), None)) is not None:
            return path, told
    return _other_type(paths)


def _odd_type(field: pa.Field) -> str | None:
    """Why a column is not read whose type `datasets` has no word for, as a map; None for any other."""
    try:
        datasets.Features.from_arrow_schema(pa.schema([field]))
    except _FAILURES:
        told = f"its column {field.name[:80]!r} is {_shown(field.type)}, a type that is not read"
        return f"{told}: save the file without that column, or its cells as text"
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
