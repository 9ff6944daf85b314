"""JSON text as values, whole numbers of any length among them.

Python turns no text of more than 4,300 digits into a number, since that takes time with the square of their count. Such
a number is kept as the text of its digits here: a template shows the same either way. Knows no files and no rows.
"""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a number of 5,000 digits is a text of 5,000 digits. Raises: ValueError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # UnicodeDecodeError comes again
        return json.loads(text, parse_int=whole_number)


def whole_number(digits: str) -> int | str:
    """A number, or its digits where they are too many: "470" -> 470."""
    try:
        return int(digits)
    except ValueError:
        return digits
