"""The order of the samples: every row once an epoch, in whole optimiser steps.

In come a number of rows, the samples of a step, a seed and the epoch; out comes a list of row numbers. The order
depends on nothing else, no global random state among it, so a resumed run goes on with exactly the rows that were to
come.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


def epoch_order(rows: int, samples_per_step: int, seed: int, epoch: int) -> list[int]:
    """Row numbers of one epoch, shuffled, as many as whole steps need.

    The last step of an epoch is filled up from the epoch's own beginning, so every step has the same number of samples
    and no row is left out. Example: 5 rows in steps of 2 give six numbers such as `[3, 0, 4, 1, 2, 3]`.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    wanted = -(-rows // samples_per_step) * samples_per_step
    return [order[place % rows] for place in range(wanted)]


class WholeSteps(Sampler[int]):
    """`epoch_order` in the form a DataLoader takes; see `choose_epoch` for who calls `set_epoch`."""

    def __init__(self, rows: int, samples_per_step: int, seed: int) -> None:
        self.rows = rows
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.rows, self.samples_per_step, self.seed, self.epoch))

    def __len__(self) -> int:
        return -(-self.rows // self.samples_per_step) * self.samples_per_step


def choose_epoch(loader: Any, done: int) -> None:
    """Tells the `WholeSteps` of a loader, however deep it lies, and its samples which epoch the next step is in.

    accelerate tells two samplers deep. A loader of several ranks that goes on inside an epoch has three (the batches
    skipped, those of a rank, those of all), and would begin again with the order of the first epoch. Streams have none.
    Samples are told for the sake of images that are changed at random; those whose features are kept need not know.
    Example: 11 rows in steps of 4 are 3 steps an epoch: done 2 -> epoch 0, 3 -> 1, 4 -> 1.
    """
    found = loader
    while found is not None and not isinstance(found, WholeSteps):
        below = getattr(found, "batch_sampler", None)
        found = getattr(found, "sampler", None) if below is None else below
    if found is not None:
        found.set_epoch(done // (len(found) // found.samples_per_step))
        if hasattr(loader.dataset, "choose_epoch"):
            loader.dataset.choose_epoch(found.epoch)


class EvenSamples(Dataset[Any]):
    """Validation samples, filled up so that all ranks have as many: with copies of the first in which nothing counts.

    Example: 5 samples in batches of 2 on 2 ranks are 8, of which the last three have no label.
    """

    def __init__(self, samples: Any, multiple: int) -> None:
        """Keep the samples and what their number has to be a multiple of."""
        self.samples, self.multiple = samples, multiple

    def __len__(self) -> int:
        return -(-len(self.samples) // self.multiple) * self.multiple

    def __getitem__(self, place: int) -> Any:
        if place < len(self.samples):
            return self.samples[place]
        first = self.samples[0]
        return {**first, "labels": torch.full_like(first["labels"], -100)}
