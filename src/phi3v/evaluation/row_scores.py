"""The scores of every row by every metric: answers in, columns of numbers out.

A column holds one number per row, NaN where the row has none, and the row's weight in the mean: 1, or for the loss its
trained tokens; and which rows belong together, since they are about one photo. What is computed from columns (means,
intervals, tests) knows nothing of metrics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phi3v.evaluation.choices import multiple_choice
from phi3v.evaluation.fields import MOST, absolute_error, field_accuracy, field_is_right, relaxed_accuracy
from phi3v.evaluation.json_answers import json_errors, json_field_accuracy, json_field_scores, json_valid
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.shares import same_text
from phi3v.evaluation.text_scores import anls, chrf, rouge_l, text_similarity

Numbers = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
"""A number per row; rows with the same one belong together, see `image_groups`."""
MOST_FIELDS = 30  # JSON fields with a column of their own: the most frequent ones, so that keys that are data stay out

TEXT_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda expected, answer: float(same_text(expected, answer)),
    "json_valid": json_valid,
    "json_field_accuracy": json_field_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "similarity": text_similarity,
}
"""Metrics that two texts are enough for: expected, answer -> 0 to 1."""

LABELS = {
    "exact_match": "exact match",
    "field_accuracy": "fields that are right",
    "well_formed": "in the template's form",
    "json_valid": "strict JSON",
    "json_field_accuracy": "JSON values that are right",
    "multiple_choice": "right option",
    "anls": "ANLS",
    "relaxed_accuracy": "number within 5 %",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "similarity": "similarity",
    "absolute_error": "mean absolute error",
    "loss": "loss per trained token",
}


@dataclass(frozen=True)
class Column:
    """One score over all rows.

    Attributes:
        metric: name of the metric.
        field: the field that is scored; None for the whole answer.
        values: a number per row, NaN where the row has none.
        weights: the row's weight in the mean; None for 1.
        groups: which rows belong together; None where each stands for itself.
    """

    metric: str
    field: str | None
    values: Numbers
    weights: Numbers | None = None
    groups: Groups | None = None

    @property
    def name(self) -> str:
        """Its key: "exact_match", "field_accuracy.price"."""
        return self.metric if self.field is None else f"{self.metric}.{self.field}"

    @property
    def unit(self) -> Literal["share", "number"]:
        """Whether scores lie between 0 and 1."""
        return "number" if self.metric in ("absolute_error", "loss") else "share"

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which way is better."""
        return "lower" if self.unit == "number" else "higher"

    def part(self, places: Any) -> Column:
        """The column of some rows, in their order."""
        weights, groups = (None if one is None else one[places] for one in (self.weights, self.groups))
        return replace(self, values=self.values[places], weights=weights, groups=groups)

    def summed(self, numbers: Numbers) -> Numbers:
        """Sums of a number per row over rows that belong together, those first whose group's number is lower.

        Example: numbers [1, 2, 4] with groups [0, 1, 0] -> [5, 2]; without groups, or [0, 1, 2] -> [1, 2, 4].
        """
        if self.groups is None:
            return numbers
        return np.bincount(np.unique(self.groups, return_inverse=True)[1], weights=numbers).astype(np.float64)

    def row(self, position: int) -> float | None:
        """The number of one row, None where it has none."""
        value = float(self.values[position])
        return None if math.isnan(value) else value


def score_rows(
    scoring: Scoring,
    expected: Sequence[str],
    answers: Sequence[str],
    questions: Sequence[str],
    losses: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    groups: Groups | None = None,
) -> dict[str, Column]:
    """Every column of one set of answers, by name, in the order of the report.

    Args:
        scoring: which metrics.
        expected: what should have been answered.
        answers: what was answered, in the same order.
        questions: what was asked.
        losses: loss summed over the trained tokens of each row; None where it is not known row by row.
        tokens: trained tokens of each row.
        groups: which rows belong together; None where each stands for itself.

    Example: metrics exact_match and similarity, expected ["abcd", "cat"], answers ["bcde", "cat"] -> exact_match
    [0, 1], similarity [0.75, 1].
    """
    rows = list(zip(expected, answers, questions, strict=True))
    columns: list[Column] = []
    for metric in scoring.metrics:
        if metric == "field_accuracy":
            columns += _template_columns(scoring, expected, answers)
        elif metric == "multiple_choice":
            columns.append(_column(metric, [multiple_choice(*row) for row in rows]))
        else:
            score = TEXT_METRICS[metric]
            columns.append(_column(metric, [score(wanted, given) for wanted, given, _ in rows]))
        if metric == "json_field_accuracy":
            columns += _json_columns(expected, answers)
        elif metric == "relaxed_accuracy":
            columns.append(_column("absolute_error", [absolute_error(wanted, given) for wanted, given, _ in rows]))
    if losses is not None and tokens is not None:
        weights = np.array(tokens, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(weights > 0, np.array(losses, dtype=np.float64) / weights, np.nan)
        columns.append(Column("loss", None, means, weights))
    found: dict[str, Column] = {}
    for column in columns:
        found.setdefault(column.name, replace(column, groups=groups))  # of a template of JSON both have its errors
    return found


def row_score(scoring: Scoring, expected: str, answer: str, question: str) -> float | None:
    """The score of one row by the primary metric; None where the row has none.

    Example: primary similarity, "abcd", "bcde" -> 0.75; field_accuracy where the expected answer does not have the
    template's form -> None.
    """
    metric = scoring.metrics[0]
    if metric == "field_accuracy":
        wanted = scoring.template.parse(expected)
        return None if wanted is None else field_accuracy(wanted, scoring.template.parse(answer), scoring.numeric)
    if metric == "multiple_choice":
        return multiple_choice(expected, answer, question)
    return TEXT_METRICS[metric](expected, answer)


def scores_of_row(columns: Mapping[str, Column], position: int) -> dict[str, float | None]:
    """The scores of one row for predictions.jsonl: {"exact_match": 0.0, "absolute_error.price": None, ...}."""
    return {name: column.row(position) for name, column in columns.items()}


def _template_columns(scoring: Scoring, expected: Sequence[str], answers: Sequence[str]) -> list[Column]:
    """Columns of the template: all fields together, form, each field, and distances of numbers.

    A row whose expected answer does not have the template's form has none of them.
    """
    template, numeric = scoring.template, scoring.numeric
    pairs = [
        None if wanted is None else (wanted, template.parse(answer))
        for wanted, answer in zip(map(template.parse, expected), answers, strict=True)
    ]
    columns = [
        _column("field_accuracy", [pair and field_accuracy(*pair, numeric) for pair in pairs]),
        _column("well_formed", [pair and float(pair[1] is not None) for pair in pairs]),
    ]
    for name in template.fields:
        texts = [pair and (pair[0][name], pair[1][name] if pair[1] else None) for pair in pairs]
        right = [text and float(field_is_right(*text, name in numeric)) for text in texts]
        columns.append(_column("field_accuracy", right, name))
        if name in numeric:
            columns.append(_column("absolute_error", [text and absolute_error(*text) for text in texts], name))
    return columns


def _json_columns(expected: Sequence[str], answers: Sequence[str]) -> list[Column]:
    """A column for each field of the expected JSON, the most frequent ones first, and for those of which at least 95 %
    of the rows expect numbers their distances."""
    rows = [json_field_scores(wanted, answer) for wanted, answer in zip(expected, answers, strict=True)]
    errors = [json_errors(wanted, answer) for wanted, answer in zip(expected, answers, strict=True)]
    counts, numbers = (Counter(name for row in found for name in row) for found in (rows, errors))
    columns = []
    for name, count in counts.most_common(MOST_FIELDS):
        columns.append(_column("json_field_accuracy", [row.get(name) for row in rows], name))
        if numbers[name] >= MOST * count:
            columns.append(_column("absolute_error", [row.get(name) for row in errors], name))
    return columns


def _column(metric: str, values: Sequence[Any], field: str | None = None) -> Column:
    """A column of numbers and None."""
    return Column(metric, field, np.array([np.nan if value is None else value for value in values], dtype=np.float64))
