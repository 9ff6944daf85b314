"""How long a run will be: its steps, its tokens and the arithmetic in them, from a recipe and the lengths of its rows.

In come figures, out come figures; no weights are loaded. Operations are counted from the sizes in a model's config: the
matrices of decoder, head and tower, and attention; adapters, norms and the optimiser, a few per cent, are left out. The
rate of a machine is measured, with the matrix products that training spends its time on; the time that follows is an
estimate.
"""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi3v.data.survey import RowFacts
from phi3v.image_tokens import crop_grid
from phi3v.recipe import Recipe
from phi3v.training.checkpointing import checkpointing
from phi3v.training.floor import TOWER_PASSES
from phi3v.training.samples import planned_steps

STATED_RATE = 100e12
"""Operations a second that the outlook is told for, beside what was measured on the machine at hand."""

_PATCHES = 577  # of one crop in the tower: 24 x 24 and a class token


@dataclass(frozen=True)
class Outlook:
    """What a run amounts to.

    Attributes:
        rows: training rows.
        samples_per_step: samples of an optimiser step.
        steps_per_epoch: optimiser steps of one pass; None for a stream, which has no end.
        steps: optimiser steps of the run.
        micro_batches: micro-batches of a step, the mean of the first epoch; None without lengths.
        largest: tokens of the largest of them, padding included.
        packed: whether they are packs, which hold no padding.
        tokens: tokens of the run; None where they were not counted.
        operations: floating-point operations of the run, checkpointing's second forward pass included; None without
            lengths.
        machine: what was measured, "cpu, float32" for instance; None when nothing was.
        rate: operations a second of matrix products there, see `measure_rate`.
    """

    rows: int
    samples_per_step: int
    steps_per_epoch: int | None
    steps: int
    micro_batches: float | None
    largest: int | None
    packed: bool
    tokens: int | None
    operations: float | None
    machine: str | None
    rate: float | None


def outlook(recipe: Recipe, rows: int, facts: Sequence[RowFacts], config: Any, num_crops: int | None) -> Outlook:
    """The outlook of a run on so many rows.

    Args:
        recipe: steps, what trains and the device.
        rows: training rows.
        facts: of training rows; their mean stands for those whose length is not known.
        config: the model's config; None counts steps alone.
        num_crops: most crops of an image.
    Example: 2736 rows in steps of 16 for 3 epochs are 171 steps an epoch and 513 in all.
    """
    training = recipe.training
    whole = -(-rows // training.samples_per_step)
    per_epoch = None if recipe.data.streaming else whole
    steps = training.max_steps or int(-(-whole * training.epochs // 1))
    samples = steps * training.samples_per_step
    counts = (rows, training.samples_per_step, per_epoch, steps)
    if config is None or num_crops is None or not rows or all(fact.length is None for fact in facts):
        return Outlook(*counts, None, None, training.packing, None, None, None, None)
    limit = recipe.data.longest(config.max_position_embeddings)
    totals, fitting, language, vision = array("q"), array("q"), 0.0, 0.0
    for fact in facts:
        if fact.length is None:
            continue
        totals.append(fact.length.total)
        language += language_operations(recipe, config, fact.length.total)
        vision += vision_operations(recipe, config, fact, num_crops)
        if fact.too_long is None:
            fitting.append(min(fact.length.total, limit))
    tokens = round(sum(totals) / len(totals) * samples)
    operations = (language * samples + vision * (rows if recipe.vision.cache else samples)) / len(totals)
    machine, rate = measure_rate(recipe)
    return Outlook(*counts, *micro_batches(recipe, fitting), training.packing, tokens, operations, machine, rate)


def micro_batches(recipe: Recipe, lengths: Sequence[int]) -> tuple[float, int]:
    """How many micro-batches the steps of the first epoch have on average, and the tokens of the largest of all.

    Args:
        recipe: its section training.
        lengths: tokens of each row.
    Example: lengths 300, 900, 500 and 300, all in one step: 3 packs of at most 900 tokens.
    """
    if not lengths:
        return 0.0, 0
    steps, groups, largest = 0, 0, 0
    for step in planned_steps(recipe, lengths, epoch=0):
        steps, groups = steps + 1, groups + len(step)
        largest = max(largest, *(tokens for _, tokens in step))
    return groups / steps, largest


def language_operations(recipe: Recipe, config: Any, tokens: int) -> float:
    """Floating-point operations of the decoder for one sample in one step; a multiplication and its addition are two.

    A pass forward costs two operations a weight and token; backward costs two for the activations and, where weights
    train, two for these. Checkpointing goes forward twice. Example: Phi-3.5-Vision with LoRA and 857 tokens takes
    12.4e12 in its matrices, 0.5e12 in attention and 0.3e12 in its head.
    """
    width, inner = config.hidden_size, config.intermediate_size
    key_value = width * config.num_key_value_heads // config.num_attention_heads
    matrices = config.num_hidden_layers * (width * (2 * width + 2 * key_value) + 3 * width * inner)
    attention = 2 * config.num_hidden_layers * width * tokens**2  # causal: half of the square
    passes = 2 if recipe.lora is not None else 3
    again = checkpointing(recipe.training.options) is not None
    head = 2 * width * config.vocab_size * tokens * passes
    return 2 * matrices * tokens * (passes + again) + attention * (3.5 + again) + head


def vision_operations(recipe: Recipe, config: Any, fact: RowFacts, num_crops: int) -> float:
    """Operations of the tower for the images of one sample: all crops and the view of the whole."""
    tower = config.vision_config
    crops = sum(rows * columns + 1 for rows, columns in (crop_grid(*size, num_crops) for size in fact.sizes))
    layers = tower.num_hidden_layers + 1 + config.vision_feature_layer
    matrices = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    forward = layers * (2 * matrices * _PATCHES + 4 * tower.hidden_size * _PATCHES**2)
    return crops * forward * TOWER_PASSES[recipe.vision.tower]


def measure_rate(recipe: Recipe, seconds: float = 0.3) -> tuple[str, float]:
    """What the recipe's device multiplies: its name with the number type, and operations a second.

    The two products of a layer, forward and backward, in which the weights lie one way and the other: a CPU that has no
    bfloat16 of its own may take twenty times as long for the second. Of each the fastest try within `seconds` counts,
    since on a busy machine a short one finds a free moment. Example: products of 2 GFLOP, the fastest of one kind in
    0.1 s and of the other in 0.3 s -> 1e10, 4 GFLOP in 0.4 s.
    """
    from phi3v.loading import resolve_device, resolve_dtype

    device = resolve_device(recipe.model.device)
    dtype = resolve_dtype(recipe.model.dtype, device)
    side = 4096 if device.type == "cuda" else 256
    rows, weights = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest, until = [float("inf")] * 2, time.perf_counter() + seconds
    while time.perf_counter() < until or float("inf") in fastest:
        for kind, right in enumerate((weights.t(), weights)):
            began = time.perf_counter()
            torch.mm(rows, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            fastest[kind] = min(fastest[kind], time.perf_counter() - began)
    threads = torch.get_num_threads()
    cpu = f"CPU ({threads} thread{'' if threads == 1 else 's'})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, {str(dtype).removeprefix('torch.')}", 2 * 2 * side**3 / sum(fastest)
