"""All scores of a list of answers against what was expected: strings in, numbers out; no model, no file.

An answer is one string. Outer white space never counts. Shares carry Wilson's interval (`shares`), fields of a template
are scored one by one (`fields`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from phi3v.evaluation.fields import AnswerTemplate, FieldScore, choose_numeric_fields, score_field
from phi3v.evaluation.shares import Share, exact_match
from phi3v.evaluation.text_scores import text_similarity


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
