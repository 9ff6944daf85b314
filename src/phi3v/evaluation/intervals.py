"""95 % intervals of means over rows, by resampling the rows: numbers in, numbers out, the same ones every time.

The bootstrap draws as many rows as there are, with replacement, 2,000 times, and looks how much the mean moves. All
columns share the draws. From the resampled means an interval is read in Efron's bias-corrected and accelerated way
(BCa), which corrects plain percentiles for skewness, and errors and losses are skewed. Weighted means (loss per token)
are resampled as ratios of two sums.

Where almost all rows have the same score there is little to resample: 200 of 200 right would give 100 % to 100 %. So a
score from 0 to 1 from whose most frequent value fewer than 10 rows differ gets Wilson's interval, which needs no
variation; of all scores with one mean those of 0 and 1 vary most, so it is on the safe side for others. The difference
of two such scores gets Newcombe's interval, which is made of two of Wilson's and the scores' correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from phi3v.evaluation.row_scores import Column, Numbers
from phi3v.evaluation.shares import wilson_interval

RESAMPLES = 2000
FEW = 10  # rows that differ from the most frequent score
_BLOCK = 1 << 17  # drawn rows at once
_NORMAL = NormalDist()

Ends = tuple[float, float] | tuple[None, None]
"""Lower and upper end of an interval, where there is one."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        value: the mean; None where no row has a score.
        low: lower end; None where no interval can be given, since all rows agree on a figure without an upper end.
        high: upper end.
        interval: "bca", "wilson", "newcombe", or None.
        rows: rows that have a score.
    """

    value: float | None
    low: float | None
    high: float | None
    interval: str | None
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))


def mean(column: Column) -> float | None:
    """The mean of a column, None where no row has a score."""
    return _ratio(*_sums(column.values, column.weights))


def estimate(
    columns: Sequence[Column], pairs: Sequence[tuple[Column, Column]] = (), *, seed: int = 0
) -> tuple[list[Estimate], list[Estimate]]:
    """The mean of each column with its interval, and of first minus second of each pair, all from the same draws.

    A difference is taken over the rows where both have a score.

    Example: 5 rows right and 95 wrong -> 0.05, 0.022 to 0.112 by Wilson; 50 and 50 -> 0.5, 0.4 to 0.6 by the bootstrap.
    Of 100 rows the first gets 60 that the second misses and misses 10 that the second gets: 0.5, 0.36 to 0.63.
    """
    differences = [one.values - other.values for one, other in pairs]
    sums = [_sums(column.values, column.weights) for column in columns]
    sums += [_sums(values, pair[0].weights) for values, pair in zip(differences, pairs, strict=True)]
    found = bca_intervals(sums, seed=seed)
    means = []
    for column, pair, ends in zip(columns, sums, found, strict=False):
        values = column.values[~np.isnan(column.values)]
        careful = column.unit == "share" and _vary_little(values)
        other = wilson_interval(float(values.sum()), len(values)) if careful else None
        means.append(_estimate(_ratio(*pair), ends, other, "wilson", len(values)))
    gaps = []
    for (one, two), values, pair, ends in zip(
        pairs, differences, sums[len(columns) :], found[len(columns) :], strict=True
    ):
        there = ~np.isnan(values)
        careful = one.unit == "share" and _vary_little(values[there])
        other = newcombe_interval(one.values[there], two.values[there]) if careful else None
        gaps.append(_estimate(_ratio(*pair), ends, other, "newcombe", int(there.sum())))
    return means, gaps


def _estimate(
    value: float | None, bootstrap: Ends, careful: tuple[float, float] | None, name: str, rows: int
) -> Estimate:
    """An estimate with the careful interval where there is one, else the bootstrap's."""
    low, high = careful or bootstrap
    return Estimate(value, low, high, None if low is None else name if careful else "bca", rows)


def newcombe_interval(ones: Numbers, others: Numbers) -> tuple[float, float]:
    """Newcombe's interval of the difference of two paired means of scores from 0 to 1 (his method 10, 1998).

    Example: of 50 rows both get 36, the first alone 12 and the second alone 2: 0.2, 0.0569 to 0.3404. 200 of 200
    against 0 of 200: 0.973 to 1.0; the same 200 of 200 twice: -0.019 to 0.019.
    """
    count, one, other = len(ones), float(ones.mean()), float(others.mean())
    low_one, high_one = wilson_interval(float(ones.sum()), count)
    low_other, high_other = wilson_interval(float(others.sum()), count)
    spread = float(ones.std() * others.std())
    shared = float(((ones - one) * (others - other)).mean())
    shared = max(0.0, shared - 0.5 / count) if shared > 0 else shared  # his correction: rather too wide than too narrow
    correlation = shared / spread if spread > 1e-12 else 0.0
    below, above = one - low_one, high_other - other
    down = math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    below, above = other - low_other, high_one - one
    up = math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    return max(-1.0, one - other - down), min(1.0, one - other + up)


def bca_intervals(sums: Sequence[tuple[Numbers, Numbers]], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Ends]:
    """BCa bootstrap intervals of sum(first) / sum(second), one for each pair of arrays with a number per row.

    (None, None) where the ratio does not exist or does not change with the rows.
    """
    if not sums or not len(sums[0][0]):
        return [(None, None)] * len(sums)
    different = {part.tobytes(): part for pair in sums for part in pair}  # most columns have the same weights
    places = {key: place for place, key in enumerate(different)}
    drawn = _resampled_sums(np.stack(list(different.values()), axis=1), resamples, np.random.default_rng(seed))
    return [_bca(*pair, *(drawn[:, places[part.tobytes()]] for part in pair)) for pair in sums]


def _resampled_sums(numbers: Numbers, resamples: int, random: np.random.Generator) -> Numbers:
    """Sums `[resamples, columns]` of columns `[rows, columns]` over drawn rows.

    Example: numbers [[1], [10]], rows drawn [0, 0], [1, 0], [1, 1] -> [[2], [11], [20]].
    """
    rows = len(numbers)
    at_once = min(resamples, max(16, _BLOCK // rows))
    found = []
    for start in range(0, resamples, at_once):
        drawn = random.integers(0, rows, (min(at_once, resamples - start), rows), dtype=np.int32)
        times = np.empty(drawn.shape)
        for place, one in enumerate(drawn):
            times[place] = np.bincount(one, minlength=rows)
        found.append(times @ numbers)
    return np.concatenate(found)


def _bca(tops: Numbers, weights: Numbers, drawn_tops: Numbers, drawn_weights: Numbers) -> Ends:
    """The interval of one ratio from its resampled sums.

    The share of resamples below the ratio gives the bias, the skewness of the ratios without one row each (the
    jackknife) the acceleration; both move the percentiles that are read from 2.5 and 97.5.
    """
    ratio = _ratio(tops, weights)
    kept = drawn_weights > 0
    left = weights.sum() - weights
    if ratio is None or not kept.any() or (left <= 0).any():
        return None, None
    drawn = drawn_tops[kept] / drawn_weights[kept]
    jackknife = (tops.sum() - tops) / left
    away = jackknife.mean() - jackknife
    scale = float((away**2).sum())
    rounding = 1e-12 * max(1.0, abs(ratio))
    if scale <= rounding**2:
        return None, None
    acceleration = float((away**3).sum()) / (6 * scale**1.5)
    below = float((drawn < ratio - rounding).mean() + 0.5 * (abs(drawn - ratio) <= rounding).mean())
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    levels = []
    for normal in (_NORMAL.inv_cdf(0.025), _NORMAL.inv_cdf(0.975)):
        moved = bias + normal
        levels.append(_NORMAL.cdf(bias + moved / max(1 - acceleration * moved, 1e-3)))
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def _sums(values: Numbers, weights: Numbers | None) -> tuple[Numbers, Numbers]:
    """What a row adds above and below the line of the mean; rows without a value add nothing."""
    there = ~np.isnan(values)
    below = there * (np.ones(len(values)) if weights is None else weights)
    return np.where(there, values, 0.0) * below, below


def _ratio(tops: Numbers, weights: Numbers) -> float | None:
    total = math.fsum(weights)
    return math.fsum(tops) / total if total > 0 else None


def _vary_little(values: Numbers) -> bool:
    """Whether there are values, and fewer than `FEW` of them differ from the most frequent one."""
    return len(values) > 0 and len(values) - int(np.unique(values, return_counts=True)[1].max()) < FEW
