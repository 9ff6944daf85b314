"""Answers that come from a template, field by field, and numbers in answers. Strings in, numbers out.

Where the expected answers come from a template such as `Product: {title}, Price: {price}`, the template is read
backwards (`AnswerTemplate`) and every field is scored for itself; fields that hold numbers are compared as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence

from phi3v.data.templates import Template
from phi3v.errors import ConfigError
from phi3v.evaluation.number_texts import parse_number, same_number
from phi3v.evaluation.shares import same_text

RELAXED = 0.05  # of the expected number, ChartQA's tolerance
MOST = 0.95  # of the expected answers have to have a form: a few slips in the data change neither kind nor field


class AnswerTemplate:
    """An answer template read backwards: the literal pieces anchor, a field is what stands between two of them.

    The first piece must open the answer and the last one must end it; a piece in between is taken where it first
    occurs. Doubled braces are literal braces. A field named twice must hold the same text both times. An answer that
    does not have this form is not parsed at all.

    Example:
        template = AnswerTemplate("Product: {title}, Price: {price}")
        template.fields                              ("title", "price")
        template.parse("Product: Scarf, Price: 470") {"title": "Scarf", "price": "470"}
        template.parse("Scarf for 470")              None
    """

    def __init__(self, template: str) -> None:
        """Take a template apart. Raises: DataError for a single brace or empty braces."""
        self.template = template
        self._pieces, names = _literal_pieces(template)
        self._slots = tuple(names)
        self.fields: tuple[str, ...] = tuple(dict.fromkeys(names))

    @property
    def separable(self) -> bool:
        """Whether answers can be taken apart: one field at least, and text between every two ("{a}{b}" cannot)."""
        return bool(self._slots) and all(self._pieces[1:-1])

    @property
    def worded(self) -> bool:
        """Whether there is text beside the fields: "It is {colour}." has some, "{answer}" has none."""
        return any(piece.strip() for piece in self._pieces)

    def parse(self, answer: str) -> dict[str, str] | None:
        """The fields of an answer without outer white space, or None when it does not have the template's form."""
        text = answer.strip()
        head, tail = self._pieces[0].lstrip(), self._pieces[-1].rstrip()
        if not self.separable or not text.startswith(head) or not text.endswith(tail):
            return None
        cursor, end = len(head), len(text) - len(tail)
        values = []
        for piece in self._pieces[1:-1]:
            at = text.find(piece, cursor, max(end, cursor))
            if at < 0:
                return None
            values.append(text[cursor:at].strip())
            cursor = at + len(piece)
        if cursor > end:
            return None
        values.append(text[cursor:end].strip())
        found: dict[str, str] = {}
        for name, value in zip(self._slots, values, strict=True):
            if found.setdefault(name, value) != value:
                return None
        return found

    def fill(self, values: Mapping[str, str]) -> str:
        """The answer that has these values, the other way round: {"title": "Scarf", "price": "470"} -> "Product: Scarf,
        Price: 470"."""
        texts = [values[name] for name in self._slots]
        return "".join(piece + text for piece, text in zip(self._pieces, [*texts, ""], strict=True)).strip()


def _literal_pieces(template: str) -> tuple[list[str], list[str]]:
    """Literal pieces around the fields, and the fields: "a {x} b {y}" -> (["a ", " b ", ""], ["x", "y"])."""
    parsed = Template(template, "answer")
    marks = {name: f"\0{number}\0" for number, name in enumerate(parsed.columns)}
    parts = re.split("\0([0-9]+)\0", parsed.render(marks))
    return parts[::2], [parsed.columns[int(number)] for number in parts[1::2]]


def looks_numeric(values: Iterable[str]) -> bool:
    """Whether a column holds numbers: it has values, all of them are numbers, and none is a code with leading zeros.

    Example: ["470", "1,290.50"] -> True, ["470", "n/a"] -> False, ["007", "012"] -> False, [] -> False.
    """
    seen = False
    for value in values:
        seen = True
        if parse_number(value) is None or re.match(r"0\d", value.strip()):
            return False
    return seen


def field_is_right(expected: str, answer: str | None, numeric: bool) -> bool:
    """Whether a field holds what was expected; numbers are compared as numbers.

    Example: ("470", "470.0", numeric=True) -> True; ("470", "470.0", numeric=False) -> False; ("470", None, ...) ->
    False.
    """
    if answer is None:
        return False
    if numeric:
        wanted, given = parse_number(expected), parse_number(answer)
        if wanted is not None and given is not None:
            return same_number(wanted, given)
    return same_text(expected, answer)


def field_accuracy(expected: Mapping[str, str], answer: Mapping[str, str] | None, numeric: Container[str]) -> float:
    """The share of a row's fields that are right; None stands for an answer that did not have the template's form.

    Example: expected {"title": "Scarf", "price": "470"}, answer {"title": "Cap", "price": "470.0"}, numeric {"price"}
    -> 0.5; answer None -> 0.0.
    """
    given = answer or {}
    right = [field_is_right(value, given.get(name), name in numeric) for name, value in expected.items()]
    return sum(right) / len(right)


def absolute_error(expected: str, answer: str | None) -> float | None:
    """How far a number is from the expected one; None where one of the two is no number: "470", "480" -> 10.0."""
    wanted, given = parse_number(expected), None if answer is None else parse_number(answer)
    return None if wanted is None or given is None else abs(wanted - given)


def relaxed_accuracy(expected: str, answer: str) -> float:
    """1.0 where a number is at most 5 % off, as ChartQA has it; texts must be the same, case and a last point aside.

    Example: "470", "493.5" -> 1.0; "470", "494" -> 0.0; "0", "0.01" -> 0.0; "Yes", "yes." -> 1.0; "470", "about 470" ->
    0.0.
    """
    wanted, given = parse_number(expected), parse_number(answer)
    if wanted is None or given is None:
        wanted_text, given_text = (text.strip().removesuffix(".").casefold() for text in (expected, answer))
        return float(wanted_text == given_text)
    return float(abs(wanted - given) <= RELAXED * abs(wanted) * (1 + 1e-12))


def choose_numeric_fields(
    expected: Sequence[str], template: AnswerTemplate, named: Iterable[str] | None = None
) -> frozenset[str]:
    """The fields of a template that are compared as numbers: those named, else those of whose expected values at least
    95 % are numbers; the others of such a field are compared as texts, see `no_numbers`.

    Example: expected ["a: x, b: 1", "a: y, b: 2"], template "a: {a}, b: {b}" -> {"b"}.
    Raises: ConfigError when a named field is not in the template.
    """
    if named is not None:
        chosen = frozenset(named)
        if unknown := sorted(chosen - set(template.fields)):
            raise ConfigError(
                f"evaluation.numeric_fields names {unknown[0]!r}, which the answer template does not have; "
                f"its fields are {', '.join(template.fields)}"
            )
        return chosen
    parsed = [row for row in map(template.parse, expected) if row is not None]
    return frozenset(name for name in template.fields if mostly_numeric([row[name] for row in parsed]))


def mostly_numeric(values: Sequence[str]) -> bool:
    """Whether at least 95 % of some values are numbers and no codes: 19 numbers and one "sold out" -> True, [] ->
    False."""
    return bool(values) and sum(looks_numeric([value]) for value in values) >= MOST * len(values)


def no_numbers(expected: Sequence[str], template: AnswerTemplate, numeric: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Field compared as a number -> how many of how many expected values are none; fields without any are left out.

    Example: ["a: x, b: 1", "a: y, b: sold out"], template "a: {a}, b: {b}", {"b"} -> {"b": (1, 2)}.
    """
    parsed = [row for row in map(template.parse, expected) if row is not None]
    counts = {name: sum(parse_number(row[name]) is None for row in parsed) for name in sorted(numeric)}
    return {name: (count, len(parsed)) for name, count in counts.items() if count}
