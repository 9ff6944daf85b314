"""Photos of a folder that cannot be listed with the others: links that lead nowhere, names that are no UTF-8.

In come a table of photos and the paths of such files; out comes a table with a record behind the others for each of
them, whose image is a problem of its row.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def is_reached(path: Path) -> bool:
    """Whether a file is there and its name can be written: a dangling link or b"caf\\xe9.jpg" -> False."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return path.is_file()


class PhotosTable:
    """Photos that `datasets` lists, then those that it cannot; their label is the name of their folder.

    Example: 30 photos with labels and the dangling link cat/z.jpg -> record 30 is
    {"image": {"bytes": None, "path": ".../cat/z.jpg"}, "label": "cat"}.
    """

    def __init__(self, table: Any, paths: Sequence[Path]) -> None:
        """Keep both."""
        self._table = table
        self._paths = [str(path) for path in paths]
        self.column_names = list(table.column_names)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._table) + len(self._paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        first = len(self._table)
        return self._table[number] if number < first else self._record(self._paths[number - first])

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Several records."""
        return [self[number] for number in numbers]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        yield from self._table
        yield from map(self._record, self._paths)

    def _record(self, path: str) -> dict[str, Any]:
        cells = {"image": {"bytes": None, "path": path}, "label": Path(path).parent.name}
        return {name: cells[name] for name in self.column_names}
