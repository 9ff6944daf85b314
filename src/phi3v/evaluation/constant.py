"""The control of every score: the best single answer, given to all rows. Texts in, an answer and its columns out.

The most frequent expected answer will not do: where it is an odd one ("not legible" among descriptions) nearly any
other answer gets more by partial credit, and a model that says one thing to all rows would look better than chance. So
many answers are tried, the model's own among them, and the best one counts: no model that gives one of them to all rows
is better than the control. It is chosen on the rows that it is scored on, so it is rather too good than too bad.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median_low
from typing import Any, Literal

import numpy as np

from phi3v.evaluation.fields import field_is_right
from phi3v.evaluation.intervals import mean
from phi3v.evaluation.json_answers import json_leaves, leaf_scores, least_errors, most_frequent_leaves
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.number_texts import parse_number
from phi3v.evaluation.row_scores import Column, Groups, row_score, score_rows
from phi3v.evaluation.shares import majority_answer

MOST_EXPECTED, MOST_OWN = 200, 20
"""Different answers that are tried: the most frequent ones of those expected, and of the model's own."""
ROUNDS = ((24, 24), (100, 6), (400, 2))
"""Rows that are scored, and answers that are kept, round by round: some 12,000 scores, then those of six answers."""
SLOW, BUDGET = ("rouge_l", "chrf", "similarity"), 500_000_000
"""Metrics whose time grows with the letters of one text times those of the other, and how many such products the rounds
may cost: seconds. Texts of 30 words stay below it; without it 300 rows of 300 words would take minutes."""
LEAST_TRIED, LEAST_ROUND = 8, 4
"""Answers and rows that are left of the rounds, however long the texts are."""

NO_CONTROL = ("well_formed", "json_valid")
"""Metrics that every constant answer gets all of."""
Origin = Literal["most frequent", "expected", "fields", "medians", "own"]
"""Where an answer is from: see `ConstantAnswer`."""


@dataclass(frozen=True)
class ConstantAnswer:
    """The best single answer to all rows.

    Attributes:
        answer: its text.
        origin: "most frequent" for the most frequent expected answer, "expected" for another expected one, "fields" for
            the one that has the most frequent value in each field, "medians" for that one with the median in fields of
            numbers, "own" for one that the model gives.
        tried: how many different answers were scored; 1 where the most frequent one is the best without a try.
    """

    answer: str
    origin: Origin
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def best_constant(
    scoring: Scoring, expected: Sequence[str], questions: Sequence[str], own: Sequence[str] = ()
) -> ConstantAnswer:
    """The answer that scores best by the primary metric when it is given to every row.

    Tried are the 200 most frequent expected answers, the one made of the most frequent value of each field, the one of
    the median numbers, and the 20 most frequent ones of the model. Few rows choose among many answers, and more rows
    among the best of these; the most frequent answer of each sort stays in to the end. Long texts get fewer answers and
    rows, see `BUDGET`. Of equally good ones the most frequent expected answer counts.

    Args:
        scoring: the metrics.
        expected: what should be answered.
        questions: what was asked.
        own: what the model answered.
    Example: ANLS, expected "n/a" twice and "red cap 1" to "red cap 8" -> "red cap 1", which is nearly right 8 times.
    """
    most = majority_answer(expected)
    tried: dict[str, Origin] = {most: "most frequent"}
    if (filled := most_frequent_fields(scoring, expected)) is not None:
        tried.setdefault(filled, "fields")
    if (middle := median_numbers(scoring, expected)) is not None:
        tried.setdefault(middle, "medians")
    always = [*tried]
    for texts, count, origin in ((expected, MOST_EXPECTED, "expected"), (own, MOST_OWN, "own")):
        frequent = [text for text, _ in Counter(text.strip() for text in texts).most_common(count)]
        always += frequent[:1]
        for text in frequent:
            tried.setdefault(text, origin)  # type: ignore[arg-type]
    if not expected or scoring.metrics[0] == "exact_match":  # nothing equals more rows than the most frequent answer
        return ConstantAnswer(most, "most frequent", 1)
    rows = list(zip(expected, questions, strict=True))
    part = _affordable(scoring, expected, [*tried], len(always))
    some = [*tried]
    if part < 1:
        count = max(LEAST_TRIED, int(len(tried) * math.sqrt(part)))
        spread = {some[place * len(some) // count] for place in range(min(count, len(some)))}
        some = [text for text in tried if text in spread or text in always]
    mostly = [text for text, count in Counter(text.strip() for text in own).most_common(1) if 2 * count > len(rows)]
    best = _best(scoring, rows, some, always, part, mostly)
    return ConstantAnswer(best, tried[best], len(some))


def _affordable(scoring: Scoring, expected: Sequence[str], tried: Sequence[str], always: int) -> float:
    """Which part of the scores of `best_constant` the budget is enough for, at most 1."""
    if scoring.metrics[0] not in SLOW:
        return 1.0
    letters = sum(map(len, expected)) / len(expected) * sum(map(len, tried)) / len(tried)
    counts = [len(tried), *(kept for _, kept in ROUNDS)]
    rows = [*(many for many, _ in ROUNDS), len(expected)]
    planned = sum(min(many, len(expected)) * (count + always) for many, count in zip(rows, counts, strict=True))
    return min(1.0, BUDGET / max(letters * planned, 1.0))


def _best(
    scoring: Scoring,
    rows: Sequence[tuple[str, str]],
    tried: Sequence[str],
    always: Sequence[str],
    part: float,
    mostly: Sequence[str],
) -> str:
    """The best of some answers, round by round; `always` stay until the last one. With a part of the scores the last
    round is not over all rows; what the model `mostly` says, if there is such an answer, is measured on all."""
    known: dict[tuple[str, str, str], float | None] = {}

    def score(answer: str, row: tuple[str, str]) -> float | None:
        if (answer, *row) not in known:
            known[answer, *row] = row_score(scoring, row[0], answer, row[1])
        return known[answer, *row]

    left, order = list(tried), random.Random(0).sample(range(len(rows)), len(rows))
    side, some = math.sqrt(part), list(rows)
    for many, kept in ROUNDS:
        some = [rows[place] for place in order[: many if part == 1 else max(LEAST_ROUND, int(many * side))]]
        top = _top(score, some, left, kept if part == 1 else max(2, int(kept * side)))
        left = [one for one in tried if one in {*top, *always}]
        if len(some) == len(rows):
            break
    if part == 1:
        return _top(score, rows, left, 1)[0]
    some = [rows[place] for place in order[: max(len(some), int(len(rows) * part))]]
    best = _top(score, some, left, 1)[0]
    # A model that says one thing to all rows must not be better than its control by the rows that were left out.
    return best if best in mostly or not mostly else _top(score, rows, [best, *mostly], 1)[0]


def _top(
    score: Callable[[str, tuple[str, str]], float | None],
    rows: Sequence[tuple[str, str]],
    answers: Sequence[str],
    count: int,
) -> list[str]:
    """The best answers on some rows, the earlier one first of equally good ones."""
    sums = {answer: sum(filter(None, (score(answer, row) for row in rows))) for answer in answers}
    return sorted(answers, key=lambda answer: -round(sums[answer], 9))[:count]


def most_frequent_fields(scoring: Scoring, expected: Sequence[str], *, medians: bool = False) -> str | None:
    """The answer that has the most frequent value in each field; None for answers without fields.

    With `medians` a field of numbers has their median instead, in JSON where it is on the first level.

    Example: template "a: {a}, b: {b}", expected "a: x, b: 1", "a: x, b: 2", "a: y, b: 2" -> "a: x, b: 2"; JSON {"a": 1,
    "b": 2} twice and {"a": 1, "c": 3} -> {"a": 1, "b": 2}, the keys that more than half of the objects have.
    """
    if scoring.kind == "json":
        objects = [json.loads(text) for text in expected if json_leaves(text) is not None]
        objects = [one for one in objects if isinstance(one, dict)]
        values: dict[str, list[Any]] = {}
        for one in objects:
            for key, value in one.items():
                values.setdefault(key, []).append(value)
        told = {key: _told(its, medians) for key, its in values.items() if 2 * len(its) > len(objects)}
        return json.dumps(told, ensure_ascii=False) if told else None
    template = scoring.template
    parsed = [row for row in map(template.parse, expected) if row is not None] if template.separable else []
    if scoring.kind != "templated" or not parsed:
        return None
    filled = {}
    for name in template.fields:
        its, numeric = [row[name] for row in parsed], name in scoring.numeric
        middle = _middle(its) if medians and numeric else None
        filled[name] = _most(its, numeric) if middle is None else middle
    return template.fill(filled)


def median_numbers(scoring: Scoring, expected: Sequence[str]) -> str | None:
    """The answer that has the median in place of each number, see `most_frequent_fields`, or is the median where whole
    answers are numbers; None where there are none.

    Example: expected "9", "9", "100", "300", "2000" -> "100".
    """
    if scoring.kind in ("json", "templated"):
        return most_frequent_fields(scoring, expected, medians=True)
    return _middle(expected) if scoring.kind == "number" or "relaxed_accuracy" in scoring.metrics else None


def _middle(texts: Sequence[str]) -> str | None:
    """The text of the median number, the lower one of two; None without numbers: ["9", "$100", "n/a", "2000"] ->
    "$100"."""
    numbers = [(number, text.strip()) for text in texts if (number := parse_number(text)) is not None]
    return median_low(numbers)[1] if numbers else None


def _told(values: Sequence[Any], medians: bool) -> Any:
    """The most frequent one of some values of JSON, or the median where most are numbers."""
    numbers = [value for value in values if type(value) in (int, float)]
    if medians and 2 * len(numbers) > len(values):
        return median_low(numbers)
    texts = Counter(json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values)
    return json.loads(texts.most_common(1)[0][0])


def _most(values: Sequence[str], numeric: bool) -> str:
    """The most frequent value of a field, numbers as numbers: ["470", "470.00", "12", "12", "$470"] -> "470"."""
    if not numeric:
        return majority_answer(values)
    numbers = [parse_number(value) for value in values]
    keys = [value.strip() if number is None else number for value, number in zip(values, numbers, strict=True)]
    most = Counter(keys).most_common(1)
    return (
        majority_answer([value for value, key in zip(values, keys, strict=True) if key == most[0][0]]) if most else ""
    )


def constant_columns(
    scoring: Scoring,
    expected: Sequence[str],
    questions: Sequence[str],
    groups: Groups | None = None,
    answer: str | None = None,
    own: Sequence[str] = (),
) -> dict[str, Column]:
    """The control: columns of the best single answer, by name; of each metric the best of a few.

    These few are the best answer by the primary metric, the most frequent expected one where it is more frequent than
    that, the one made of the most frequent fields, the one of the median numbers, and what the model says most often:
    so a model that says one thing to all rows is better by no metric. For a field it is the field's own most frequent
    value, of nested JSON that at each path, and for a mean absolute error the median of the expected numbers, of nested
    JSON that at each path: no constant can beat them. There is none where it says nothing: for the form, which a
    constant answer always has, and for the loss, which it does not have.

    Args:
        scoring: the metrics.
        expected: what should be answered.
        questions: what was asked.
        groups: which rows belong together; None where each stands for itself.
        answer: the best one by the primary metric; None for the best that is found.
        own: what the model answered.
    """
    if answer is None:
        answer = best_constant(scoring, expected, questions, own).answer
    counts, most = Counter(text.strip() for text in expected), majority_answer(expected)
    few = [answer, *([most] if counts[most] > counts[answer.strip()] else [])]
    few += filter(None, (most_frequent_fields(scoring, expected), median_numbers(scoring, expected)))
    few += [majority_answer(own)] if own else []
    sets = [
        score_rows(scoring, expected, [text] * len(expected), questions, groups=groups) for text in dict.fromkeys(few)
    ]
    columns = {name: _better([columns[name] for columns in sets]) for name in sets[0]}
    if scoring.metrics[0] in columns:  # the one that is named as the best, whatever rounding says
        columns[scoring.metrics[0]] = sets[0][scoring.metrics[0]]
    if "field_accuracy" in scoring.metrics:
        columns |= _template_fields(scoring, expected, columns)
    if "json_field_accuracy" in scoring.metrics:
        columns |= _json_fields(expected, columns)
    columns |= _medians(scoring, expected, columns, own)
    return {name: column for name, column in columns.items() if name not in NO_CONTROL}


def primary_control(
    scoring: Scoring, expected: Sequence[str], questions: Sequence[str], groups: Groups | None, answer: str | None
) -> Column | None:
    """The column of the primary metric alone, of an answer that was found already; None where it has no control."""
    if (name := scoring.metrics[0]) in NO_CONTROL:
        return None
    if answer is None:
        answer = best_constant(scoring, expected, questions).answer
    one = replace(scoring, metrics=(name,))
    return score_rows(one, expected, [answer] * len(expected), questions, groups=groups)[name]


def _better(columns: Sequence[Column]) -> Column:
    """The column of scores with the best mean, the first one of equals. Errors have `_medians`."""
    return max(columns, key=lambda column: round(mean(column) or 0.0, 12))


def _template_fields(scoring: Scoring, expected: Sequence[str], columns: Mapping[str, Column]) -> dict[str, Column]:
    """For each field of the template the column of its most frequent value."""
    parsed, found = [scoring.template.parse(text) for text in expected], {}
    for name in scoring.template.fields:
        numeric = name in scoring.numeric
        most = _most([row[name] for row in parsed if row is not None], numeric)
        right = [np.nan if row is None else float(field_is_right(row[name], most, numeric)) for row in parsed]
        column = f"field_accuracy.{name}"
        found[column] = replace(columns[column], values=np.array(right, dtype=np.float64))
    return found


def _json_fields(expected: Sequence[str], columns: Mapping[str, Column]) -> dict[str, Column]:
    """For each field of JSON the column of the most frequent value at each of its paths."""
    leaves = [json_leaves(text) or {} for text in expected]
    most = most_frequent_leaves(leaves)
    rows, found = [leaf_scores(wanted, most) for wanted in leaves], {}
    for name, column in columns.items():
        if column.metric == "json_field_accuracy" and column.field is not None:
            values = [row.get(column.field, np.nan) for row in rows]
            found[name] = replace(column, values=np.array(values, dtype=np.float64))
    return found


def _medians(
    scoring: Scoring, expected: Sequence[str], columns: Mapping[str, Column], own: Sequence[str]
) -> dict[str, Column]:
    """For each mean absolute error the column of the median, over all rows that expect a number, as `score_rows` counts
    them: the sum of distances to it is the least. Nested JSON is measured where the model has numbers, see
    `least_errors`."""
    found: dict[str, list[float]] = {}
    for metric in scoring.metrics:  # in the order in which `score_rows` lets the first one of a name count
        if metric == "field_accuracy":
            parsed = [row or {} for row in map(scoring.template.parse, expected)]
            for name in scoring.numeric:
                found.setdefault(f"absolute_error.{name}", _distances([row.get(name) for row in parsed]))
        elif metric == "relaxed_accuracy":
            found.setdefault("absolute_error", _distances(expected))
        elif metric == "json_field_accuracy":
            rows = least_errors(expected, own or None)
            for name in dict.fromkeys(name for row in rows for name in row):
                found.setdefault(f"absolute_error.{name}", [row.get(name, np.nan) for row in rows])
    return {
        name: replace(columns[name], values=np.array(values, dtype=np.float64))
        for name, values in found.items()
        if name in columns
    }


def _distances(texts: Sequence[str | None]) -> list[float]:
    """How far each number is from their median, NaN for what is none: ["1", "2", "n/a", "9"] -> [1, 0, NaN, 7]."""
    numbers = [None if text is None else parse_number(text) for text in texts]
    middle = median_low([number for number in numbers if number is not None] or [np.nan])
    return [np.nan if number is None else abs(number - middle) for number in numbers]
