"""What is wrong with a model that is about to train, seen in what it computes: sight, gradients, weights, saved copies.

In come a prepared model and micro-batches; out come faults, one line each, none where all is well. No setting is
looked at. Knows no recipes and no Trainer.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from phi3v.adapters import adapter_state, has_adapter, holds_base
from phi3v.targets import ADAPTER_WEIGHTS, tensor_shapes
from phi3v.tuning import part_of
from phi3v.weight_files import read_weights, weight_files

_TOKENS = ".trainable_tokens_"
"""In names of what peft trains for lora.trainable_token_indices."""
_PIXELS = ("pixel_values", "global_views", "image_features")


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A micro-batch's tensors on a device; what is read by the host stays."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and name != "image_sizes" else value
        for name, value in batch.items()
    }


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits at trained positions, [K, vocabulary], without dropout."""
    was_training = model.training
    model.eval()
    try:
        made: torch.Tensor = model(**batch, use_cache=False).logits
    finally:
        model.train(was_training)
    return made.flatten(0, -2).float()


def sight_faults(model: Any, batch: Mapping[str, Any]) -> list[str]:
    """Whether other pictures give other logits, and a forward pass leaves the ids as they are."""
    pictures = [name for name in _PIXELS if isinstance(batch.get(name), torch.Tensor)]
    before = batch["input_ids"].clone()
    seen = logits_of(model, batch)
    faults = (
        [] if torch.equal(before, batch["input_ids"]) else ["a forward pass changes input_ids: the next one is blind"]
    )
    if pictures:
        blank = {name: torch.zeros_like(batch[name]) for name in pictures}
        if torch.equal(seen, logits_of(model, {**batch, **blank})):
            faults.append("blank pictures give the same logits: the model does not look at them")
    return faults


def gradient_faults(model: nn.Module, *, pictures: bool = True, finite: bool = True, scaled: bool = False) -> list[str]:
    """Whether what trains gets a gradient, read after a backward pass.

    Each module with an adapter, and each other weight that trains, needs one that is somewhere not zero. (Of a fresh
    adapter one of the two matrices has none but zeros; biases of CLIP's keys, which add the same to all scores of a
    query, have none but rounding; single tokens that are trained have none where the samples do not hold them.)

    Args:
        model: after `backward`.
        pictures: whether there were any; without them parts that see have no gradient.
        finite: whether gradients have to be finite.
        scaled: whether gradients are scaled, as float16 needs it: then they may be infinite, and must be float32.
    Example: adapters on the vision tower alone -> ["no weight of the language model trains"].
    """
    alive: dict[str, bool] = defaultdict(bool)
    parts: set[str] = set()
    not_finite, short = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        owner = name.split(".lora_")[0] if ".lora_" in name else name
        part = part_of(name)
        if part != "language model" and not pictures:
            continue
        gradient = _whole(weight.grad)
        noise = _TOKENS in name or (gradient is not None and name.endswith("k_proj.bias"))
        moved = noise or (gradient is not None and bool((gradient != 0).any()))
        alive[owner] |= moved
        if gradient is None:
            continue
        if moved:
            parts.add(part)
        if finite and not scaled and not bool(torch.isfinite(gradient).all()):
            not_finite.append(name)
        if scaled and gradient.dtype != torch.float32:
            short.append(name)
    dead = sorted(owner for owner, lives in alive.items() if not lives)
    faults: list[str] = []
    if not alive:
        return ["nothing trains: no weight asks for a gradient"]
    if dead:
        faults.append(f"{len(dead)} of {len(alive)} trained parts get no gradient, {dead[0]} for instance")
    if parts and "language model" not in parts:
        faults.append(f"no weight of the language model trains, only the {' and the '.join(sorted(parts))}")
    if not_finite:
        faults.append(f"{len(not_finite)} gradients are not finite, that of {not_finite[0]} for instance")
    if short:
        kind = str(dict(model.named_parameters())[short[0]].grad.dtype).removeprefix("torch.")  # type: ignore[union-attr]
        faults.append(
            f"gradients are {kind}, and the scaling of losses in float16 needs float32: use bfloat16 throughout"
        )
    return faults


def _whole(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient as on one device: a rank may have nothing of a small one, and would call its weight dead alone."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def weight_faults(model: Any, name: str, revision: str | None = None, *, every: int = 1) -> list[str]:
    """Whether the base's weights are those of its files, in the model's number type.

    Args:
        model: the prepared model.
        name: folder or hub id of its base.
        revision: on the hub.
        every: compare the n-th tensors alone.
    """
    if has_adapter(model) and not holds_base(model):
        return []  # the adapter began with parts of it
    loaded = dict(_own_weights(model))
    places = dict(sorted(weight_files(name, revision).items())[::every])
    different, spoilt, compared = [], [], 0
    for key, stored in read_weights(places):
        weight = loaded.get(key)
        if weight is None or weight.shape != stored.shape:  # in 4 bits, or a second name of a shared tensor
            continue
        compared += 1
        own = weight.detach().cpu()
        if not bool(torch.isfinite(own).all()):  # a NaN is unequal to itself; infinite is what float16 cannot hold
            spoilt.append(key)
        elif not torch.equal(stored.to(own.dtype), own):
            different.append(key)
    if not compared:
        return [f"no weight of {name} is in the model"]
    faults = []
    if spoilt:
        kind = str(loaded[spoilt[0]].dtype).removeprefix("torch.")
        faults.append(
            f"{len(spoilt)} of {compared} weights of {name} are no numbers in {kind}, {spoilt[0]} for instance"
        )
    if different:
        faults.append(f"{len(different)} of {compared} weights differ from {name}, {different[0]} for instance")
    return faults


def _own_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's weights by the names of its files."""
    for name, weight in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        yield plain.removeprefix("base_model.model."), weight


def saved_faults(model: Any, folder: Path) -> list[str]:
    """Whether an adapter that was saved holds what is in memory, tensor by tensor.

    Args:
        model: a PEFT model.
        folder: where `save_pretrained` wrote it.
    """
    path = folder / ADAPTER_WEIGHTS
    stored = dict(read_weights(dict.fromkeys(tensor_shapes(path), path)))
    return different(stored, adapter_state(model), "the saved adapter")


def different(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], what: str) -> list[str]:
    """Names or values that differ, as one line."""
    if missing := sorted(found.keys() ^ wanted.keys()):
        return [f"{what} lacks or has beside it {len(missing)} tensors, {missing[0]} for instance"]
    wrong = [name for name, tensor in wanted.items() if not torch.equal(found[name].to(tensor.dtype), tensor.cpu())]
    return [f"{len(wrong)} tensors of {what} differ, {wrong[0]} for instance"] if wrong else []


@torch.no_grad()
def nudge(weights: Iterable[torch.Tensor], seed: int = 0) -> None:
    """Moves weights a little, so that what is saved of them is not what they begin with."""
    for number, weight in enumerate(weights):
        dice = torch.Generator().manual_seed(seed + number)
        weight += 0.01 * torch.randn(weight.shape, generator=dice).to(weight)
