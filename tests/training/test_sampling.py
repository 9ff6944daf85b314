"""The order of samples: whole steps, every row, nothing but seed and epoch."""

import random
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from phi3v.training.sampling import WholeSteps, choose_epoch, epoch_order


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


def test_a_loader_of_two_ranks_that_goes_on_inside_a_later_epoch_has_that_epochs_order() -> None:
    """With the loaders that accelerate makes: batches skipped, of those of a rank, of those of all."""
    rows = list(range(11))

    def batches(rank: int) -> Any:
        loader = DataLoader(rows, batch_size=2, sampler=WholeSteps(11, 4, seed=7))
        return prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)

    whole = epoch_order(11, 4, 7, 1)
    for rank in (0, 1):
        loader = batches(rank)
        choose_epoch(loader, 4)  # steps done: three of the first epoch, one of the second
        assert [batch.tolist() for batch in skip_first_batches(loader, 1)] == [
            whole[4 + 2 * rank : 6 + 2 * rank],
            whole[8 + 2 * rank : 10 + 2 * rank],
        ]

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows)

    choose_epoch(DataLoader(Stream()), 4)  # which has an order of its own
