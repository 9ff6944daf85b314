"""The result of a check, and what checks share: two columns compared, some rows out of many; numbers in and out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi3v.evaluation.intervals import estimate
from phi3v.evaluation.paired import paired_test
from phi3v.evaluation.row_scores import Column


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        verdict: "pass", "warn", "fail", or "skipped" where it could not be made.
        line: what was found, for people.
        figures: plain values for JSON.
    """

    verdict: str
    line: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Verdict, line and figures side by side: {"verdict": "pass", "line": "...", "rows": 200}."""
        return {"verdict": self.verdict, "line": self.line, **self.figures}


def compare(one: Column, other: Column | None) -> dict[str, Any]:
    """Two columns on the same rows with intervals and a paired test.

    Example: {"one": {"value": 0.9, ...}, "other": {"value": 0.1, ...}, "difference": {"value": 0.8, ...}, "p": 1e-9,
    "test": "mcnemar", "won": 80, "lost": 0, "tied": 20}; all but `one` are None without another.
    """
    if other is None:
        names = ("other", "difference", "p", "test", "won", "lost", "tied")
        return {"one": estimate([one])[0][0].to_dict(), **dict.fromkeys(names)}
    means, gaps = estimate([one, other], [(one, other)])
    return {
        "one": means[0].to_dict(),
        "other": means[1].to_dict(),
        "difference": gaps[0].to_dict(),
        **vars(paired_test(one, other)),
    }


def few_rows(places: Sequence[int], most: int) -> list[int]:
    """At most so many places, drawn by a fixed seed, in their order: [0, 1, 2, 3, 4, 5], 3 -> [0, 3, 5].

    Evenly spaced ones would be the same question each time, where every photo has a title, a colour and a price.
    """
    return sorted(random.Random(0).sample(places, min(most, len(places))))
