"""95 % intervals of means over rows, by resampling the rows: numbers in, numbers out, the same ones every time.

The bootstrap draws as many rows as there are, with replacement, 2,000 times, and looks how much the mean moves. All
columns share the draws. Rows that belong together are drawn together. Weighted means (loss per token) are resampled as
ratios of two sums. From the resampled means of scores an interval is read in Efron's bias-corrected and accelerated way
(BCa). Errors and losses have no upper end and are skewed: where they are few, the large ones are missing from the rows.
Their intervals are studentized, which hold the truth more often then.

Where almost all rows have the same score there is little to resample: 200 of 200 right would give 100 % to 100 %. So a
score from 0 to 1 from whose most frequent value fewer than 10 rows (or groups) differ gets Wilson's interval, which
needs no variation; of all scores with one mean those of 0 and 1 vary most, so it is on the safe side for others. The
difference of two such scores gets Newcombe's interval, which is made of two of Wilson's and the scores' correlation.
Both take the rows of a group for one row, as if they always agreed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.evaluation.row_scores import Column, Groups, Numbers
from phi3v.evaluation.shares import Share, wilson_interval

RESAMPLES = 2000
FEW = 10  # rows, or groups of them, that differ from the most frequent score
FEWEST = 3  # rows that an interval of errors is read from
_BLOCK = 1 << 17  # drawn rows at once
_NORMAL = NormalDist()

Ends = tuple[float, float] | tuple[None, None]
"""Lower and upper end of an interval, where there is one."""
Sums = tuple[Numbers, Numbers]
"""What each row, or group of rows, adds above and below the line of a mean."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        value: the mean; None where no row has a score.
        low: lower end; None where no interval can be given, since all rows agree on a figure without an upper end, or
            are fewer than 3 of one.
        high: upper end.
        interval: "bca", "studentized", "wilson", "newcombe", or None.
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
    return _ratio(*_sums(column))


def estimate(
    columns: Sequence[Column], pairs: Sequence[tuple[Column, Column]] = (), *, seed: int = 0
) -> tuple[list[Estimate], list[Estimate]]:
    """The mean of each column with its interval, and of first minus second of each pair, all from the same draws.

    A difference is taken over the rows where both have a score. All columns have the same groups.

    Example: 5 rows right and 95 wrong -> 0.05, 0.022 to 0.112 by Wilson; 50 and 50 -> 0.5, 0.4 to 0.6 by the bootstrap.
    Of 100 rows the first gets 60 that the second misses and misses 10 that the second gets: 0.5, 0.36 to 0.63.
    """
    every = [*columns, *(replace(one, values=one.values - other.values) for one, other in pairs)]
    sums = [_sums(column) for column in every]
    numbers = [place for place, column in enumerate(every) if column.unit == "number"]
    found = bootstrap_intervals(sums, studentized=numbers, seed=seed)
    means = [_mean(*one) for one in zip(columns, sums, found, strict=False)]
    rest = zip(pairs, every[len(columns) :], sums[len(columns) :], found[len(columns) :], strict=True)
    return means, [_gap(*one) for one in rest]


def shares_of_rows(right: Sequence[Sequence[bool]], groups: Groups | None = None) -> list[Share]:
    """How many rows of how many, for each list of right and wrong ones, with the interval that `estimate` gives.

    Args:
        right: lists of one length.
        groups: which rows belong together; None where each stands for itself.
    Example: 9 of 10 -> 0.596 to 0.982; of 10 rows about one photo -> 0.168 to 0.998; no rows -> 0 of 0, 0 to 1.
    """
    columns = [Column("exact_match", None, np.array(one, dtype=np.float64), groups=groups) for one in right]
    found = []
    for one, mean in zip(columns, estimate(columns)[0], strict=True):
        low, high = (0.0, 1.0) if mean.low is None or mean.high is None else (mean.low, mean.high)
        found.append(Share(int(one.values.sum()), len(one.values), mean.value or 0.0, low, high))
    return found


def _mean(column: Column, sums: Sums, ends: Ends) -> Estimate:
    """The estimate of a column: Wilson's interval where its scores vary little, else the bootstrap's."""
    there, value = ~np.isnan(column.values), _ratio(*sums)
    if column.unit == "number":
        ends = ends if ends[0] is None else (max(0.0, ends[0]), ends[1])  # errors and losses are not below 0
        return _estimate(value, ends, "studentized", there)
    if not _vary_little(sums):
        return _estimate(value, ends, "bca", there)
    worth = _worth(column, there)
    hits = float(column.values[there].sum()) * (worth / int(there.sum()))
    return _estimate(value, wilson_interval(hits, worth), "wilson", there)


def _gap(pair: tuple[Column, Column], gap: Column, sums: Sums, ends: Ends) -> Estimate:
    """The estimate of a difference: Newcombe's interval where it varies little, else the bootstrap's."""
    there, value = ~np.isnan(gap.values), _ratio(*sums)
    if gap.unit == "number":
        return _estimate(value, ends, "studentized", there)
    if not _vary_little(sums):
        return _estimate(value, ends, "bca", there)
    ones, others = (column.values[there] for column in pair)
    return _estimate(value, newcombe_interval(ones, others, _worth(gap, there)), "newcombe", there)


def _estimate(value: float | None, ends: Ends, name: str, there: npt.NDArray[np.bool_]) -> Estimate:
    low, high = ends
    return Estimate(value, low, high, None if low is None else name, int(there.sum()))


def _worth(column: Column, there: npt.NDArray[np.bool_]) -> float:
    """How many independent rows the rows that are there are worth if all of a group say the same (Kish's number).

    Example: 200 rows without groups -> 200; 10 in each of 20 groups -> 20; 191 in one and 9 alone -> 1.1.
    """
    sizes = column.summed(there.astype(np.float64))
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def newcombe_interval(ones: Numbers, others: Numbers, worth: float | None = None) -> tuple[float, float]:
    """Newcombe's interval of the difference of two paired means of scores from 0 to 1 (his method 10, 1998).

    `worth` is how many independent rows they are worth, None for as many as there are.

    Example: of 50 rows both get 36, the first alone 12 and the second alone 2: 0.2, 0.0569 to 0.3404. 200 of 200
    against 0 of 200: 0.973 to 1.0; the same 200 of 200 twice: -0.019 to 0.019.
    """
    one, other = float(ones.mean()), float(others.mean())
    count = float(len(ones)) if worth is None else worth
    low_one, high_one = wilson_interval(float(ones.sum()) * (count / len(ones)), count)
    low_other, high_other = wilson_interval(float(others.sum()) * (count / len(ones)), count)
    spread = float(ones.std() * others.std())
    shared = float(((ones - one) * (others - other)).mean())
    shared = max(0.0, shared - 0.5 / count) if shared > 0 else shared  # his correction: rather too wide than too narrow
    correlation = shared / spread if spread > 1e-12 else 0.0
    below, above = one - low_one, high_other - other
    down = math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    below, above = other - low_other, high_one - one
    up = math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    return max(-1.0, one - other - down), min(1.0, one - other + up)


def bootstrap_intervals(
    sums: Sequence[Sums], *, studentized: Collection[int] = (), resamples: int = RESAMPLES, seed: int = 0
) -> list[Ends]:
    """Bootstrap intervals of sum(first) / sum(second), one for each pair of arrays with a number per row or group.

    Those of the places in `studentized` are studentized, others BCa. (None, None) where the ratio does not exist, does
    not change with the rows, or has fewer than `FEWEST` of them to be studentized with.
    """
    if not sums or not len(sums[0][0]):
        return [(None, None)] * len(sums)
    parts = [
        (tops, weights, tops**2, tops * weights, weights**2) if place in studentized else (tops, weights)
        for place, (tops, weights) in enumerate(sums)
    ]
    different = {part.tobytes(): part for some in parts for part in some}  # most columns have the same weights
    places = {key: place for place, key in enumerate(different)}
    drawn = _resampled_sums(np.stack(list(different.values()), axis=1), resamples, np.random.default_rng(seed))
    return [
        (_studentized if place in studentized else _bca)(
            *sums[place], *(drawn[:, places[one.tobytes()]] for one in some)
        )
        for place, some in enumerate(parts)
    ]


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


def _studentized(tops: Numbers, weights: Numbers, *drawn: Numbers) -> Ends:
    """The interval of one ratio from resampled sums of tops, weights, tops², tops x weights and weights².

    Each resample's distance from the ratio is measured by the resample's own standard error, which is small where rare
    large values are missing. A resample of equal values has none, so all spreads are widened by half a row's.
    """
    ratio, count = _ratio(tops, weights), int((weights > 0).sum())
    if ratio is None or count < FEWEST:
        return None, None
    spread = float(((tops - ratio * weights) ** 2).mean())
    if spread <= (1e-12 * max(1.0, abs(ratio)) * float(weights.mean())) ** 2:
        return None, None
    drawn_tops, drawn_weights, squares, products, squared_weights = (one[drawn[1] > 0] for one in drawn)
    ratios = drawn_tops / drawn_weights
    spreads = np.maximum(squares - 2 * ratios * products + ratios**2 * squared_weights, 0) / len(tops)
    wider = spread / (2 * count)
    distances = (ratios - ratio) * drawn_weights / np.sqrt(spreads + wider)
    far, near = np.quantile(distances, (0.975, 0.025)) * math.sqrt(spread + wider) / float(weights.sum())
    return ratio - float(far), ratio - float(near)


def _sums(column: Column) -> Sums:
    """What rows, or rows that belong together, add above and below the line of the mean; rows without a value add
    nothing.

    Example: values [1, 0, nan, 1], groups [0, 0, 1, 2] -> [1, 0, 1] and [2, 0, 1].
    """
    there = ~np.isnan(column.values)
    below = there * (np.ones(len(there)) if column.weights is None else column.weights)
    return column.summed(np.where(there, column.values, 0.0) * below), column.summed(below)


def _ratio(tops: Numbers, weights: Numbers) -> float | None:
    total = math.fsum(weights)
    return math.fsum(tops) / total if total > 0 else None


def _vary_little(sums: Sums) -> bool:
    """Whether there are means of rows or groups, and fewer than `FEW` of them differ from the most frequent one."""
    there = sums[1] > 0
    values = sums[0][there] / sums[1][there]
    return len(values) > 0 and len(values) - int(np.unique(values, return_counts=True)[1].max()) < FEW
