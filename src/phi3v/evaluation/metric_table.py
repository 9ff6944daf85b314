"""The table of metrics: two sets of answers side by side, with intervals, a test and a control. Columns in, dicts out.

What it makes is `metrics` in evaluation.json, whose keys docs/evaluation.md lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3v.evaluation.headline import at_odds
from phi3v.evaluation.intervals import estimate, mean
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.metrics import majority_fields
from phi3v.evaluation.paired import paired_test
from phi3v.evaluation.row_scores import LABELS, Column, score_rows
from phi3v.evaluation.shares import majority_answer

FEW_ERRORS = 20
"""Fewer, and intervals of skewed errors hold the truth in fewer than 9 of 10 cases."""


def metric_table(
    tuned: Mapping[str, Column], base: Mapping[str, Column] | None, constant: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """The figures of each column, by name.

    Args:
        tuned: columns of the target's answers.
        base: columns of what stands beside it, on the same rows; None for nothing.
        constant: what the most frequent answer gets, by name; see `constant_scores`.
    """
    beside = [name for name in tuned if base and name in base]
    pairs = [(tuned[name], base[name]) for name in beside] if base else []
    means, gaps = estimate([*tuned.values(), *(pair[1] for pair in pairs)], pairs)
    found = dict(zip(tuned, means, strict=False))
    others = dict(zip(beside, means[len(tuned) :], strict=True))
    differences = dict(zip(beside, gaps, strict=True))
    tests = {name: paired_test(*pair) for name, pair in zip(beside, pairs, strict=True)}
    table = {}
    for name, column in tuned.items():
        there = name in others
        table[name] = {
            "metric": column.metric,
            "field": column.field,
            "label": label(column),
            "unit": column.unit,
            "better": column.better,
            "tuned": found[name].to_dict(),
            "base": others[name].to_dict() if there else None,
            "difference": differences[name].to_dict() if there else None,
            **(vars(tests[name]) if there else dict.fromkeys(("p", "test", "won", "lost", "tied"))),
            "constant": constant.get(name),
        }
    return table


def remarks(table: Mapping[str, Mapping[str, Any]], images: Mapping[str, int]) -> list[str]:
    """What the figures of a table need to be read with, one line each; none where all is as usual.

    Args:
        table: see `metric_table`.
        images: of the rows, see `image_groups.count_groups`.
    Example: ["exact match: interval and test of the difference disagree, and the test decides"].
    """
    found = []
    together = images["rows"] - images["different"]
    if together:
        found.append("rows about the same photo are taken together in intervals and tests")
    few = [one["label"] for one in table.values() if _is_short(one, together)]
    if few:
        found.append(
            f"{', '.join(few)}: intervals over fewer than {FEW_ERRORS} rows or photos are too short where a few errors "
            "are large"
        )
    odd = [one["label"] for one in table.values() if at_odds(one)]
    if odd:
        found.append(f"{', '.join(odd)}: interval and test of the difference disagree, and the test decides")
    return found


def _is_short(figure: Mapping[str, Any], together: int) -> bool:
    """Whether an interval of errors is over few rows, of which so many are about photos that others are about too."""
    sides = [side for side in (figure["tuned"], figure["base"]) if side is not None]
    return any(side["interval"] == "studentized" and side["rows"] - together < FEW_ERRORS for side in sides)


def constant_scores(scoring: Scoring, expected: Sequence[str], questions: Sequence[str]) -> dict[str, float | None]:
    """The control: what the most frequent expected answer gets when it is given to every row, by name of the column.

    For a field of the template it is the share of the field's own most frequent value, which no constant can beat. None
    where the figure says nothing: the form of the answer.
    """
    answers = [majority_answer(expected)] * len(expected)
    columns = score_rows(scoring, expected, answers, questions)
    means = {name: mean(column) for name, column in columns.items()}
    if "field_accuracy" in scoring.metrics:
        for name, share in majority_fields(expected, scoring.template).items():
            means[f"field_accuracy.{name}"] = share.value
    return means | dict.fromkeys(("well_formed", "json_valid"))


def label(column: Column) -> str:
    """What a column is called where people read it: 'field "price", mean absolute error'."""
    words = LABELS[column.metric]
    if column.field is None:
        return words
    return f"{column.field}, {words}" if column.metric == "absolute_error" else column.field
