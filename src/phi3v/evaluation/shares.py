"""How many of how many, Wilson's 95 % interval, equal texts and the most frequent one. Strings and counts in.

Wilson's interval stays inside 0..1 and is honest for few rows and for 0 % or 100 %. Which interval a share of rows
has is decided in `intervals`, for every score alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Share:
    """How many of how many, and the 95 % interval of the share, see `intervals.shares_of_rows`."""

    hits: int
    total: int
    value: float
    low: float
    high: float


def wilson_interval(hits: float, total: float) -> tuple[float, float]:
    """The Wilson score interval of a share at 95 %; `hits` may be the sum of scores from 0 to 1, and `total` how many
    independent rows they are worth.

    Example: 9 of 10 -> (0.596, 0.982); 0 of 200 -> (0.0, 0.019); 0 of 0 -> (0.0, 1.0), nothing is known.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = hits / total, Z_95 * Z_95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return (0.0 if hits == 0 else max(0.0, centre - half)), (1.0 if hits == total else min(1.0, centre + half))


def majority_answer(expected: Sequence[str]) -> str:
    """The most frequent expected answer: the best that anyone can do who answers always the same.

    Taken from the scored rows themselves, so no constant answer can beat it. Of equally frequent answers the first one
    counts.

    Example: ["cat", "dog", "dog "] -> "dog"; [] -> "".
    """
    counts = Counter(text.strip() for text in expected)
    return counts.most_common(1)[0][0] if counts else ""


def same_text(expected: str, answer: str) -> bool:
    """Whether two texts are equal letter by letter, outer white space aside."""
    return expected.strip() == answer.strip()
