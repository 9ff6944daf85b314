"""Is one set of answers better than another one on the same rows, or is it chance? Numbers in, p values out.

Both tests ask what would happen if the two had changed their answers at random row by row, which they might if neither
were better. For scores of 0 and 1 that is McNemar's test, computed exactly; for others the signs of the rows'
differences are flipped: all ways where there are few rows that differ, 9,999 random ones else, so that no p value is
below 0.0001 there. Rows that belong together change together. All p values are two-sided. The same numbers give the
same p value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from phi3v.evaluation.row_scores import Column, Numbers

LEAST_ROWS = 6
"""Fewer cannot tell: 5 rows that all are better have p = 0.06."""
POWER_Z = 0.84
"""Of a normal distribution 80 % lie below."""
FLIPS = 9999
FEW_ROWS = 13  # 8,192 ways to flip them: fewer than are drawn
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float64)


@dataclass(frozen=True)
class PairedTest:
    """What a paired test found.

    Attributes:
        p: two-sided p value; None where no row has both scores.
        test: "mcnemar" or "sign_flip".
        won: rows where the first is better.
        lost: rows where it is worse.
        tied: rows where both are as good.
    """

    p: float | None
    test: str
    won: int
    lost: int
    tied: int


def paired_test(one: Column, other: Column, *, seed: int = 0) -> PairedTest:
    """Tests two columns of the same metric, with the same groups, on the rows where both have a score.

    Example: right [1, 1, 1, 0], [0, 0, 1, 0] -> won 2, lost 0, tied 2, McNemar's p = 2 * (1/2)^2 = 0.5; the first two
    about one photo -> one sum of 2 to flip, p = 1.0.
    """
    differences = one.values - other.values
    there = ~np.isnan(differences)
    differences = differences[there]
    gain = differences if one.better == "higher" else -differences
    won, lost = int((gain > 0).sum()), int((gain < 0).sum())
    binary = np.isin(one.values[there], (0.0, 1.0)).all() and np.isin(other.values[there], (0.0, 1.0)).all()
    weights = 1.0 if one.weights is None else one.weights[there]
    sums = one.part(there).summed(differences * weights)
    if binary and one.unit == "share" and (abs(sums) <= 1).all():
        p, name = mcnemar_p(int((sums > 0).sum()), int((sums < 0).sum())), "mcnemar"
    else:
        p, name = sign_flip_p(sums, seed=seed), "sign_flip"
    return PairedTest(p if len(gain) else None, name, won, lost, len(gain) - won - lost)


def rows_to_show(one: Column, other: Column) -> int:
    """How many rows like these (photos, where rows are grouped) show their mean difference, in four of five draws.

    By the normal approximation of the sign-flip test, whose null has the differences' root mean square as its spread;
    and so many at least that six differ, in two digits. Example: 2 of 7 rows are lost -> 25; all of 5 -> 6.
    Raises: ValueError where the mean difference is 0.
    """
    gaps = (one.values - other.values) * (1.0 if one.weights is None else one.weights)
    sums = one.part(~np.isnan(gaps)).summed(gaps[~np.isnan(gaps)])
    mean = abs(float(sums.mean()))
    if mean == 0:
        raise ValueError("there is no difference to show")
    spread = 1.96 * math.sqrt(float((sums**2).mean())) + POWER_Z * float(sums.std())
    needed = max((spread / mean) ** 2, LEAST_ROWS / float((sums != 0).mean()))
    step = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return max(LEAST_ROWS, math.ceil(needed / step - 1e-9) * step)


def mcnemar_p(won: int, lost: int) -> float:
    """Exact two-sided p value of McNemar's test: a fair coin for each row that only one of the two got right.

    Example: 2, 0 -> 0.5; 9, 1 -> 2 * (1 + 10) / 1024 = 0.0215; 5, 5 and 0, 0 -> 1.0; 191, 0 -> 6.4e-58.
    """
    count, fewer = won + lost, min(won, lost)
    if count == 0:
        return 1.0
    places = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((count - places + 1) / places))]) - count * math.log(2)
    most = float(logs.max())
    return min(1.0, 2 * math.exp(most) * float(np.exp(logs - most).sum()))


def sign_flip_p(differences: Numbers, *, seed: int = 0) -> float:
    """Two-sided p value of the sum of paired differences, by flipping signs.

    Example: [0.5, 0.2, 0.0]: of the sums ±0.5 ± 0.2 two in four are as far from 0 as 0.7 -> 0.5. No difference -> 1.0.
    """
    numbers = differences[differences != 0]
    if not len(numbers):
        return 1.0
    total = float(numbers.sum())
    far = abs(total) * (1 - 1e-9)  # sums that differ by rounding alone count as equal
    if len(numbers) <= FEW_ROWS:
        ways = np.arange(2 ** len(numbers))[:, None] >> np.arange(len(numbers)) & 1
        return float((abs(total - 2 * (ways @ numbers)) >= far).mean())
    random, taken = np.random.default_rng(seed), np.zeros(FLIPS)
    for start in range(0, len(numbers), 8):  # a random byte flips eight rows: their 256 sums are looked up
        eight = numbers[start : start + 8]
        taken += (_BITS[:, : len(eight)] @ eight)[random.integers(0, 256, FLIPS, dtype=np.uint8)]
    return (1 + int((abs(total - 2 * taken) >= far).sum())) / (1 + FLIPS)
