"""What the scores of a sweep's trials say, and what they do not: a ranking in, one line for each remark out.

Two scores whose 95 % intervals do not overlap differ beyond chance; of two that overlap nothing is known, which is less
than a paired test would say.
"""

from collections.abc import Mapping
from typing import Any

from phi3v.evaluation.figures import ends, short_number

Score = Mapping[str, Any]
"""`value`, `low` and `high`, the latter None where there is no interval."""

OVERLAP = "their intervals overlap, which says less than a paired test"
"""What is said of two scores on the same rows that are not tested here."""


def with_ends(score: Score) -> str:
    """A score with its interval: {"value": 0.31, "low": 0.284, "high": 0.35} -> "0.31 (0.284 to 0.35)"."""
    value = short_number(score["value"])
    return value if score["low"] is None else f"{value} ({ends(score, 'number')})"


def apart(one: Score, other: Score) -> bool | None:
    """Whether two intervals do not overlap; None where one of them is not known.

    Example: 0.28 to 0.35 and 0.3 to 0.4 -> False; 0.28 to 0.35 and 0.36 to 0.4 -> True.
    """
    if one["low"] is None or other["low"] is None:
        return None
    return bool(one["low"] > other["high"] or other["low"] > one["high"])


def remarks(ranking: Mapping[str, Any]) -> list[str]:
    """The remarks on a ranking: the best of many, first and second, best and base; none without a complete trial.

    Args:
        ranking: `metric`, `better`, `base` and `trials`, as ranking.json holds them; `base` is None while it was not
            asked.
    """
    complete = [line for line in ranking["trials"] if line["state"] == "complete"]
    found = []
    if len(complete) > 1:
        best = complete[0]
        found.append(
            f"trial {best['trial']} was chosen as the best of {len(complete)} on these held-out rows, so its score is "
            f"too good to expect again: judge it on rows that no trial saw, phi3v evaluate {best['folder']} --data ROWS"
        )
        found.append(_first_and_second(best, complete[1], ranking["metric"] != "eval_loss"))
    if complete and ranking["base"] is not None:
        found.append(_best_and_base(complete[0], ranking["base"], ranking["better"]))
    return found


def _first_and_second(one: Score, other: Score, tested: bool) -> str:
    """Whether the first of a ranking differs from the second."""
    names = f"trials {one['trial']} and {other['trial']}, first and second"
    scores = f"{with_ends(one)} and {with_ends(other)}"
    different = apart(one, other)
    if different:
        return f"{names}, differ beyond chance: {scores}, intervals that do not overlap"
    more = f"; phi3v compare {one['folder']} {other['folder']} tests them row by row" if tested else ""
    why = "one of them has no interval" if different is None else OVERLAP
    return f"{names}: nothing shows that they differ, {scores}, {why}{more}"


def _best_and_base(best: Score, base: Mapping[str, Any], better: str) -> str:
    """Whether the best trial beats what all began with."""
    if "error" in base:
        return f"the base has no score to compare with: {base['error']}"
    scores = f"{with_ends(best)} against {with_ends(base)}"
    different = apart(best, base)
    if not different:
        why = "one of them has no interval" if different is None else OVERLAP
        more = f"; phi3v evaluate {best['folder']} makes one, row by row"
        return f"nothing shows that trial {best['trial']} beats the base: {scores}, {why}{more}"
    ahead = (best["value"] > base["value"]) == (better == "higher")
    told = f"trial {best['trial']} beats the base" if ahead else f"the base beats trial {best['trial']}, the best one,"
    return f"{told} beyond chance: {scores}, intervals that do not overlap"
