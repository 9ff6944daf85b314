"""What an opened set is: records by number, or as they come, and what is known of where they lie.

Readers of all formats give these; nothing here opens a file or knows a format.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets

from phi3v.data.dates import batches_of
from phi3v.data.not_read import NotRead

_STREAMED_AT_ONCE = 64


class Table(Protocol):
    """Records by number; iterating gives them in order."""

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class StreamTable:
    """Records that can only be gone through; one pass begins at the beginning."""

    def __init__(self, table: datasets.IterableDataset, column_names: list[str] | None = None) -> None:
        """Keep the records; their first one names the columns where neither types nor the caller do."""
        self._table = table
        self.column_names = list(column_names or table.column_names or next(iter(table), {}))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records in order; in batches, because one by one `datasets` divides them among loader workers."""
        for batch in batches_of(self._table, _STREAMED_AT_ONCE):
            yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))

    def __len__(self) -> int:
        """Not known before the end. Raises: TypeError."""
        raise TypeError("a stream has no length")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises: TypeError."""
        raise TypeError("records of a stream have no numbers to ask for")

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Raises: TypeError."""
        raise TypeError("records of a stream have no numbers to ask for")

    def select_columns(self, columns: list[str]) -> "StreamTable":
        """The same records with these columns alone, where the types of all columns are known."""
        return StreamTable(self._table.select_columns(columns), columns) if self._table.features else self

    def rename_columns(self, names: dict[str, str]) -> "StreamTable":
        """The same records with other column names."""
        columns = [names.get(name, name) for name in self.column_names]
        return StreamTable(self._table.rename_columns(names), columns)


@dataclass(frozen=True)
class FilePart:
    """The records of a table that come from one file.

    Attributes:
        name: the file's, for people.
        records: how many they are.
        root: folder that their image paths count from; None for that of the table.
    """

    name: str
    records: int
    root: str | None = None


@dataclass(frozen=True)
class OpenedTable:
    """One split of a set.

    Attributes:
        table: its records, images undecoded.
        root: folder that image paths count from.
        within: folder that they may not leave, where that is not `root`: of a hub set its repository in the cache.
        labels: column -> names of its numbers, for columns of class labels.
        short_floats: columns of floats of 32 or 16 bits: "float32", "float16".
        files: what the records are read from, where these are files of this machine that `datasets` reads.
        parts: the records by file, where there are several files and it is known how many are in each.
        not_read: what else lies there.
        unread: column -> why it is not read, which matters to a recipe that names it.
    """

    table: Table
    root: str
    labels: dict[str, list[str]]
    short_floats: Mapping[str, str]
    files: tuple[Path, ...] = ()
    parts: tuple[FilePart, ...] = ()
    not_read: tuple[NotRead, ...] = ()
    within: str | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
