"""Scores of answers against what was expected: strings in, numbers out; no model, no file, no third party.

An answer is one string. Outer white space never counts. Where the expected answers come from a template such as
`Product: {title}, Price: {price}`, the template is read backwards (`AnswerTemplate`) and every field is scored for
itself; fields that hold numbers are compared as numbers. Free text gets a similarity in addition:
`difflib.SequenceMatcher.ratio` of the standard library, that is twice the characters in matching blocks over all
characters of both texts.

Every share carries its Wilson 95 % interval, which stays inside 0..1 and is honest for few rows and for 0 % or 100 %.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from typing import Any

from phi3v.data.templates import Template
from phi3v.errors import ConfigError

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution

_NUMBER = re.compile(
    r"[$€£¥]?\s*(?P<sign>[-+]?)[$€£¥]?\s*(?P<digits>\d{1,3}(?:,\d{3})+|\d+)?(?P<fraction>\.\d+)?\s*[$€£¥%]?"
)


@dataclass(frozen=True)
class Share:
    """How many of how many, with the Wilson 95 % interval of the share.

    Example: Share.of(9, 10) has value 0.9, low 0.596 and high 0.982; Share.of(0, 0) has value 0.0 and the interval
    0..1.
    """

    hits: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, total: int) -> Share:
        """Build a share from counts. Raises: ValueError unless 0 <= hits <= total."""
        if not 0 <= hits <= total:
            raise ValueError(f"{hits} of {total} is not a share")
        low, high = wilson_interval(hits, total)
        return cls(hits, total, hits / total if total else 0.0, low, high)


@dataclass(frozen=True)
class FieldScore:
    """One field of a templated answer over all rows.

    `accuracy` counts rows whose field is right. For a numeric field `mean_absolute_error` is the mean over the
    `error_rows` rows where a number was expected and answered, and `not_numbers` counts those where none was answered;
    for other fields the three are None.
    """

    accuracy: Share
    numeric: bool
    mean_absolute_error: float | None = None
    error_rows: int | None = None
    not_numbers: int | None = None


@dataclass(frozen=True)
class Scores:
    """All scores of one set of answers.

    `well_formed` and `fields` are None and empty when there is no template to read the answers with. `loss` is the mean
    loss per trained token on the same rows, or None where it was not computed.
    """

    rows: int
    exact_match: Share
    similarity: float
    well_formed: Share | None = None
    fields: dict[str, FieldScore] = field(default_factory=dict)
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain dicts and numbers, ready for JSON."""
        return asdict(self)


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


def _literal_pieces(template: str) -> tuple[list[str], list[str]]:
    """Literal pieces around the fields, and the fields: "a {x} b {y}" -> (["a ", " b ", ""], ["x", "y"])."""
    parsed = Template(template, "answer")
    marks = {name: f"\0{number}\0" for number, name in enumerate(parsed.columns)}
    parts = re.split("\0([0-9]+)\0", parsed.render(marks))
    return parts[::2], [parsed.columns[int(number)] for number in parts[1::2]]


def parse_number(text: str) -> float | None:
    """The number that a text is, or None: one currency or percent sign, thousands commas and a decimal point are
    understood.

    Example: "470" -> 470.0, "$1,290.50" -> 1290.5, "-3" -> -3.0, "470,5" -> None, "about 470" -> None, "" -> None.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or (match["digits"] is None and match["fraction"] is None):
        return None
    number = float(match["sign"] + (match["digits"] or "0").replace(",", "") + (match["fraction"] or ""))
    return number if math.isfinite(number) else None


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


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """The Wilson score interval of a share at 95 %.

    Example: 9 of 10 -> (0.596, 0.982); 0 of 200 -> (0.0, 0.019); 0 of 0 -> (0.0, 1.0), nothing is known.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = hits / total, Z_95 * Z_95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return (0.0 if hits == 0 else max(0.0, centre - half)), (1.0 if hits == total else min(1.0, centre + half))


def exact_match(expected: Sequence[str], answers: Sequence[str]) -> Share:
    """Share of answers that equal the expected one, letter by letter, outer white space aside.

    Example: expected ["a cat", "a dog"], answers ["a cat ", "A dog"] -> 1 of 2.
    Raises: ValueError when the two differ in length.
    """
    hits = sum(_same_text(wanted, answer) for wanted, answer in zip(expected, answers, strict=True))
    return Share.of(hits, len(expected))


def text_similarity(expected: str, answer: str) -> float:
    """Likeness of two texts from 0 to 1: `difflib.SequenceMatcher.ratio`, without its junk heuristic.

    Example: "abcd" and "bcde" share the block "bcd": 2 * 3 / 8 = 0.75. Two empty texts are alike: 1.0.
    """
    return SequenceMatcher(None, expected.strip(), answer.strip(), autojunk=False).ratio()


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
            return math.isclose(wanted, given, rel_tol=1e-9, abs_tol=1e-12)
    return _same_text(expected, answer)


def score_field(expected: Sequence[str], answers: Sequence[str | None], numeric: bool) -> FieldScore:
    """Score one field over all rows; None stands for an answer that did not have the template's form.

    Example: expected ["470", "100", "30"], answers ["470.00", "90", None], numeric -> 1 of 3 right, mean absolute error
    (0 + 10) / 2 = 5.0 over 2 rows, 1 row without a number.
    Raises: ValueError when the two differ in length.
    """
    pairs = list(zip(expected, answers, strict=True))
    accuracy = Share.of(sum(field_is_right(wanted, answer, numeric) for wanted, answer in pairs), len(pairs))
    if not numeric:
        return FieldScore(accuracy, numeric=False)
    errors, not_numbers = [], 0
    for wanted_text, answer in pairs:
        wanted = parse_number(wanted_text)
        given = None if answer is None else parse_number(answer)
        if wanted is not None and given is not None:
            errors.append(abs(wanted - given))
        elif wanted is not None:
            not_numbers += 1
    mean = math.fsum(errors) / len(errors) if errors else None
    return FieldScore(accuracy, True, mean, len(errors), not_numbers)


def score_answers(
    expected: Sequence[str],
    answers: Sequence[str],
    template: AnswerTemplate | None = None,
    numeric_fields: Iterable[str] | None = None,
    loss: float | None = None,
) -> Scores:
    """All scores of a list of answers, row i of which answers row i of `expected`.

    Args:
        expected: what should have been answered. answers: what was answered. template: how the expected answers were
        made; None (free text) gives no field scores. A template that cannot be read
            backwards counts as None, and so do rows whose expected answer does not have its form.
        numeric_fields: fields compared as numbers; None chooses those whose expected values all are numbers.
        loss: passed through into the result.

    Example: expected ["a: x, b: 1", "a: y, b: 2"], answers ["a: x, b: 3", "nonsense"], template "a: {a}, b: {b}" gives
    exact match 0 of 2, well formed 1 of 2, field a 1 of 2, field b 0 of 2 with mean absolute error 2.0 over 1 row and 1
    without a number.

    Raises: ValueError when the lengths differ; ConfigError when a numeric field is not in the template.
    """
    exact = exact_match(expected, answers)
    likeness = [text_similarity(wanted, answer) for wanted, answer in zip(expected, answers, strict=True)]
    similarity = math.fsum(likeness) / len(likeness) if likeness else 0.0
    if template is None or not template.separable:
        return Scores(len(expected), exact, similarity, loss=loss)
    numeric = choose_numeric_fields(expected, template, numeric_fields)
    wanted_rows, given_rows = [], []
    for wanted, answer in zip(expected, answers, strict=True):
        parsed = template.parse(wanted)
        if parsed is not None:
            wanted_rows.append(parsed)
            given_rows.append(template.parse(answer))
    fields = {
        name: score_field(
            [row[name] for row in wanted_rows],
            [None if row is None else row[name] for row in given_rows],
            name in numeric,
        )
        for name in template.fields
    }
    well_formed = Share.of(sum(row is not None for row in given_rows), len(given_rows))
    return Scores(len(expected), exact, similarity, well_formed, fields, loss)


def choose_numeric_fields(
    expected: Sequence[str], template: AnswerTemplate, named: Iterable[str] | None = None
) -> frozenset[str]:
    """The fields of a template that are compared as numbers: those named, else those whose expected values all are
    numbers.

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
    return frozenset(name for name in template.fields if looks_numeric(row[name] for row in parsed))


def majority_answer(expected: Sequence[str]) -> tuple[str, Share]:
    """The most frequent expected answer and its share: the best that anyone can do who answers always the same.

    Taken from the scored rows themselves, so no constant answer can beat it. Of equally frequent answers the first one
    counts.

    Example: ["cat", "dog", "dog "] -> ("dog", 2 of 3); [] -> ("", 0 of 0).
    """
    if not expected:
        return "", Share.of(0, 0)
    answer, hits = Counter(text.strip() for text in expected).most_common(1)[0]
    return answer, Share.of(hits, len(expected))


def majority_fields(expected: Sequence[str], template: AnswerTemplate) -> dict[str, Share]:
    """For each field the share of its most frequent value.

    Example: ["a: x, b: 1", "a: x, b: 2"], template "a: {a}, b: {b}" -> {"a": 2 of 2, "b": 1 of 2}.
    """
    parsed = [row for row in map(template.parse, expected) if row is not None]
    return {name: majority_answer([row[name] for row in parsed])[1] for name in template.fields}


def _same_text(expected: str, answer: str) -> bool:
    return expected.strip() == answer.strip()
