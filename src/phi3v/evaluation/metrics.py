"""All scores of a list of answers against what was expected: strings in, numbers out; no model, no file.

An answer is one string. Outer white space never counts. Shares carry the interval that every score has (`intervals`),
fields of a template are scored one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from phi3v.evaluation.fields import AnswerTemplate, absolute_error, choose_numeric_fields, field_is_right
from phi3v.evaluation.intervals import shares_of_rows
from phi3v.evaluation.number_texts import parse_number, value_stands_in
from phi3v.evaluation.row_scores import Groups
from phi3v.evaluation.shares import Share, majority_answer, same_text
from phi3v.evaluation.text_scores import text_similarity


@dataclass(frozen=True)
class FieldScore:
    """One field of a templated answer over all rows.

    `accuracy` counts rows whose field is right. For a numeric field `mean_absolute_error` is the mean over the
    `error_rows` rows where a number was expected and answered, and `not_numbers` counts those where none was answered;
    for other fields the three are None. `out_of_form` counts answers without the template's form that hold the expected
    value all the same, as their words or one of their numbers.
    """

    accuracy: Share
    numeric: bool
    mean_absolute_error: float | None = None
    error_rows: int | None = None
    not_numbers: int | None = None
    out_of_form: int | None = None


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


def score_answers(
    expected: Sequence[str],
    answers: Sequence[str],
    template: AnswerTemplate | None = None,
    numeric_fields: Iterable[str] | None = None,
    loss: float | None = None,
    groups: Groups | None = None,
) -> Scores:
    """All scores of a list of answers, row i of which answers row i of `expected`.

    Args:
        expected: what should have been answered.
        answers: what was answered.
        template: how the expected answers were made; None (free text) gives no field scores. A template that cannot be
            read backwards counts as None, and so do rows whose expected answer does not have its form.
        numeric_fields: fields compared as numbers; None chooses those whose expected values are numbers, see
            `choose_numeric_fields`.
        loss: passed through into the result.
        groups: which rows belong together; None where each stands for itself.

    Example: expected ["a: x, b: 1", "a: y, b: 2"], answers ["a: x, b: 3", "nonsense"], template "a: {a}, b: {b}" gives
    exact match 0 of 2, well formed 1 of 2, field a 1 of 2, field b 0 of 2 with mean absolute error 2.0 over 1 row and 1
    without a number.

    Raises: ValueError when the lengths differ; ConfigError when a numeric field is not in the template.
    """
    exact = exact_match(expected, answers, groups)
    likeness = [text_similarity(wanted, answer) for wanted, answer in zip(expected, answers, strict=True)]
    similarity = math.fsum(likeness) / len(likeness) if likeness else 0.0
    if template is None or not template.separable:
        return Scores(len(expected), exact, similarity, loss=loss)
    numeric = choose_numeric_fields(expected, template, numeric_fields)
    wanted_rows, its = _parsed(expected, template, groups)
    given_rows = [template.parse(answers[place]) for place in wanted_rows]
    texts = {
        name: [
            (wanted[name], None if given is None else given[name])
            for wanted, given in zip(wanted_rows.values(), given_rows, strict=True)
        ]
        for name in template.fields
    }
    right = [[field_is_right(*pair, name in numeric) for pair in pairs] for name, pairs in texts.items()]
    well_formed, *shares = shares_of_rows([[row is not None for row in given_rows], *right], its)
    odd = [
        (wanted, answers[at])
        for (at, wanted), given in zip(wanted_rows.items(), given_rows, strict=True)
        if given is None
    ]
    fields = {
        name: replace(
            _field_score(share, pairs, name in numeric),
            out_of_form=sum(value_stands_in(wanted[name], answer, name in numeric) for wanted, answer in odd),
        )
        for (name, pairs), share in zip(texts.items(), shares, strict=True)
    }
    return Scores(len(expected), exact, similarity, well_formed, fields, loss)


def exact_match(expected: Sequence[str], answers: Sequence[str], groups: Groups | None = None) -> Share:
    """Share of answers that equal the expected one, letter by letter, outer white space aside.

    Example: expected ["a cat", "a dog"], answers ["a cat ", "A dog"] -> 1 of 2.
    Raises: ValueError when the two differ in length.
    """
    return shares_of_rows([[same_text(*pair) for pair in zip(expected, answers, strict=True)]], groups)[0]


def majority_fields(
    expected: Sequence[str], template: AnswerTemplate, groups: Groups | None = None
) -> dict[str, Share]:
    """For each field the share of its most frequent value; {} for a template that cannot be read backwards.

    Example: ["a: x, b: 1", "a: x, b: 2"], template "a: {a}, b: {b}" -> {"a": 2 of 2, "b": 1 of 2}.
    """
    if not template.separable:
        return {}
    parsed, its = _parsed(expected, template, groups)
    columns = [[row[name] for row in parsed.values()] for name in template.fields]
    right = [[value.strip() == most for value in values] for values in columns for most in [majority_answer(values)]]
    return dict(zip(template.fields, shares_of_rows(right, its), strict=True))


def _parsed(
    expected: Sequence[str], template: AnswerTemplate, groups: Groups | None
) -> tuple[dict[int, dict[str, str]], Groups | None]:
    """The fields of the expected answers that have the template's form, by place, and which of these rows belong
    together."""
    found = {place: row for place, row in enumerate(map(template.parse, expected)) if row is not None}
    return found, None if groups is None else groups[np.fromiter(found, dtype=np.intp, count=len(found))]


def _field_score(accuracy: Share, pairs: Sequence[tuple[str, str | None]], numeric: bool) -> FieldScore:
    """The score of a field, of what was expected and answered; None stands for an answer without the template's form.

    Example: ("470", "470.00"), ("100", "90"), ("30", None), numeric -> mean absolute error (0 + 10) / 2 = 5.0 over 2
    rows, 1 row without a number.
    """
    if not numeric:
        return FieldScore(accuracy, numeric=False)
    distances = [absolute_error(*pair) for pair in pairs if parse_number(pair[0]) is not None]
    errors = [distance for distance in distances if distance is not None]
    mean = math.fsum(errors) / len(errors) if errors else None
    return FieldScore(accuracy, True, mean, len(errors), len(distances) - len(errors))
