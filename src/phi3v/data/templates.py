"""Templates: `{column}` is replaced by the value of that column, and nothing else happens.

No attributes, no indexes, no format specs, no code: what stands between the braces is a column's whole name. `{{` and
`}}` are literal braces. Here also: how a value becomes text (`cell_text`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from phi3v.data.text_guard import other_separator
from phi3v.errors import DataError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


_KINDS: tuple[tuple[type, str], ...] = (
    (Mapping, "a mapping"),
    (list, "a list"),
    (str, "text"),
    (bytes, "bytes"),
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (Decimal, "a number"),
    (timedelta, "a duration"),
    (datetime, "a date and time"),
    (date, "a date"),
    (time, "a time"),
    (type(None), "nothing"),
)


class Template:
    """A text with column names in braces.

    Example: Template("Product: {title}, {{new}}").render({"title": "Scarf"}) -> "Product: Scarf, {new}".
    Attributes:
        pieces: (is_column, text) in order: ((False, "Product: "), (True, "title"), (False, ", "), (False, "{"), ...).
        columns: the columns it names, each once.
    Raises: DataError for a single brace or empty braces.
    """

    def __init__(self, text: str, name: str = "template") -> None:
        """Take a template apart.

        Args:
            text: the template.
            name: what errors call it, "answer" for instance.
        """
        self.text = text
        self.name = name
        pieces: list[tuple[bool, str]] = []
        for match in _PIECE.finditer(text):
            piece, column = match.group(0), match.group(1)
            if piece in ("{", "}", "{}"):
                problem = (
                    f"{piece} is no {{column}}; write {piece * 2} for the character, and rename a column with "
                    "braces in its name"
                    if len(piece) == 1
                    else "{} is empty"
                )
                raise DataError(f"data.{name} {text!r}, character {match.start()}: {problem}")
            pieces.append((True, column) if column else (False, piece[:1] if piece in ("{{", "}}") else piece))
        self.pieces = tuple(pieces)
        self.columns = tuple(dict.fromkeys(value for is_column, value in pieces if is_column))

    def check(self, columns: list[str], source: str) -> None:
        """Raises: DataError, naming the columns that exist, when the template names another."""
        for column in self.columns:
            if column not in columns:
                how = "a template takes {column} only"
                if column == self.name:  # the default, of somebody who may not know that there are templates
                    how = f"set data.{self.name} to a text, in which {{column}} stands for a cell"
                raise DataError(
                    f"data.{self.name} names the column {column!r}, which {source} does not have"
                    f"{known_columns(column, columns)} ({how})"
                )

    def render(self, values: Mapping[str, str]) -> str:
        """The text with every `{column}` replaced by `values[column]`, which is taken literally."""
        return "".join(values[value] if is_column else value for is_column, value in self.pieces)


def known_columns(name: str, columns: list[str]) -> str:
    """What there is where `name` is not: the column that was meant, when one is close, and all columns.

    Example: "titel" and ["title", "price"] -> " (did you mean 'title'?); its columns are title, price".
    """
    lower = {column.lower(): column for column in columns}
    near = get_close_matches(name.lower(), lower, n=1)
    hint = f" (did you mean {lower[near[0]]!r}?)" if near else ""
    separator = other_separator(columns)
    return f"{hint}; its columns are {', '.join(columns) or 'none'}" + (f"; {separator}" if separator else "")


@dataclass(frozen=True)
class NoDate:
    """Stands for a date or time of a data file that no calendar has, the year 10000 for instance."""


@dataclass(frozen=True)
class Unread:
    """Stands for a cell whose place in a file does not read: "is in 0.txt, which is not UTF-8 text"."""

    reason: str


def cell_text(value: Any) -> str | None:
    """The text that stands for a value in a template; None when there is nothing.

    | value | text |
    |---|---|
    | text | itself; None when it is empty or white space |
    | whole number, also 470.0 | 470 |
    | other number | shortest decimal that reads back: 19.9, 0.00001 |
    | decimal (of Parquet files) | with the places of its column: 19.90, 0.0000000000 |
    | true, false | true, false |
    | null, NaN | None |
    | date and time | ISO 8601: 2024-05-01, 2024-05-01 10:30:00 |

    A whole float loses its ".0" because one empty cell turns a column of ints into floats, which must not change the
    other rows. CSV cells arrive here as the text of the file: 007, 19.90 and NA stay.
    Raises: TypeError for lists, mappings and bytes, which no template can show, for text that is no text, for an
        infinite number, for a `NoDate` and for an `Unread`.
    """
    if value is None or isinstance(value, str):
        return whole_text(value) if value and value.strip() else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, date | datetime | time):
        return str(value)
    if isinstance(value, NoDate):
        raise TypeError("holds a date or time that is out of range")
    if isinstance(value, Unread):
        raise TypeError(value.reason)
    raise TypeError(f"holds {kind_of(value)}, which a template cannot show")


def kind_of(value: Any) -> str:
    """What kind of value this is, as lines for people say it: {"a": 1} -> "a mapping", 5 -> "a whole number"."""
    kinds = ((kind, name) for kind, name in _KINDS if isinstance(value, kind))
    return next((name for _, name in kinds), f"a value of type {type(value).__name__}")


def whole_text(text: str) -> str:
    """The text itself, when it can be written as UTF-8.

    Example: JSON's "\\ud83d" is the first half of an emoji whose second half was cut off: a lone surrogate.
    Raises: TypeError for one that holds a lone surrogate, which no tokenizer reads.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(
            f"holds half a character, a lone surrogate, at place {error.start}: the text was cut or escaped wrongly"
        ) from error
    return text


def _number(value: float) -> str | None:
    """A float without exponent and without a useless ".0": 470.0 -> 470, 1e-05 -> 0.00001, -0.0 -> 0, nan -> None."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        raise TypeError("holds a number that is infinite, or larger than any that is kept (1e308)")
    return format(Decimal(repr(value + 0.0)), "f").removesuffix(".0")
