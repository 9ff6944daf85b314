"""Which samples of a step go through the model together: the plan of its micro-batches.

In come lengths of samples in tokens, known from image headers and texts (`data.lengths`) before anything is decoded;
out come groups of sample numbers. The same lengths give the same groups: nothing is random here and nothing is
remembered. Knows no rows, tensors or recipes.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Groups = list[list[int]]
"""Numbers of samples, those of one micro-batch together."""


@dataclass(frozen=True)
class MicroBatches:
    """How the samples of a step are cut into micro-batches.

    Attributes:
        size: samples of a micro-batch that is padded; what a pack may hold follows from it.
        packed: samples stand end to end, as many as the budget holds; False pads each `size` of them to one length.
        tokens: the budget of a pack; None for `size` times the longest sample, so that a pack is never larger than the
            padded micro-batch of that sample.
        halvings: how often size and budget are halved, for memory that is smaller than was thought.
    """

    size: int
    packed: bool = True
    tokens: int | None = None
    halvings: int = 0

    def groups(self, lengths: Sequence[int]) -> Groups:
        """The micro-batches of one step.

        Example, lengths 800, 300, 2500, 500, 900: with size 1 and packed [[0, 1, 3, 4], [2]], 2500 tokens each;
        padded with size 2 [[0, 1], [2, 3], [4]], which are 1600, 5000 and 900; halved once, each is alone.
        """
        if not self.packed:
            places, size = range(len(lengths)), max(self.size >> self.halvings, 1)
            return [list(places[start : start + size]) for start in places[::size]]
        budget = self.tokens or self.size * max(lengths, default=0)
        return packs_within(lengths, max(budget >> self.halvings, 1))


def positions(lengths: Sequence[int], *, packed: bool) -> int:
    """Tokens of one micro-batch, padding among them: samples of 3 and 5 are 8 in a pack, else 10."""
    return sum(lengths) if packed else len(lengths) * max(lengths)


def packs_within(lengths: Sequence[int], budget: int) -> Groups:
    """Samples in packs of at most `budget` tokens: few packs, and these of even size.

    Best fit decreasing says how many packs are enough. Then the samples are spread over the fewest packs that hold
    them, the longest first and each to the emptiest pack; where that does not fit, the best fit stands. With a budget
    of m times the longest sample there are never more packs than micro-batches of m samples.

    Args:
        lengths: tokens of each sample.
        budget: tokens of a pack. A sample that is longer is a pack of its own: it cannot be cut.
    Returns: the numbers of the samples, in order inside a pack; the largest pack first, as it asks for the most memory.
    Example: lengths 6, 5, 4, 3, 2 and budget 10 give [[0, 2], [1, 3, 4]].
    """
    order = _longest_first(lengths)
    fit = best_fit(lengths, budget)
    for count in range(max(-(-sum(lengths) // budget), 1) if lengths else 0, len(fit) + 1):
        spread = _spread(order, lengths, count)
        if all(len(pack) == 1 or _tokens(pack, lengths) <= budget for pack in spread):
            if count < len(fit) or _largest(spread, lengths) <= _largest(fit, lengths):
                fit = spread
            break
    return sorted((sorted(pack) for pack in fit), key=lambda pack: (-_tokens(pack, lengths), pack[0]))


def plan_steps(
    lengths: Sequence[int], order: Sequence[int], samples_per_step: int, micro_batches: MicroBatches
) -> Iterator[Groups]:
    """The micro-batches of each step of an epoch, as numbers of rows.

    Args:
        lengths: tokens of each row.
        order: the rows of the epoch in whole steps, see `training.sampling.epoch_order`.
        samples_per_step: samples of a step.
        micro_batches: how a step is cut.
    Example: lengths 9, 2, 7, 3, order [2, 1, 0, 3], 2 samples a step, packs of 10 tokens -> [[2, 1]], then [[0], [3]].
    """
    for start in range(0, len(order), samples_per_step):
        step = order[start : start + samples_per_step]
        groups = micro_batches.groups([lengths[row] for row in step])
        yield [[step[place] for place in group] for group in groups]


def best_fit(lengths: Sequence[int], budget: int) -> Groups:
    """Best fit decreasing: the longest sample first, each to the fullest pack that has room, or to one of its own.

    Example: lengths 6, 5, 4, 3, 2 and budget 10 give [[0, 2], [1, 3, 4]]; 4, 4, 4, 3 and budget 12 [[0, 1, 2], [3]].
    """
    packs: Groups = []
    room: list[tuple[int, int]] = []  # tokens left and number of each pack, the fullest first
    for number in _longest_first(lengths):
        place = bisect_left(room, (lengths[number], -1))
        if place == len(room):
            packs.append([])
            left, pack = budget, len(packs) - 1
        else:
            left, pack = room.pop(place)
        packs[pack].append(number)
        insort(room, (left - lengths[number], pack))
    return packs


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """The numbers of the samples, the longest first and equal ones in order."""
    return sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> Groups:
    """`count` packs of about the same size: each sample goes to the emptiest."""
    packs: Groups = [[] for _ in range(count)]
    loads = [(0, pack) for pack in range(count)]
    for number in order:
        load, pack = heapq.heappop(loads)
        packs[pack].append(number)
        heapq.heappush(loads, (load + lengths[number], pack))
    return [pack for pack in packs if pack]


def _tokens(pack: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a pack."""
    return sum(lengths[number] for number in pack)


def _largest(packs: Groups, lengths: Sequence[int]) -> int:
    """Tokens of the largest pack."""
    return max((_tokens(pack, lengths) for pack in packs), default=0)
