"""How many rows of each set an epoch has, and which: several sets mixed by weight.

In come the numbers of rows and weights; out come positions, and what these hold of each set. The choice depends on
numbers, weights and the seed alone. Knows nothing about rows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class SetUse:
    """What an epoch holds of a set.

    Attributes:
        source: the set.
        rows: its rows to train on, before weights and `data.max_rows`.
        epoch: rows of it in an epoch, repeated ones as often as they come.
        left_out: of `rows`, those that do not come at all.
    """

    source: str
    rows: int
    epoch: int
    left_out: int


def shares(sizes: Sequence[int], weights: Sequence[float], most: int | None = None) -> list[int]:
    """Rows of each set in an epoch, which has as many rows as all sets together, or `most`, divided as the weights say.

    The largest remainders are rounded up, the first of equal ones before others. A set without rows has no share, which
    falls to the others.
    Example: sizes [100, 20] with weights [1, 1] -> [60, 60]; sizes [5, 0, 5] with weights [2, 9, 1] -> [7, 0, 3].
    """
    weights = [weight if size else 0.0 for size, weight in zip(sizes, weights, strict=True)]
    if not any(weights):
        return [0] * len(sizes)
    total = sum(sizes) if most is None else min(most, sum(sizes))
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda place: (whole[place] - exact[place], place))
    for place in order[: total - sum(whole)]:
        whole[place] += 1
    return whole


def choose(size: int, wanted: int, seed: int, name: str) -> list[int]:
    """Positions of `wanted` rows out of `size`: every row equally often, but for a remainder drawn by the seed.

    Example: size 3, wanted 7 -> [0, 1, 2, 0, 1, 2] and one of 0, 1, 2; size 5, wanted 2 -> two of them, ascending.
    """
    if not size:
        return []
    drawn = sorted(Random(f"mix {seed} {name}").sample(range(size), wanted % size))
    return list(range(size)) * (wanted // size) + drawn


def mix(
    set_numbers: Sequence[int], sets: int, weights: Sequence[float], seed: int, most: int | None = None
) -> list[int]:
    """Positions of an epoch's rows among all rows.

    Args:
        set_numbers: for each row the number of its set.
        sets: how many sets there are.
        weights: one for each.
        seed: decides which rows of a set stand in an epoch once more, or at all.
        most: rows of an epoch at most; None for as many as all sets have.
    Example: set_numbers [0, 0, 0, 1] with weights [1, 1] -> two positions of 0, 1, 2, then 3 and 3.
    """
    members: list[list[int]] = [[] for _ in range(sets)]
    for position, number in enumerate(set_numbers):
        members[number].append(position)
    wanted = shares([len(found) for found in members], weights, most)
    return [
        found[place]
        for number, found in enumerate(members)
        for place in choose(len(found), wanted[number], seed, str(number))
    ]


def set_uses(sources: Sequence[str], set_numbers: Sequence[int], positions: Sequence[int]) -> list[SetUse]:
    """What an epoch holds of each set.

    Args:
        sources: the names of the sets.
        set_numbers: for each row the number of its set.
        positions: the rows of an epoch.
    Example: ["a", "b"], [0, 0, 0, 1], [0, 2, 3, 3] -> SetUse("a", rows=3, epoch=2, left_out=1) and
        SetUse("b", rows=1, epoch=2, left_out=0).
    """
    rows, epoch = Counter(set_numbers), Counter(set_numbers[position] for position in positions)
    different = Counter(set_numbers[position] for position in set(positions))
    return [SetUse(name, rows[n], epoch[n], rows[n] - different[n]) for n, name in enumerate(sources)]
