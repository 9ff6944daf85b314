"""Weights that train in a short number type, with float32 masters that the optimiser updates.

In come a model whose trainable weights are float32 on a base in a shorter type, and an optimiser; afterwards the model
computes in the short type alone, gradients add up in float32, and the optimiser steps masters whose rounded values the
weights are. An update too small for the short type is kept by the master until it counts. Knows nothing of the Trainer.

A master is the weight's own value before rounding, so it is what is saved: adapters and checkpoints hold float32, and
a run that goes on finds its masters in them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

Masters = Mapping[str, nn.Parameter]


def shorten_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Rounds every trainable float32 weight to `dtype`, and gives what they were, by name.

    Gradients of the rounded weights are float32: those of many micro-batches add up without loss.

    Example: a trainable float32 weight 1.001 is 1.0 in bfloat16 afterwards, and its master 1.001.
    """
    masters = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype == torch.float32:
            masters[name] = nn.Parameter(weight.detach().clone())
            weight.data = weight.data.to(dtype)
            weight.grad_dtype = torch.float32
    return masters


def step_masters(optimizer: torch.optim.Optimizer, model: nn.Module, masters: Masters) -> None:
    """Has an optimiser of `model`'s weights, which has made no step yet, step their masters instead.

    Before each step a master takes its weight's gradient, after it the weight takes the master's value, rounded.
    """
    weights = dict(model.named_parameters())
    pairs = [(weights[name], master) for name, master in masters.items()]
    of_weight = {id(weight): master for weight, master in pairs}
    replaced = 0
    for group in optimizer.param_groups:
        replaced += sum(id(weight) in of_weight for weight in group["params"])
        group["params"] = [of_weight.get(id(weight), weight) for weight in group["params"]]
    assert replaced == len(pairs), "the optimiser has other weights than the model trains"

    def take_gradients(*step: Any) -> None:
        for weight, master in pairs:
            master.grad = weight.grad

    @torch.no_grad()
    def give_values(*step: Any) -> None:
        torch._foreach_copy_([weight for weight, _ in pairs], [master for _, master in pairs])
        for _, master in pairs:
            master.grad = None

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(give_values)


def precise_state(model: nn.Module, masters: Masters) -> dict[str, Any] | None:
    """The model's `state_dict` with masters in place of what is rounded from them; None where there are none.

    A weight that was loaded anew since then, the best of a run say, is no longer its master rounded, and stays.
    """
    if not masters:
        return None
    state = model.state_dict()
    for name, master in masters.items():
        if torch.equal(master.detach().to(state[name].dtype), state[name]):
            state[name] = master.detach()
    return state


def same_in(dtype: torch.dtype, weights: Iterable[torch.Tensor]) -> bool:
    """Whether `dtype` holds each of these weights exactly, as bfloat16 does those of a file in bfloat16."""
    return all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights)
