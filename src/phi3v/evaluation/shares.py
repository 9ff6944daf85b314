"""How many of how many, with Wilson's 95 % interval; exact match and the most frequent answer. Strings in, shares out.

Wilson's interval stays inside 0..1 and is honest for few rows and for 0 % or 100 %.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Share:
    """How many of how many, with the Wilson 95 % interval of the share.

    Example: Share.of(9, 10) has value 0.9, low 0.596 and high 0.982; Share.of(0, 0) has value 0.0 and the interval
    0..1.
    """

    hits: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, total: int) -> Share:
        """Build a share from counts. Raises: ValueError unless 0 <= hits <= total."""
        if not 0 <= hits <= total:
            raise ValueError(f"{hits} of {total} is not a share")
        low, high = wilson_interval(hits, total)
        return cls(hits, total, hits / total if total else 0.0, low, high)


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


def exact_match(expected: Sequence[str], answers: Sequence[str]) -> Share:
    """Share of answers that equal the expected one, letter by letter, outer white space aside.

    Example: expected ["a cat", "a dog"], answers ["a cat ", "A dog"] -> 1 of 2.
    Raises: ValueError when the two differ in length.
    """
    hits = sum(same_text(wanted, answer) for wanted, answer in zip(expected, answers, strict=True))
    return Share.of(hits, len(expected))


def majority_answer(expected: Sequence[str]) -> tuple[str, Share]:
    """The most frequent expected answer and its share: the best that anyone can do who answers always the same.

    Taken from the scored rows themselves, so no constant answer can beat it. Of equally frequent answers the first one
    counts.

    Example: ["cat", "dog", "dog "] -> ("dog", 2 of 3); [] -> ("", 0 of 0).
    """
    if not expected:
        return "", Share.of(0, 0)
    answer, hits = Counter(text.strip() for text in expected).most_common(1)[0]
    return answer, Share.of(hits, len(expected))


def same_text(expected: str, answer: str) -> bool:
    """Whether two texts are equal letter by letter, outer white space aside."""
    return expected.strip() == answer.strip()
