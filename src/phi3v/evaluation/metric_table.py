"""The table of metrics: two sets of answers side by side, with intervals, a test and a control. Columns in, dicts out.

What it makes is `metrics` in evaluation.json, whose keys docs/evaluation.md lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3v.evaluation.headline import ODDS, at_odds, row_label
from phi3v.evaluation.intervals import estimate, mean
from phi3v.evaluation.paired import paired_test
from phi3v.evaluation.row_scores import LABELS, Column

FEW_ERRORS = 20
"""Fewer, and intervals of skewed errors hold the truth in fewer than 9 of 10 cases."""


def metric_table(
    tuned: Mapping[str, Column], base: Mapping[str, Column] | None, constant: Mapping[str, Column]
) -> dict[str, dict[str, Any]]:
    """The figures of each column, by name.

    Args:
        tuned: columns of the target's answers.
        base: columns of what stands beside it, on the same rows; None for nothing.
        constant: columns of the best single answer by each metric, see `constant.constant_columns`.
    """
    beside = [name for name in tuned if base and name in base]
    controlled = [name for name in tuned if name in constant]
    pairs = [(tuned[name], base[name]) for name in beside] if base else []
    controls = [(tuned[name], constant[name]) for name in controlled]
    means, gaps = estimate([*tuned.values(), *(pair[1] for pair in pairs)], [*pairs, *controls])
    found = dict(zip(tuned, means, strict=False))
    others = dict(zip(beside, means[len(tuned) :], strict=True))
    differences = dict(zip(beside, gaps, strict=False))
    above = dict(zip(controlled, gaps[len(pairs) :], strict=True))
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
            "constant": mean(constant[name]) if name in constant else None,
            "over_constant": None
            if name not in constant
            else {"difference": above[name].to_dict(), **vars(paired_test(column, constant[name]))},
        }
    return table


def remarks(
    table: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, int],
    predictions: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """What the figures of a table need to be read with, one line each; none where all is as usual.

    Args:
        table: see `metric_table`.
        images: of the rows, see `image_groups.count_groups`.
        predictions: the rows, see `result.prediction_rows`.
    Example: ["exact match: interval and test of the difference disagree, and the p value decides"].
    """
    found = []
    together = images["rows"] - images["different"]
    if together:
        found.append("rows about the same photo are taken together in intervals and tests")
    few = [row_label(one) for one in table.values() if _is_short(one, together)]
    if few:
        found.append(
            f"{', '.join(few)}: intervals over fewer than {FEW_ERRORS} rows or photos are too short where a few errors "
            "are large"
        )
    found += filter(None, (_few_far_off(name, one, predictions) for name, one in table.items()))
    odd = [row_label(one) for one in table.values() if at_odds(one)]
    if odd:
        found.append(f"{', '.join(odd)}: interval and test of the difference {ODDS}")
    beside = [row_label(one) for one in table.values() if one["over_constant"] and at_odds(one["over_constant"])]
    if beside:
        found.append(f"{', '.join(beside)}: interval and test of the difference to the best single answer {ODDS}")
    return found


def _few_far_off(name: str, figure: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """Says so where a tenth of the rows or fewer hold more than half of a mean error."""
    if figure["metric"] != "absolute_error":
        return None
    said = [one["scores"]["tuned"].get(name) for one in predictions]
    errors = sorted((error for error in said if error is not None), reverse=True)
    if len(errors) < 10 or not sum(errors):
        return None
    few = next(count for count in range(1, len(errors) + 1) if 2 * sum(errors[:count]) > sum(errors))
    if 10 * few > len(errors):
        return None
    rows = "one row makes" if few == 1 else f"{few} rows make"
    return f"{row_label(figure)}: {rows} more than half of it, of {len(errors)}, so its interval is wide"


def _is_short(figure: Mapping[str, Any], together: int) -> bool:
    """Whether an interval of errors is over few rows, of which so many are about photos that others are about too."""
    sides = [side for side in (figure["tuned"], figure["base"]) if side is not None]
    return any(side["interval"] == "studentized" and side["rows"] - together < FEW_ERRORS for side in sides)


def label(column: Column) -> str:
    """What a column is called where people read it: 'field "price", mean absolute error'."""
    words = LABELS[column.metric]
    if column.field is None:
        return words
    return f"{column.field}, {words}" if column.metric == "absolute_error" else column.field
