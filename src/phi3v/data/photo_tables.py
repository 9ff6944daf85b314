"""Photos of folders as tables: those that only lie there, and those that several metadata files name.

In come paths, or tables with the folder that each one's file names count from; out come records by number.
"""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r" *(?:[a-z][a-z0-9+.-]+:/|data:)", re.IGNORECASE)


def photo_column(column: str) -> str:
    """The image column that a column of file names becomes: "file_name" -> "image", "left_file_name" -> "left"."""
    if column.endswith("file_names"):
        return column[: -len("_file_names")] or "images"
    return (column[: -len("_file_name")] or "image") if column.endswith("file_name") else column


class PhotosTable:
    """Photos by their paths, one that is not there too, so that it is a problem of its row.

    Example: cat/z.jpg with the label cat -> {"image": {"bytes": None, "path": ".../cat/z.jpg"}, "label": "cat"}.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[str | None] | None = None) -> None:
        """Keep the paths; `labels`, one for each, are the column `label`."""
        self._paths = [str(path) for path in paths]
        self._labels = labels
        self.column_names = ["image"] if labels is None else ["image", "label"]
        self.column_hint = (
            "what is said of photos is read from a metadata.jsonl or metadata.csv beside them, which names them in its "
            "column file_name"
        )

    def __len__(self) -> int:
        """Number of records."""
        return len(self._paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        image = {"bytes": None, "path": self._paths[number]}
        return {"image": image} if self._labels is None else {"image": image, "label": self._labels[number]}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Several records."""
        return [self[number] for number in numbers]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        return map(self.__getitem__, range(len(self)))


class JoinedTables:
    """Tables of several files or folders as one, with the columns of all; paths of images count from one folder.

    Example: of cat/metadata.csv with the image a.jpg and dog/metadata.csv with b.jpg -> cat/a.jpg, dog/b.jpg.
    """

    def __init__(self, tables: Sequence[Any], folders: Sequence[str], images: Collection[str]) -> None:
        """Join tables.

        Args:
            tables: with records by number, or as they come.
            folders: of each one what its paths count from.
            images: the columns that hold paths.
        """
        self._tables = list(tables)
        self._folders = list(folders)
        self._images = set(images)
        self.column_names = list(dict.fromkeys(name for table in tables for name in table.column_names))

    def __len__(self) -> int:
        """Number of records. Raises: TypeError for records that come as they come."""
        return sum(map(len, self._tables))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Several records, neighbours of one table together."""
        firsts = [0, *accumulate(map(len, self._tables))]
        found: list[dict[str, Any]] = []
        for at, neighbours in groupby(numbers, lambda number: bisect_right(firsts, number) - 1):
            records = self._tables[at].__getitems__([number - firsts[at] for number in neighbours])
            found += [self._placed(record, self._folders[at]) for record in records]
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        for table, folder in zip(self._tables, self._folders, strict=True):
            yield from (self._placed(record, folder) for record in table)

    def _placed(self, record: dict[str, Any], folder: str) -> dict[str, Any]:
        """A record whose paths count from the folder of all."""
        return {name: _placed(cell, folder) if name in self._images else cell for name, cell in record.items()}


def _placed(cell: Any, folder: str) -> Any:
    """A path, or a list of paths, from the folder of all: "a.jpg" -> "cat/a.jpg"; addresses and others stay."""
    if isinstance(cell, list):
        return [_placed(one, folder) for one in cell]
    if isinstance(cell, str) and cell and not _ADDRESS.match(cell):
        return str(Path(folder, cell))
    return cell
