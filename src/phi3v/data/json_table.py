"""JSON or JSONL files as a table: records of any shape, parsed when they are asked for, their values as in the file.

Arrow wants one type a column and guesses it: a text that looks like a date becomes a date, a whole number of twenty
digits a rounded one, and files of conversations have no one type, `image` is a text here and a list there. So texts and
whole numbers are read here as they stand. In come paths; out come records by number, of which 16 bytes each stay in
memory. Records count from 0, through all files.
"""

import json
from array import array
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, BinaryIO

from phi3v.data.faults import find_fault, layout_fault
from phi3v.data.json_text import RepeatedKeyError, parse_json, unrepeated, whole_number
from phi3v.data.record_table import RecordTable
from phi3v.errors import DataError

_MARK = b"\xef\xbb\xbf"


class JsonTable(RecordTable):
    """The records of some JSON or JSONL files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Finds where the records begin. Raises: DataError in one line that names file and line."""
        super().__init__(paths)
        self._starts = array("Q")
        self._ends = array("Q")
        self._names: dict[str, None] = {}
        self._renamed: dict[str, str] = {}
        for path in paths:
            self._firsts.append(len(self))
            try:
                self._find(path)
            except RepeatedKeyError as error:
                place = f"record {len(self) - self._firsts[-1]}"
                raise DataError(f"data set {path} cannot be read: {place}: {error}: take one out") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"data set {path} cannot be read: {find_fault(path) or error}") from error
            if len(self) - self._firsts[-1] == 1 and (fault := layout_fault(self[len(self) - 1])):
                raise DataError(f"data set {path} cannot be read: {fault}")
        if not len(self):
            raise DataError(f"data set {', '.join(self._paths)} cannot be read: it has no rows")
        self.column_names = list(self._names)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts)

    @property
    def column_hint(self) -> str:
        """Why a column may not be there: the file is {"data": [...]} in one line; "" where it has several records."""
        return "" if len(self) > 1 else "the file is one object: write its rows as a list of objects, or one a line"

    def _read(self, number: int, file: BinaryIO) -> dict[str, Any]:
        file.seek(self._starts[number])
        record = parse_json(file.read(self._ends[number] - self._starts[number]))
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
            first = next((line for line in file if line.strip()), b"")
            if path.suffix.lower() == ".json" and first.lstrip()[:1] == b"[":
                file.seek(start)
                self._find_in_list(file.read().decode("utf-8"), start)
                return
            file.seek(start)
            for line in file:
                if line.strip():
                    self._note(parse_json(line), start, start + len(line))
                start += len(line)

    def _find_in_list(self, text: str, offset: int) -> None:
        """Notes the objects of one JSON list; `offset` is the byte at which the text begins."""
        decoder, place = json.JSONDecoder(parse_int=whole_number, object_pairs_hook=unrepeated), text.index("[") + 1
        byte, counted = offset, 0
        while text[(place := _behind_space(text, place)) : place + 1] != "]":
            value, end = decoder.raw_decode(text, place)
            start = byte + len(text[counted:place].encode())
            byte, counted = start + len(text[place:end].encode()), end
            self._note(value, start, byte)
            place = _behind_space(text, end)
            if text[place : place + 1] not in (",", "]"):
                raise ValueError("a list of objects ends without ]")
            if text[place] == ",":
                place = _behind_space(text, place + 1)
                if text[place : place + 1] == "]":
                    raise ValueError("a comma stands behind the last object of its list")
        if _behind_space(text, place + 1) < len(text):
            raise ValueError("something stands behind the ] of its list")

    def _note(self, value: Any, start: int, end: int) -> None:
        """Keeps where a record lies, in bytes, and its columns. Raises: ValueError for what is no object."""
        if not isinstance(value, dict):
            raise ValueError("it holds something else than objects: write a list of objects, or one object a line")
        self._names.update(dict.fromkeys(value))
        self._starts.append(start)
        self._ends.append(end)


def _behind_space(text: str, place: int) -> int:
    """The first place from `place` on that holds no white space."""
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place
