"""The control of every score: the best single answer, given to all rows. Texts in, an answer and its columns out.

The most frequent expected answer will not do: where it is an odd one ("not legible" among descriptions) nearly any
other answer gets more by partial credit, and a model that says one thing to all rows would look better than chance. So
many answers are tried, the model's own among them, and the best one counts: no model that gives one of them to all rows
is better than the control. It is chosen on the rows that it is scored on, so it is rather too good than too bad.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from phi3v.evaluation.json_answers import json_leaves
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.row_scores import Column, Groups, row_score, score_rows
from phi3v.evaluation.shares import majority_answer

MOST_EXPECTED, MOST_OWN = 200, 20
"""Different answers that are tried: the most frequent ones of those expected, and of the model's own."""
ROUNDS = ((24, 24), (100, 6), (400, 2))
"""Rows that are scored, and answers that are kept, round by round: some 12,000 scores, then those of six answers."""

Origin = Literal["most frequent", "expected", "fields", "own"]
"""Where an answer is from: see `ConstantAnswer`."""


@dataclass(frozen=True)
class ConstantAnswer:
    """The best single answer to all rows.

    Attributes:
        answer: its text.
        origin: "most frequent" for the most frequent expected answer, "expected" for another expected one, "fields" for
            the one that has the most frequent value in each field, "own" for one that the model gives.
        tried: how many different answers were tried.
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

    Tried are the 200 most frequent expected answers, the one made of the most frequent value of each field, and the 20
    most frequent ones of the model. Few rows choose among many answers, and more rows among the best of these, so that
    long texts and many rows cost little; the most frequent answer of each sort stays in to the end. Of equally good
    ones the most frequent expected answer counts.

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
    always = [*tried]
    for texts, count, origin in ((expected, MOST_EXPECTED, "expected"), (own, MOST_OWN, "own")):
        frequent = [text for text, _ in Counter(text.strip() for text in texts).most_common(count)]
        always += frequent[:1]
        for text in frequent:
            tried.setdefault(text, origin)  # type: ignore[arg-type]
    if not expected or scoring.metrics[0] == "exact_match":  # nothing equals more rows than the most frequent answer
        return ConstantAnswer(most, "most frequent", len(tried))
    best = _best(scoring, list(zip(expected, questions, strict=True)), [*tried], always)
    return ConstantAnswer(best, tried[best], len(tried))


def _best(scoring: Scoring, rows: Sequence[tuple[str, str]], tried: Sequence[str], always: Sequence[str]) -> str:
    """The best of some answers, round by round; `always` stay until the last one."""
    known: dict[tuple[str, str, str], float | None] = {}

    def score(answer: str, row: tuple[str, str]) -> float | None:
        if (answer, *row) not in known:
            known[answer, *row] = row_score(scoring, row[0], answer, row[1])
        return known[answer, *row]

    left, order = list(tried), random.Random(0).sample(range(len(rows)), len(rows))
    for many, kept in ROUNDS:
        some = [rows[place] for place in order[:many]]
        left = [one for one in tried if one in {*_top(score, some, left, kept), *always}]
        if len(some) == len(rows):
            break
    return _top(score, rows, left, 1)[0]


def _top(
    score: Callable[[str, tuple[str, str]], float | None],
    rows: Sequence[tuple[str, str]],
    answers: Sequence[str],
    count: int,
) -> list[str]:
    """The best answers on some rows, the earlier one first of equally good ones."""
    sums = {answer: sum(filter(None, (score(answer, row) for row in rows))) for answer in answers}
    return sorted(answers, key=lambda answer: -round(sums[answer], 9))[:count]


def most_frequent_fields(scoring: Scoring, expected: Sequence[str]) -> str | None:
    """The answer that has the most frequent value in each field; None for answers without fields.

    Example: template "a: {a}, b: {b}", expected "a: x, b: 1", "a: x, b: 2", "a: y, b: 2" -> "a: x, b: 2"; JSON {"a": 1,
    "b": 2} twice and {"a": 1, "c": 3} -> {"a": 1, "b": 2}, the keys that more than half of the objects have.
    """
    if scoring.kind == "json":
        objects = [json.loads(text) for text in expected if json_leaves(text) is not None]
        objects = [one for one in objects if isinstance(one, dict)]
        counts: dict[str, Counter[str]] = {}
        for one in objects:
            for key, value in one.items():
                counts.setdefault(key, Counter())[json.dumps(value, ensure_ascii=False, sort_keys=True)] += 1
        told = {
            key: json.loads(its.most_common(1)[0][0]) for key, its in counts.items() if 2 * its.total() > len(objects)
        }
        return json.dumps(told, ensure_ascii=False) if told else None
    template = scoring.template
    parsed = [row for row in map(template.parse, expected) if row is not None] if template.separable else []
    if scoring.kind != "templated" or not parsed:
        return None
    return template.fill({name: majority_answer([row[name] for row in parsed]) for name in template.fields})


def constant_columns(
    scoring: Scoring,
    expected: Sequence[str],
    questions: Sequence[str],
    groups: Groups | None = None,
    answer: str | None = None,
) -> dict[str, Column]:
    """The control: columns of one answer that is given to every row, by name.

    For a field it is the field's own most frequent value, which no constant can beat. There is none where it says
    nothing: for the form, which a constant answer always has, and for the loss, which it does not have.

    Args:
        scoring: the metrics.
        expected: what should be answered.
        questions: what was asked.
        groups: which rows belong together; None where each stands for itself.
        answer: the answer; None for the best one among those expected.
    """
    if answer is None:
        answer = best_constant(scoring, expected, questions).answer

    def of(text: str, one: Scoring = scoring) -> dict[str, Column]:
        return score_rows(one, expected, [text] * len(expected), questions, groups=groups)

    columns = of(answer)
    if "field_accuracy" in scoring.metrics:
        columns |= _template_fields(scoring, expected, columns)
    if "json_field_accuracy" in scoring.metrics and (filled := most_frequent_fields(scoring, expected)) is not None:
        fields = of(filled, replace(scoring, metrics=("json_field_accuracy",)))
        columns |= {name: fields[name] for name in columns if name.startswith("json_field_accuracy.")}
    return {name: column for name, column in columns.items() if name not in ("well_formed", "json_valid")}


def _template_fields(scoring: Scoring, expected: Sequence[str], columns: Mapping[str, Column]) -> dict[str, Column]:
    """For each field of the template the column of its most frequent value."""
    parsed, found = [scoring.template.parse(text) for text in expected], {}
    for name in scoring.template.fields:
        most = majority_answer([row[name] for row in parsed if row is not None])
        right = [np.nan if row is None else float(row[name].strip() == most) for row in parsed]
        column = f"field_accuracy.{name}"
        found[column] = replace(columns[column], values=np.array(right, dtype=np.float64))
    return found
