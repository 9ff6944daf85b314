"""JSON text as values, whole numbers of any length among them.

Python turns no text of more than 4,300 digits into a number, since that takes time with the square of their count. Such
a number is kept as the text of its digits here: a template shows the same either way. An object that names a key twice
is refused, as a repeated column of a CSV file is. Knows no files and no rows.
"""

import json
from collections import Counter
from typing import Any


class RepeatedKeyError(ValueError):
    """An object names a key twice, and one of its values would be lost without a word."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a number of 5,000 digits is a text of 5,000 digits.

    Raises: ValueError; RepeatedKeyError for an object with one key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=unrepeated)
    except (json.JSONDecodeError, RepeatedKeyError):
        raise
    except ValueError:  # UnicodeDecodeError comes again
        return json.loads(text, parse_int=whole_number, object_pairs_hook=unrepeated)


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of an object: [("a", 1), ("b", 2)] -> {"a": 1, "b": 2}. Raises: RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RepeatedKeyError(f"an object names the key {twice[:80]!r} twice")
    return found


def whole_number(digits: str) -> int | str:
    """A number, or its digits where they are too many: "470" -> 470."""
    try:
        return int(digits)
    except ValueError:
        return digits
