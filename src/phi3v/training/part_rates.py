"""A learning rate of its own for a part of the model.

In come an optimiser that has made no step and rates by part; its groups are cut by part afterwards, and a schedule
that is made then moves each group's rate in proportion. Knows nothing of the Trainer.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from phi3v.tuning import part_of


def set_part_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Cuts the groups of an optimiser by part of the model.

    Args:
        optimizer: of the model's own weights, in any groups.
        model: whose names say which part a weight belongs to.
        rates: {"vision tower": 1e-6} for instance; parts that are not named keep their group's rate.
    Example: one group of three weights, one of them the projector's with a rate of its own -> two groups.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_part: dict[str, list[Any]] = defaultdict(list)
        for weight in group["params"]:
            by_part[part_of(names[id(weight)])].append(weight)
        for part, weights in by_part.items():
            groups.append({**group, "params": weights, "lr": rates.get(part, group["lr"])})
    optimizer.param_groups[:] = groups
