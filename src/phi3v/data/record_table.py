"""Records of files that are read where they lie: the frame of the tables that are read without `datasets`.

A table of this kind knows in which file a record lies and where; the record itself is read when it is asked for. Going
through all records opens each file once. Knows no format.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO


class RecordTable(ABC):
    """Records by number, those of the first file first.

    Attributes:
        column_names: the columns that records may have.
    """

    column_names: list[str]

    def __init__(self, paths: Sequence[Path]) -> None:
        """Name the files; paths are kept as text, which other processes can be given."""
        self._paths = [str(path) for path in paths]
        self._firsts: list[int] = []  # of each file: the number of its first record

    @abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @property
    def counts(self) -> list[int]:
        """The number of records of each file."""
        return [end - first for first, end in zip(self._firsts, [*self._firsts[1:], len(self)], strict=True)]

    def _file_of(self, number: int) -> int:
        """The place in `_paths` of the file that holds a record."""
        return bisect_right(self._firsts, number) - 1

    @abstractmethod
    def _read(self, number: int, file: BinaryIO) -> dict[str, Any]:
        """A record out of its open file."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        return self._read_all(range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return next(self._read_all([number]))

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Several records, as `datasets` and torch name it."""
        return list(self._read_all(numbers))

    def _read_all(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Records by number; neighbours of one file share its opening."""
        for place, neighbours in groupby(numbers, self._file_of):
            with open(self._paths[place], "rb") as file:
                for number in neighbours:
                    yield self._read(number, file)
