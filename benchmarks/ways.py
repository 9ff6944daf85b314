"""The ways of doing one training step that are compared here, each as a model, its batches and its loss.

In come a size and a name; out comes a `Way`, and what runs a step of it. What others do is in `others.py`, our own in
`ours.py`. Knows no clock beyond `synchronise`.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from others import joined, joined_batches
from ours import Parts, loss_of, part, set_up
from torch import nn

from phi3v.model.configuration_phi3_v import Phi3VConfig

Example = dict[str, torch.Tensor]
Batch = dict[str, Any]

WAYS = {
    "guide": "(a) the guide: eager attention, checkpointing, 17 crops, fp32 logits and adapters",
    "peft": "(b) transformers + PEFT: sdpa, real crops, all logits, fp32 adapters under autocast",
    "peft16": "(b) with adapters in the base's number type, which is faster",
    "compiled": "(c) the faster (b) with torch.compile for each layer",
    "compiled-liger": "(c) the same with Liger's rope and norm, whose SwiGLU does not compile",
    "liger": "the faster (b) with Liger's rope, norm and SwiGLU",
    "ours-eager": "ours, packed, PEFT's layers, nothing compiled",
    "ours-compiled": "ours, packed, torch.compile for each layer",
    "ours-padded": "ours, padded, hand-written layers",
    "ours-lean": "ours with every twelfth layer computed twice",
    "ours": "ours, packed, hand-written layers",
}
"""Name -> what it is. The first six are what a user could run instead."""

PARTS = {
    "ours-eager": Parts(fast_lora=False, compiled=False),
    "ours-compiled": Parts(fast_lora=False),
    "ours-padded": Parts(packed=False),
    "ours-lean": Parts(checkpointing=12),
    "ours": Parts(),
}


@dataclass
class Way:
    """One way of training.

    Attributes:
        name: a key of `WAYS`.
        model: the model with its adapter, in training mode.
        batches: examples and samples of a micro-batch -> micro-batches of a step.
        loss: micro-batch and trained tokens of the step -> loss, a part of the step's mean.
        autocast: number type of mixed precision, None for none.
        note: what of the way could not be had, or which of its parts ran.
        masters: float32 masters of weights that compute in a shorter type, by name.
    """

    name: str
    model: nn.Module
    batches: Callable[[list[Example], int], list[Batch]]
    loss: Callable[[Batch, int], torch.Tensor]
    autocast: torch.dtype | None
    note: str = ""
    masters: dict[str, nn.Parameter] = field(default_factory=dict)

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        """The weights that train; found once, as a training of ours does: it spares the others a walk over modules."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]


def make_way(name: str, config: Phi3VConfig, *, device: str, dtype: torch.dtype, parts: Parts | None = None) -> Way:
    """A way at a size.

    Args:
        name: a key of `WAYS`, or any name of ours with `parts`.
        config: sizes.
        device: cpu, cuda or meta.
        dtype: of the base.
        parts: of ours, where they are not those of the name.
    """
    if name in ("guide", "peft", "peft16", "compiled", "compiled-liger", "liger"):
        fp32 = name in ("guide", "peft")
        kind, slots = name.removesuffix("16"), 17 if name == "guide" else None
        model, note = joined(config, kind, device=device, dtype=dtype, fp32_adapters=fp32)
        return Way(
            name,
            model,
            lambda examples, size: joined_batches(examples, size, crop_slots=slots),
            lambda batch, items: model(**batch, num_items_in_batch=items),
            dtype if fp32 and dtype != torch.float32 else None,
            note,
        )
    ours = set_up(config, parts or PARTS[name], device=device, dtype=dtype)
    return Way(
        name,
        ours.model,
        ours.batches,
        lambda batch, items: loss_of(ours.model, batch, items),
        ours.autocast,
        ours.note,
        ours.masters,
    )


def trained_tokens(batches: list[Batch]) -> int:
    """Labels of all micro-batches that are learned; the first position of a row predicts nothing."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def to_device(batch: Batch, device: str) -> Batch:
    """The batch's tensors on a device; sizes and grids stay, they are read by the host."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) and key != "image_sizes" else value
        for key, value in batch.items()
    }


def run_step(way: Way, batches: list[Batch], items: int, optimiser: torch.optim.Optimizer, device: str) -> torch.Tensor:
    """One optimiser step over micro-batches, as the Trainer takes it; returns the step's loss, still on the device."""
    total = torch.zeros((), device=device)
    for batch in batches:
        batch = to_device(batch, device)
        mixed = torch.autocast(device, way.autocast) if way.autocast else contextlib.nullcontext()
        with mixed:
            loss = way.loss(batch, items)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(way.trained, 1.0)
    optimiser.step()
    for weight in way.trained:  # an optimiser of masters would forget theirs alone
        weight.grad = None
    return total


def make_optimiser(way: Way, device: str, rate: float = 0.0) -> torch.optim.Optimizer:
    """AdamW, in one kernel on a GPU, as the Trainer chooses it; over masters where a way has them.

    At a rate of 0 it does all its work and weights stay where they began, so losses can be compared at any time. A
    small rate moves them: in bfloat16, compiled layers add an adapter before they round, and one of 1e-9 then decides
    each tie between two numbers the way that lowers the loss, by 0.02 in 32 layers; plain layers round it away.
    """
    optimiser = torch.optim.AdamW(way.trained, lr=rate, fused=device == "cuda")
    if way.masters:
        short: Any = part("training.master_weights")
        short.step_masters(optimiser, way.model, way.masters)
    return optimiser


def synchronise(device: str) -> float:
    """Now, when the device has done all it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
