"""The order of samples: whole steps, every row, nothing but seed and epoch."""

import random

import torch

from phi3v.training.sampling import WholeSteps, epoch_order


def test_every_row_is_there_and_every_step_is_whole() -> None:
    for rows in (1, 2, 5, 8, 17):
        for samples in (1, 2, 4, 16):
            order = epoch_order(rows, samples, seed=3, epoch=1)
            assert len(order) % samples == 0 and len(order) - rows < samples
            assert sorted(order[:rows]) == list(range(rows))
            assert order[rows:] == [order[place % rows] for place in range(rows, len(order))]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(50, 8, seed=1, epoch=2)
    torch.manual_seed(99)
    random.seed(99)
    assert epoch_order(50, 8, seed=1, epoch=2) == first
    assert epoch_order(50, 8, seed=1, epoch=3) != first != epoch_order(50, 8, seed=2, epoch=2)


def test_the_sampler_follows_its_epoch() -> None:
    sampler = WholeSteps(5, 4, seed=7)
    assert len(sampler) == 8
    assert list(sampler) == epoch_order(5, 4, 7, 0)
    sampler.set_epoch(3)
    assert list(sampler) == epoch_order(5, 4, 7, 3)
