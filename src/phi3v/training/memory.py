"""What a training step of a recipe takes at most, counted on the meta device from the code that trains.

In come a recipe, a config and the shapes of micro-batches; out come bytes, by what they are: weights, optimiser,
gradients, activations, logits. The base is built without contents, prepared as a training prepares it, and goes forward
and backward; the optimiser makes its state. Counted are tensors: no allocator, no CUDA context, no program. No file is
read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Trainer

from phi3v.data.collate import Collator, PackedCollator
from phi3v.errors import ConfigError
from phi3v.features.collate import CollateFeatures
from phi3v.image_tokens import CROP_SIZE, grid_tokens
from phi3v.kernels import passes
from phi3v.loading import quantization_config
from phi3v.meta_base import meta_base
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.arguments import training_arguments
from phi3v.training.live_tensors import HAND_WRITTEN, DeviceKernels, LiveTensors, OneKernelEach, run_backward
from phi3v.training.master_weights import shorten_weights
from phi3v.training.prepare import Prepared, compute_twice, make_ready

LINES = ("weights", "optimiser", "gradients", "activations", "logits")
"""What the bytes of a step are, in the order in which they are told."""


@dataclass(frozen=True)
class Sample:
    """The shape of a training sample: all its tokens, those that are trained, rows and columns of each image's crops.

    Example: a square photo at 4 crops with 100 other tokens, 36 of them trained: Sample(857, 36, ((2, 2),)).
    """

    tokens: int
    trained: int
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of a training at its fullest moments.

    Attributes:
        lines: of the fullest moment of a step, one number for each of `LINES`.
        answering: while held-out rows are answered at the end; 0 where there are none.
    """

    lines: dict[str, int]
    answering: int

    @property
    def step(self) -> int:
        """The fullest moment of a step."""
        return sum(self.lines.values())

    @property
    def peak(self) -> int:
        """The fullest moment of the run."""
        return max(self.step, self.answering)


class _Seen(LiveTensors):
    """Knows logits by their width."""

    def __init__(self, *, rows: int, vocabulary: int) -> None:
        super().__init__(rows=rows)
        self.vocabulary = vocabulary

    def kind_of(self, tensor: torch.Tensor) -> str:
        """What is as wide as the vocabulary while a model runs is made of logits."""
        wide = tensor.ndim >= 2 and tensor.shape[-1] == self.vocabulary
        return "logits" if wide and self.kind == "activations" else self.kind


def count_memory(
    recipe: Recipe,
    config: Any,
    micro_batches: Sequence[Sequence[Sample]],
    *,
    on_gpu: bool,
    compute: torch.dtype,
    answered: int = 0,
) -> Memory:
    """Counts a training.

    Args:
        recipe: what trains, and how; no `auto` in it.
        config: of its model.
        micro_batches: the largest micro-batch, and another one where steps have several: it finds gradients in place.
        on_gpu: whether it trains on a GPU, where layers are hand-written, or on a CPU.
        compute: what model.dtype comes to there.
        answered: tokens of the longest held-out row; 0 where none are answered.
    """
    prepared = _prepare(recipe, config, on_gpu, compute)
    model = prepared.model
    masters = shorten_weights(model, prepared.short) if prepared.short is not None else {}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rows = sum(sample.trained for sample in micro_batches[0])
    seen = _Seen(rows=rows, vocabulary=config.vocab_size)
    for held in [*model.parameters(), *model.buffers(), *_scales_of(model)]:
        seen.hold(held, "weights")
    weights = seen.live["weights"]
    for master in masters.values():
        seen.hold(master, "optimiser")
    _make_state(recipe, list(masters.values()) or trained, seen, on_gpu=on_gpu)
    for weight in trained:
        weight.register_post_accumulate_grad_hook(lambda done: seen.move(done.grad, "gradients"))
    hand_written = OneKernelEach(seen, passes if on_gpu else None, HAND_WRITTEN)
    device = DeviceKernels(seen, prepared.autocast, fused_dropout=on_gpu)
    with device, seen, hand_written:
        for samples in micro_batches:
            batch = _batch_of(samples, recipe, config, compute)
            device.keeps_casts = True
            loss = model(**batch, num_items_in_batch=rows, use_cache=False).loss
            device.forget_casts()
            for weight in model.parameters():  # hand-written layers keep a matrix and its adapter side by side
                seen.move(weight, "weights")
            run_backward(loss)
            del loss, batch
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not missing, f"{len(missing)} trained weights have no gradient, {missing[0]} for instance"
    lines = {name: seen.most[name] for name in LINES}
    return Memory(lines, weights + _answering(recipe, config, answered, compute) if answered else 0)


def _prepare(recipe: Recipe, config: Any, on_gpu: bool, compute: torch.dtype) -> Prepared:
    """The recipe's model on the meta device, ready to train."""
    chosen = recipe.model.attn_implementation
    quantization = None
    if recipe.quantization is not None:
        quantization = quantization_config(recipe.quantization, compute)
    base = meta_base(
        config,
        dtype=torch.float32 if recipe.lora is None else compute,
        attention="eager" if chosen == "eager" else "sdpa",  # all others take what one flash kernel takes
        quantization=quantization,
    )
    base.config.name_or_path = base.name_or_path = recipe.model.name
    if recipe.lora is not None and isinstance(recipe.lora.get("init_lora_weights"), str):
        recipe = recipe.with_overrides(["lora.init_lora_weights=true"])  # begins from contents, of which there are none
    with torch.device("meta"):
        prepared = make_ready(base, recipe, compute, on_gpu=on_gpu)
    compute_twice(base, recipe.training.options, offload=False)
    return replace(prepared, model=prepared.model.train())


def _scales_of(model: Any) -> list[torch.Tensor]:
    """What 4-bit matrices keep beside their weights."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        for one in filter(None, (state, getattr(state, "state2", None))):
            found += [part for part in (one.absmax, one.code) if isinstance(part, torch.Tensor)]
    return found


def _make_state(recipe: Recipe, stepped: list[Any], seen: LiveTensors, *, on_gpu: bool) -> None:
    """Has the recipe's optimiser make its state for meta weights, by a step or by its own beginning of one."""
    arguments = training_arguments(
        recipe, RunFolder(recipe.output), device=torch.device("cpu"), autocast=None, validated=True
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    fused = options.pop("fused", False)
    seen.kind = "gradients"
    with seen:
        for weight in stepped:
            weight.grad = torch.empty_like(weight, dtype=torch.float32)
    seen.kind = "optimiser"
    if kind.__module__.startswith("bitsandbytes"):
        optimiser = kind(stepped, **{**options, "is_paged": False})  # pages are a GPU's; they are counted as its own
    else:
        together = {"foreach": True} if on_gpu and not fused and kind.__module__.startswith("torch.optim") else {}
        optimiser = kind(stepped, **options, **together)
    with seen:
        if kind.__module__.startswith("bitsandbytes"):
            for number, group in enumerate(optimiser.param_groups):
                for place, weight in enumerate(group["params"]):
                    optimiser.init_state(group, weight, number, place)
        else:
            optimiser.step()
    for weight in stepped:
        weight.grad = None
    seen.kind = "activations"
    seen.state_of = optimiser  # type: ignore[attr-defined]  # alive for as long as it is counted


def _batch_of(samples: Sequence[Sample], recipe: Recipe, config: Any, compute: torch.dtype) -> dict[str, Any]:
    """A micro-batch of samples of such shapes, as a step takes it: indices are real, contents are not."""
    image = config.image_token_id
    kept = recipe.vision.cache is not None and recipe.vision.frozen
    examples = [_example(sample, image, config.hidden_size, compute if kept else None) for sample in samples]
    packed = recipe.training.packing
    collate = PackedCollator(image) if packed else Collator(config.pad_token_id or 0, image_token_id=image)
    batch = CollateFeatures(collate)(examples)
    slices = compute == torch.float32 or recipe.lora is None  # float32 weights: packs go by sample, lengths are read
    real = ("image_sizes", "cu_seqlens") if slices else ("image_sizes",)
    return {
        key: value.to("meta") if isinstance(value, torch.Tensor) and key not in real else value
        for key, value in batch.items()
    }


def _example(sample: Sample, image: int, hidden: int, features: torch.dtype | None) -> dict[str, torch.Tensor]:
    """A sample: its images in one piece behind the first token, what is trained at its end."""
    tokens = sum(grid_tokens(*grid) for grid in sample.grids)
    ids = torch.full((sample.tokens,), 5 if image != 5 else 6)
    ids[1 : 1 + tokens] = image
    labels = torch.full_like(ids, -100)
    labels[sample.tokens - sample.trained :] = ids[sample.tokens - sample.trained :]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if not sample.grids:
        return example
    example["image_sizes"] = torch.tensor([[rows * CROP_SIZE, columns * CROP_SIZE] for rows, columns in sample.grids])
    if features is not None:
        return {**example, "image_features": torch.empty((tokens, hidden), dtype=features, device="meta")}
    crops, shape = sum(rows * columns for rows, columns in sample.grids), (3, CROP_SIZE, CROP_SIZE)
    example["pixel_values"] = torch.empty((crops, *shape), dtype=torch.uint8, device="meta")
    example["global_views"] = torch.empty((len(sample.grids), *shape), device="meta")
    return example


def _answering(recipe: Recipe, config: Any, longest: int, compute: torch.dtype) -> int:
    """Keys and values of a batch of answers, and its logits."""
    head = config.hidden_size // config.num_attention_heads
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    together = recipe.evaluation.batch_size
    tokens = longest + recipe.evaluation.max_new_tokens
    return together * (tokens * width * compute.itemsize + 4 * config.vocab_size)


def refuse_uncounted(recipe: Recipe) -> None:
    """Raises: ConfigError for a recipe whose memory cannot be counted."""
    if recipe.quantization is not None and not recipe.quantization.get("load_in_4bit"):
        raise ConfigError("quantization: what 8-bit layers take is not counted; plan for load_in_4bit, or without")
