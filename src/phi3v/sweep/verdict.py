"""What the scores of a sweep's trials say, and what they do not: their order, and one line for each remark.

Two scores whose 95 % intervals do not overlap differ beyond chance; of two that overlap nothing is known, which is less
than a paired test would say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from phi3v.evaluation.figures import ends, score_name, short_number

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


def ranked(lines: Sequence[dict[str, Any]], minimize: bool, states: Sequence[str]) -> list[dict[str, Any]]:
    """Complete trials, the best first, then pruned ones, those that went furthest first, then the others.

    Among complete ones of equal value the lower held-out loss comes first, then the lower number: by exact match all of
    a short sweep may get 0, and the loss knows better.

    Args:
        lines: the trials as ranking.json holds them.
        minimize: whether a lower value is better.
        states: in their order.
    """

    def place(line: dict[str, Any]) -> tuple[Any, ...]:
        state = states.index(line["state"])
        if line["state"] != "complete":
            return state, 0.0, -max((int(count) for count in line["validations"]), default=0), line["trial"]
        loss = line.get("loss")  # None in sweeps from before it was kept
        return state, line["value"] * (1 if minimize else -1), math.inf if loss is None else loss, line["trial"]

    return sorted(lines, key=place)


def remarks(ranking: Mapping[str, Any]) -> list[str]:
    """The remarks on a ranking: the best of many, equal ones, first and second, best and base; none without a complete
    trial.

    Args:
        ranking: `metric`, `better`, `base` and `trials`, as ranking.json holds them; `base` is None while it was not
            asked.
    """
    complete = [line for line in ranking["trials"] if line["state"] == "complete"]
    judged = len(complete) + sum(line["state"] == "pruned" for line in ranking["trials"])  # on the same rows
    found = []
    if complete and judged > 1:
        best = complete[0]
        found.append(
            f"trial {best['trial']} was chosen as the best of {judged} on these held-out rows, so its score is "
            f"too good to expect again: judge it on rows that no trial saw, phi3v evaluate {best['folder']} --data ROWS"
        )
    if len(complete) > 1:
        if complete[1]["value"] == complete[0]["value"]:
            found.append(_among_equals(complete, ranking["metric"]))
        found.append(_first_and_second(complete[0], complete[1], ranking["metric"] != "eval_loss"))
    if complete and ranking["base"] is not None:
        found.append(_best_and_base(complete[0], ranking["base"], ranking["better"]))
    return found


def _among_equals(complete: Sequence[Mapping[str, Any]], metric: str) -> str:
    """What decided among trials of equal value: "3 trials have the best exact_match, 0: trial 4 stands first by its
    held-out loss, 1.23 (the next one's is 4.56)"."""
    best = complete[0]
    count = sum(line["value"] == best["value"] for line in complete)
    told = f"{count} trials have the best {score_name(metric)}, {short_number(best['value'])}: "
    told += f"trial {best['trial']} stands first"
    loss, second = best.get("loss"), complete[1].get("loss")
    if loss is None or loss == second:
        return f"{told} as the one with the lowest number"
    after = "" if second is None else f" (the next one's is {short_number(second)})"
    return f"{told} by its held-out loss, {short_number(loss)}{after}"


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
