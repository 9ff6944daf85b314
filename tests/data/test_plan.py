"""The plan of a step's micro-batches: every sample once, within the budget, few and even packs, nothing random."""

import random

import pytest
import torch

from phi3v.data.plan import MicroBatches, best_fit, packs_within, plan_steps


def tokens(packs: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[number] for number in pack) for pack in packs]


def drawn(seed: int, samples: int) -> list[int]:
    """Lengths as mixed crop grids with texts have them."""
    draw = random.Random(seed)
    return [draw.choice((0, 313, 469, 757, 1921, 2509)) + draw.randint(10, 300) for _ in range(samples)]


@pytest.mark.parametrize(
    ("lengths", "budget", "packs"),
    [
        ([6, 5, 4, 3, 2], 10, [[0, 2], [1, 3, 4]]),
        ([3, 3, 3], 3, [[0], [1], [2]]),
        ([2, 12, 3], 10, [[1], [0, 2]]),  # too long for any pack: alone
        ([12, 12], 10, [[0], [1]]),
        ([4, 4, 4, 4], 10, [[0, 2], [1, 3]]),
        ([9, 1, 1, 1], 10, [[0], [1, 2, 3]]),  # two packs in any case: the small one takes the rest
        ([7, 6, 5, 5, 4, 3], 15, [[0, 3, 5], [1, 2, 4]]),  # best fit alone: 7 + 6, 5 + 5 + 4, and 3 by itself
        ([5, 5, 4, 3, 3], 10, [[0, 1], [2, 3, 4]]),  # spread, one pack would have 11
        ([7, 4, 7, 1, 9], 10, [[4], [0], [2], [1, 3]]),  # spread over three, one pack would have 11
        ([5], 10, [[0]]),
        ([], 10, []),
    ],
)
def test_packs(lengths: list[int], budget: int, packs: list[list[int]]) -> None:
    assert packs_within(lengths, budget) == packs


@pytest.mark.parametrize("samples", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_sample_is_in_one_pack_within_the_budget(samples: int, size: int) -> None:
    for seed in range(30):
        lengths = drawn(seed, samples)
        packs = MicroBatches(size).groups(lengths)
        assert sorted(number for pack in packs for number in pack) == list(range(samples))
        held = tokens(packs, lengths)
        assert max(held) <= size * max(lengths) and held == sorted(held, reverse=True)
        assert sum(lengths) / (size * max(lengths)) <= len(packs) <= -(-samples // size)
        assert all(pack == sorted(pack) for pack in packs)


def test_a_budget_that_is_smaller_than_samples_splits_all_it_can() -> None:
    for seed in range(30):
        lengths = drawn(seed, 16)
        packs = MicroBatches(1, tokens=1000).groups(lengths)
        assert all(len(pack) == 1 or held <= 1000 for pack, held in zip(packs, tokens(packs, lengths), strict=True))
        assert sorted(number for pack in packs for number in pack) == list(range(16))


def test_packs_are_as_few_as_best_fit_makes_and_smaller() -> None:
    assert best_fit([4, 4, 4, 3], 12) == [[0, 1, 2], [3]] and packs_within([4, 4, 4, 3], 12) == [[0, 2], [1, 3]]
    for seed in range(30):
        lengths = drawn(seed, 16)
        few, fit = packs_within(lengths, 6000), best_fit(lengths, 6000)
        assert len(few) <= len(fit) and (len(few) < len(fit) or max(tokens(few, lengths)) <= max(tokens(fit, lengths)))


def test_padding_takes_the_samples_as_they_come() -> None:
    assert MicroBatches(2, packed=False).groups([9, 1, 1, 1, 5]) == [[0, 1], [2, 3], [4]]


def test_nothing_but_lengths_decides() -> None:
    lengths = drawn(3, 40)
    first = packs_within(lengths, 4000)
    random.seed(9)
    torch.manual_seed(9)
    assert packs_within(list(lengths), 4000) == first


def test_packs_form_inside_a_step() -> None:
    lengths, order = [9, 2, 7, 3, 1], [2, 1, 0, 3, 4, 2]
    steps = list(plan_steps(lengths, order, 2, MicroBatches(1, tokens=10)))
    assert steps == [[[2, 1]], [[0], [3]], [[4, 2]]]  # row 2 fills the last step up
