"""A JSON or JSONL file of conversations as a table: records of any shape, parsed when they are asked for.

Arrow wants one type a column, and files of conversations do not have it: `image` is a text here and a list there, ids
are numbers and texts. In comes a path; out come records by number, of which 16 bytes each stay in memory. Records count
from 0.
"""

import json
from array import array
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from phi3v.data.faults import find_fault
from phi3v.errors import DataError

_RECORDS_FOR_COLUMNS = 100
_BEGINNING = 4096
_MARK = b"\xef\xbb\xbf"


class JsonTable:
    """The records of one file."""

    def __init__(self, path: Path) -> None:
        """Finds where the records begin. Raises: DataError in one line that names file and line."""
        self._path = str(path)
        self._starts = array("Q")
        self._ends = array("Q")
        try:
            self._find(path)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data set {path} cannot be read: {find_fault(path) or error}") from error
        self._renamed: dict[str, str] = {}
        names = {name: None for number in range(min(len(self), _RECORDS_FOR_COLUMNS)) for name in self[number]}
        self.column_names = list(names)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in the order of the file."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        with open(self._path, "rb") as file:
            file.seek(self._starts[number])
            record = json.loads(file.read(self._ends[number] - self._starts[number]))
        return {self._renamed.get(name, name): value for name, value in record.items()}

    def rename_columns(self, names: dict[str, str]) -> "JsonTable":
        """The same records with other column names, as `datasets` has it: {"file_name": "image"}."""
        table = copy(self)
        table._renamed = dict(names)
        table.column_names = [names.get(name, name) for name in self.column_names]
        return table

    def _find(self, path: Path) -> None:
        """Notes start and end of every record. Raises: ValueError for anything but objects."""
        with open(path, "rb") as file:
            start = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
            file.seek(start)
            if path.suffix.lower() == ".json" and file.read(_BEGINNING).lstrip()[:1] == b"[":
                file.seek(start)
                self._find_in_list(file.read().decode("utf-8"), start)
                return
            file.seek(start)
            for line in file:
                if line.strip():
                    _object(json.loads(line))
                    self._note(start, start + len(line))
                start += len(line)

    def _find_in_list(self, text: str, offset: int) -> None:
        """Notes the objects of one JSON list; `offset` is the byte at which the text begins."""
        decoder, place = json.JSONDecoder(), text.index("[") + 1
        byte, counted = offset, 0
        while text[(place := _behind_space(text, place)) : place + 1] != "]":
            value, end = decoder.raw_decode(text, place)
            _object(value)
            start = byte + len(text[counted:place].encode())
            byte, counted = start + len(text[place:end].encode()), end
            self._note(start, byte)
            place = _behind_space(text, end)
            if text[place : place + 1] not in (",", "]"):
                raise ValueError("a list of objects ends without ]")
            place += text[place] == ","

    def _note(self, start: int, end: int) -> None:
        """Keeps where a record lies, in bytes."""
        self._starts.append(start)
        self._ends.append(end)


def _object(value: Any) -> None:
    """Raises: ValueError for what is no object."""
    if not isinstance(value, dict):
        raise ValueError("it holds something else than objects: write a list of objects, or one object a line")


def _behind_space(text: str, place: int) -> int:
    """The first place from `place` on that holds no white space."""
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def first_record(path: Path) -> Any:
    """The first record of a JSON or JSONL file, or None where the beginning does not show it.

    Reads at most 16 MiB. Example: `[{"a": 1}, {"a": 2}]` -> {"a": 1}.
    """
    with open(path, "rb") as file:
        text = file.read(16 * 2**20).decode("utf-8-sig", "ignore").lstrip()
    try:
        return json.JSONDecoder().raw_decode(text[1:].lstrip() if text[:1] == "[" else text)[0]
    except (ValueError, RecursionError):
        return None
