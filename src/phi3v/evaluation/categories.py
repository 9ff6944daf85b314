"""Parts of the rows by what they are: categories chosen by themselves, with the scores of each. Dicts in, dicts out.

A category is a value that few rows have to themselves: of a field of the answer (a template's, or of a JSON object's
first level), of the whole expected answer, of the question, or the name of the source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np

from phi3v.evaluation.intervals import estimate, mean
from phi3v.evaluation.paired import LEAST_ROWS, paired_test
from phi3v.evaluation.row_scores import Column

MOST_VALUES = 12
FEWEST_ROWS = 5  # a value on average
MOST_CATEGORIES = 3
NO_VALUE = "(none)"


def choose_categories(predictions: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Name of each category -> its value in every row; at most three categories, those of the answer first.

    A category has 2 to 12 values, five rows or more a value on average, and a value in 95 % of the rows.
    Example: 20 rows that expect "Product: ..., Group: TOPS" or "..., Group: SHOES" -> {"group": ["TOPS", ...]}.
    """
    depth = path_depth({prediction["source"] for prediction in predictions})
    rows = [_values(prediction, depth) for prediction in predictions]
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name, NO_VALUE) for row in rows]
        counts = Counter(values)
        few = 2 <= len(counts) <= MOST_VALUES and len(rows) >= FEWEST_ROWS * len(counts)
        if few and counts[NO_VALUE] <= len(rows) / 20 and _parts(values) not in map(_parts, found.values()):
            found[name] = values
    return dict(list(found.items())[:MOST_CATEGORIES])


def break_down(
    predictions: Sequence[Mapping[str, Any]], metric: str, constant: Column | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """The scores of each category's values, the most frequent value first.

    Args:
        predictions: see `result.prediction_rows`.
        metric: the score that is broken down, one where more is better.
        constant: what the best single answer to all rows gets, row by row; None where that says nothing.
    Example: {"group": {"TOPS": {"rows": 30, "tuned": {"value": 0.9, "low": ..., "high": ..., ...}, "base": None,
    "p": None, "won": None, "lost": None, "constant": 0.1}}}; `p` is None as well where fewer than 6 rows, or photos of
    rows, can be compared.
    """
    return {
        name: {
            value: _scores(predictions, values, value, metric, constant) for value, _ in Counter(values).most_common()
        }
        for name, values in choose_categories(predictions).items()
    }


def _scores(
    predictions: Sequence[Mapping[str, Any]], values: Sequence[str], value: str, metric: str, constant: Column | None
) -> dict[str, Any]:
    """The figures of the rows that have a value."""
    its = np.array([one == value for one in values])
    chosen = [one["scores"] for one, here in zip(predictions, values, strict=True) if here == value]
    groups = np.array([one.get("image_group", place) for place, one in enumerate(predictions)])
    groups = groups[its]
    sides = [side for side in ("tuned", "base") if chosen[0][side] is not None]
    columns = {
        side: Column(metric, None, np.array([scores[side].get(metric) for scores in chosen], np.float64), None, groups)
        for side in sides
    }
    means = dict(zip(sides, estimate(list(columns.values()))[0], strict=True))
    gain = columns["tuned"].values - columns["base"].values if "base" in columns else None
    enough = gain is not None and len(np.unique(groups[~np.isnan(gain)])) >= LEAST_ROWS
    return {
        "rows": len(chosen),
        "tuned": means["tuned"].to_dict(),
        "base": means["base"].to_dict() if gain is not None else None,
        "p": paired_test(columns["tuned"], columns["base"]).p if enough else None,
        "won": int((gain > 0).sum()) if gain is not None else None,
        "lost": int((gain < 0).sum()) if gain is not None else None,
        "constant": None if constant is None else mean(constant.part(its)),
    }


def _parts(values: Sequence[str]) -> list[int]:
    """Which rows belong together, names aside: ["b", "a", "b"] -> [0, 1, 0]."""
    seen: dict[str, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]


def path_depth(sources: Set[str]) -> int:
    """How many parts at a path's end tell files apart: {"x/a/rows.csv", "x/b/rows.csv"} -> 2, {"x/rows.csv"} -> 1."""
    most = max((len(PurePath(one).parts) for one in sources), default=1)
    return next((n for n in range(1, most) if len({PurePath(one).parts[-n:] for one in sources}) == len(sources)), most)


def path_end(source: str, depth: int) -> str:
    """The last parts of a path: "x/a/rows.csv", 2 -> "a/rows.csv"."""
    return str(PurePath(*PurePath(source).parts[-depth:]))


def _values(prediction: Mapping[str, Any], depth: int) -> dict[str, str]:
    """What could be a category of a row, by name; of its file so many parts of the path."""
    expected = prediction["expected"].strip()
    found = {name: one["expected"] for name, one in prediction["fields"].items() if one["expected"] is not None}
    if not prediction["fields"]:
        found = _first_level(expected) or {"answer": expected}
    return found | {"question": prediction["question"].strip(), "source": path_end(prediction["source"], depth)}


def _first_level(text: str) -> dict[str, str]:
    """'{"kind": "scarf", "sizes": [1]}' -> {"kind": "scarf"}; {} for anything but a JSON object."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: str(value) for name, value in values.items() if isinstance(value, str | int | float | bool)}
