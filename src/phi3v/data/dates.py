"""Columns of dates and times, cell by cell: one that no calendar of Python has is a problem of its row, not of the set.

Parquet and Arrow keep a date as a count from 1970, which may lie far behind the year 9999. In come tables of
`datasets`, map-style or streamed; out come records in which such a cell is a `NoDate`. A zone that is not known is an
error, as no cell of its column can be told.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa

from phi3v.data.templates import NoDate

_READ_AT_ONCE = 64


def date_columns(features: Mapping[str, Any] | None) -> dict[str, list[pa.DataType]]:
    """The columns whose type holds dates, times or durations at some depth, and these types.

    Example: {"title": Value("string"), "turns": List({"at": Value("date32")})} -> {"turns": [date32]}.
    """
    found = {name: list(_date_types(feature)) for name, feature in (features or {}).items()}
    return {name: kinds for name, kinds in found.items() if kinds}


def batches_of(table: Any, at_once: int = _READ_AT_ONCE) -> Iterator[dict[str, list[Any]]]:
    """All records of a table of `datasets` in order: column -> cells of at most so many records."""
    if not (dates := date_columns(table.features)):
        yield from table.iter(at_once)
        return
    for batch in table.with_format("arrow").iter(at_once):
        yield _columns(batch, dates)


class DatedTable:
    """A map-style table with dates, read by Arrow.

    Example: the cells 2024-05-01 and 253402300800000 ms, the year 10000 -> date(2024, 5, 1) and NoDate().
    """

    def __init__(self, table: datasets.Dataset) -> None:
        """Keep the table."""
        self._table = table
        self._arrow = table.with_format("arrow")
        self._dates = date_columns(table.features)
        self.column_names = list(table.column_names)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        return {name: cells[0] for name, cells in _columns(self._arrow[number], self._dates).items()}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Several records."""
        return list(_records(_columns(self._arrow[list(numbers)], self._dates)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        for columns in batches_of(self._table):
            yield from _records(columns)

    def select_columns(self, columns: list[str]) -> "DatedTable":
        """The same records with these columns alone."""
        return DatedTable(self._table.select_columns(columns))

    def rename_columns(self, names: dict[str, str]) -> "DatedTable":
        """The same records with other column names."""
        return DatedTable(self._table.rename_columns(names))


def _records(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """{"a": [1, 2], "b": [3, 4]} -> {"a": 1, "b": 3}, {"a": 2, "b": 4}."""
    return (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))


def _columns(batch: pa.Table, dates: Mapping[str, list[pa.DataType]]) -> dict[str, list[Any]]:
    """The cells of a batch by column. Raises: ValueError for a column with a zone that is not known."""
    return {name: _cells(batch.column(name), name, dates.get(name)) for name in batch.column_names}


def _cells(column: pa.ChunkedArray, name: str, kinds: list[pa.DataType] | None) -> list[Any]:
    """The cells of a column; one at a time where not all can be told."""
    try:
        return column.to_pylist()
    except Exception:  # Arrow, pandas and the libraries of zones have their own for each unit
        if kinds is None:
            raise
    for kind in kinds:
        _check_zone(kind, name)
    return [_cell(value) for value in column]


def _cell(value: pa.Scalar) -> Any:
    """One cell."""
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        return NoDate()


def _check_zone(kind: pa.DataType, name: str) -> None:
    """Raises: ValueError when not even 1970 can be told in a type."""
    try:
        pa.scalar(0, kind).as_py()
    except Exception as error:  # as above
        raise ValueError(
            f"column {name!r} is of the type {kind}, and no zone of that name is known here: save it in UTC, or as text"
        ) from error


def _date_types(feature: Any) -> Iterator[pa.DataType]:
    """The types of dates, times and durations that a column's type is made of."""
    if isinstance(feature, datasets.Value):
        if pa.types.is_temporal(feature.pa_type):
            yield feature.pa_type
    elif isinstance(feature, dict | list | tuple):
        for inner in feature.values() if isinstance(feature, dict) else feature:
            yield from _date_types(inner)
    elif hasattr(feature, "feature"):
        yield from _date_types(feature.feature)
