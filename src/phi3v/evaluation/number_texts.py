"""Numbers as people write them, and values that stand somewhere in a text. Strings in, numbers or yes and no out.

Only what can be read in one way is a number. "12,5" is none: it may be 12.5, or the 12 and 5 of a list.
"""

from __future__ import annotations

import math
import re

_CODES = "AUD|BRL|CAD|CHF|CNY|CZK|DKK|EUR|GBP|HKD|HUF|INR|JPY|KRW|MXN|NOK|NZD|PLN|RUB|SEK|SGD|TRY|USD|ZAR"
_SPACES = "\u00a0\u2009\u202f"  # those that keep a number together; a plain blank may part two numbers
# Blanks are taken as a whole (*+): given back one by one, a long stretch of them would take minutes.
_NUMBER = re.compile(
    rf"(?P<first>[$€£¥]|(?:{_CODES})\b)?\s*+(?P<sign>[-+\N{{MINUS SIGN}}]?)(?P<inner>[$€£¥])?\s*+"
    rf"(?P<digits>\d{{1,3}}(?:,\d{{3}})+|\d{{1,3}}(?P<space>[{_SPACES}])\d{{3}}(?:(?P=space)\d{{3}})*|\d+)?"
    rf"(?P<fraction>\.\d+)?\s*+(?P<last>[$€£¥%]|\b(?:{_CODES}))?"
)
_TOKEN = re.compile(rf"(?<![\w.,])[-+\N{{MINUS SIGN}}]?\d[\d.,{_SPACES}]*")


def parse_number(text: str) -> float | None:
    """The number that a text is, or None. Understood are one currency sign, one code of a currency (EUR) or a percent
    sign, thousands parted by commas or by thin or no-break spaces, a decimal point, a minus sign, and a full stop at
    the end.

    Example: "470" -> 470.0, "470." -> 470.0, "$1,290.50" -> 1290.5, "-3" -> -3.0, "470 EUR" -> 470.0, "470,5" -> None,
    "1 290" -> None, "$5%" -> None, "about 470" -> None, "" -> None.
    """
    match = _NUMBER.fullmatch(text.strip().removesuffix("."))
    if match is None or (match["digits"] is None and match["fraction"] is None):
        return None
    if sum(match[name] is not None for name in ("first", "inner", "last")) > 1:
        return None
    digits = re.sub(rf"[,{_SPACES}]", "", match["digits"] or "0")
    number = float(match["sign"].replace("\N{MINUS SIGN}", "-") + digits + (match["fraction"] or ""))
    return number if math.isfinite(number) else None


def same_number(one: float, other: float) -> bool:
    """Whether two numbers are the same but for rounding."""
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def value_stands_in(value: str, answer: str, numeric: bool) -> bool:
    """Whether a value stands anywhere in an answer: as one of its numbers, or as words next to each other, case and
    marks aside.

    Example: "470", "It costs $470." -> True; "470", "4701" -> False; "Wool Scarf", "a wool scarf, red" -> True; "", "a"
    -> False.
    """
    wanted = parse_number(value) if numeric else None
    if wanted is not None:
        found = (parse_number(match[0].rstrip(f".,{_SPACES}")) for match in _TOKEN.finditer(answer))
        return any(number is not None and same_number(number, wanted) for number in found)
    words, said = (" ".join(["", *re.findall(r"\w+", text.casefold()), ""]) for text in (value, answer))
    return bool(words.strip()) and words in said
