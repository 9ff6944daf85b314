"""What is wrong with a file that `datasets` could not read: the line, the reason, the way out.

In comes the path of a CSV, TSV, JSON, JSONL or Parquet file after a failure; out comes half a sentence, or None where
looking at the file does not show it. Reads line by line and stops at the first fault. Lines count from 1, as editors
count them. What is wrong with a Parquet file is the business of `parquet_faults`.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi3v.data.json_text import parse_json
from phi3v.data.parquet_faults import parquet_fault
from phi3v.data.text_guard import encoding_fault, find_text_fault

_TEXT_FILES = (".csv", ".tsv", ".json", ".jsonl")
_JSON_KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def find_fault(path: Path) -> str | None:
    """The first fault of a file.

    Example: a JSONL file with the lines `{"a": 1}` and `{"a":` -> "line 2 is not JSON (Expecting value, column 6):
    write one JSON object a line".
    """
    if path.suffix.lower() == ".parquet":
        return parquet_fault(path)
    if path.suffix.lower() not in _TEXT_FILES:
        return None
    if (found := find_text_fault(path) or encoding_fault(path)) is not None:
        return found
    if path.suffix.lower() == ".jsonl":
        return _lines_fault(path)
    return _json_fault(path) if path.suffix.lower() == ".json" else None


def _json_fault(path: Path) -> str | None:
    """The fault of a JSON file, which holds one list of objects, or one object a line."""
    first = next((line for _, line in _lines(path)), "")
    with suppress(ValueError, RecursionError):
        if isinstance(parse_json(first), dict):
            return _lines_fault(path)
    try:
        whole = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        return f"{_reason(error)}: write a list of objects, or one JSON object a line"
    return _list_fault(whole)


_PARTS_OF_ONE = {"path", "bytes", "url", "role", "from", "content", "value", "type", "text"}
"""Keys of a mapping that is one image or one turn: a record may be made of nothing else."""


def layout_fault(value: Any) -> str | None:
    """The fault of a JSON file that pandas wrote whole: by column, as `to_json` does unless told, by index, or split.

    Taken for a row such an object would be one of mappings. Example: {"title": {"0": "scarf", "1": "hat"}}, {"0":
    {"title": "scarf"}}, {"columns": ["title"], "index": [0], "data": [["scarf"]]} -> one line for all three.
    """
    if not isinstance(value, dict) or not value:
        return None
    split = set(value) == {"columns", "index", "data"} and all(isinstance(part, list) for part in value.values())
    cells = [set(inner) for inner in value.values() if isinstance(inner, dict)]
    alike = len(cells) == len(value) and bool(cells[0]) and all(keys == cells[0] for keys in cells)
    named = alike and len(value) > 1 and not cells[0] <= _PARTS_OF_ONE  # an index of texts
    if not split and not (alike and (named or _are_numbers(cells[0]) or _are_numbers(value))):
        return None
    return "it holds a whole table as one object: write rows, in pandas df.to_json(FILE, orient='records', lines=True)"


def _are_numbers(keys: Iterable[str]) -> bool:
    """Whether all keys are numbers, as those of an index are: "0", "17"."""
    return all(key.isascii() and key.isdigit() for key in keys)


def _list_fault(value: Any) -> str | None:
    """The fault of a JSON file's one value, unless it is a list of objects.

    Example: {"data": [...]} -> "it holds a mapping: write a list of objects, or one JSON object a line".
    """
    if not isinstance(value, list):
        return layout_fault(value) or f"it holds {_kind(value)}: write a list of objects, or one JSON object a line"
    wrong = next((number for number, record in enumerate(value) if not isinstance(record, dict)), None)
    return None if wrong is None else f"record {wrong} is {_kind(value[wrong])}: write a list of objects"


def _lines_fault(path: Path) -> str | None:
    """The first line that is no JSON object."""
    for number, line in _lines(path):
        try:
            value = parse_json(line)
        except ValueError as error:
            return f"{_reason(error, number)}: write one JSON object a line"
        if not isinstance(value, dict):
            other = ", or name the file .json" if isinstance(value, list) and number == 1 else ""
            return f"line {number} holds {_kind(value)}: write one JSON object a line{other}"
    return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that are not empty."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _JSON_KINDS.get(type(value), "null")


def _reason(error: ValueError, number: int = 0) -> str:
    """What the JSON reader says, with the line of the file: the given one, else the reader's own."""
    if not isinstance(error, json.JSONDecodeError):
        return f"line {number} is not JSON" if number else "it is not JSON"
    return f"line {number or error.lineno} is not JSON ({error.msg}, column {error.colno})"
