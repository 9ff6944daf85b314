"""Which variants of a recipe fit a memory: what its `auto` values come to, what to change where it does not fit.

In come a recipe, what is known of its rows, and bytes; out come recipes and changes. Each variant is counted by
`memory`, on the code that trains. Reads no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from phi3v.data.survey import RowFacts
from phi3v.image_tokens import crop_grid, grid_tokens, num_image_tokens
from phi3v.recipe import CHECKPOINTING, Recipe
from phi3v.training.checkpointing import checkpointing
from phi3v.training.memory import Memory, Sample, count_memory, refuse_uncounted
from phi3v.training.samples import planned_steps

_ENOUGH_TOKENS = 16384
_EPOCHS_SEEN = 3
_COMFORTABLE = 0.9
"""Share of what is there beyond which nothing is advised that takes more."""

_FOUR_BITS = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"


@dataclass(frozen=True)
class Change:
    """A change to the recipe: what to type behind the command, and the bytes that a step takes with it and with all
    changes before it."""

    override: str
    peak: int


@dataclass(frozen=True)
class Seen:
    """What is known of the rows: how many train, facts of them, the longest held-out row (0 without any), most crops
    of an image, and how many rows have images that are not here."""

    rows: int
    facts: Sequence[RowFacts]
    held_out: int
    num_crops: int
    unknown: int


class Counted:
    """Counts memory of variants of a recipe, each once."""

    def __init__(self, recipe: Recipe, config: Any, seen: Seen, on_gpu: bool, compute: torch.dtype) -> None:
        self.recipe, self.config, self.seen = recipe, config, seen
        self.on_gpu, self.compute = on_gpu, compute
        self._known: dict[str, Memory] = {}

    def __call__(self, recipe: Recipe) -> Memory:
        """The memory of a recipe without `auto`."""
        refuse_uncounted(recipe)
        key = recipe.to_yaml()
        if key not in self._known:
            self._known[key] = count_memory(
                recipe,
                self.config,
                self.micro_batches(recipe),
                on_gpu=self.on_gpu,
                compute=self.compute,
                answered=self.seen.held_out,
            )
        return self._known[key]

    def micro_batches(self, recipe: Recipe) -> list[list[Sample]]:
        """The largest micro-batch of the first epochs, twice where steps have several."""
        limit = recipe.data.longest(self.config.max_position_embeddings)
        crops = min(recipe.image.num_crops or self.seen.num_crops, self.seen.num_crops)
        facts = [fact for fact in self.seen.facts if fact.length is not None]
        lengths = [min(tokens_at(fact, crops), limit) for fact in facts]
        group, several = largest_micro_batch(recipe, lengths)
        samples = [sample_of(facts[row], lengths[row], crops) for row in group]
        return [samples, samples] if several else [samples]


def largest_micro_batch(recipe: Recipe, lengths: Sequence[int]) -> tuple[list[int], bool]:
    """The rows of the micro-batch with the most tokens, and whether steps have several micro-batches.

    Example: lengths 300, 900, 500, all in one step, in packs of 900: ([1], True).
    """
    epochs = range(min(_EPOCHS_SEEN, max(1, int(recipe.training.epochs))))
    steps = [step for epoch in epochs for step in planned_steps(recipe, lengths, epoch)]
    best, _ = max((group for step in steps for group in step), key=lambda group: group[1])
    return best, any(len(step) > 1 for step in steps)


def tokens_at(fact: RowFacts, num_crops: int) -> int:
    """Tokens of a row at so many crops of an image."""
    assert fact.length is not None
    return fact.length.text + sum(num_image_tokens(*size, num_crops) for size in fact.length.sizes)


def sample_of(fact: RowFacts, tokens: int, num_crops: int) -> Sample:
    """The shape of a row's sample of so many tokens; one that was cut to them keeps its image."""
    assert fact.length is not None
    grids = tuple(crop_grid(*size, num_crops) for size in fact.length.sizes)
    image = sum(grid_tokens(*grid) for grid in grids)
    trained = max(1, min(fact.length.trained, tokens - image - 1))
    return Sample(max(tokens, image + trained + 1), trained, grids)


def automatic(recipe: Recipe) -> dict[str, Any]:
    """The values of the keys that may be `auto`, dotted key -> value."""
    values = recipe.model_dump()
    found = {f"training.{name}": values["training"].get(name) for name in ("micro_batch_size", *CHECKPOINTING)}
    return {**found, "quantization": values["quantization"]}


def choose(recipe: Recipe, count: Counted, available: int | None) -> Recipe:
    """A recipe whose `auto` values are chosen: what is fastest among what fits.

    Weights in full before 4 bits, activations kept before computed twice; then as large a micro-batch as fits, up to
    16,384 tokens. Where nothing is known of the memory, or nothing fits, the smallest is taken.
    """
    keys = recipe.automatic
    if not keys:
        return recipe
    checkpointing = next((key for key in keys if "checkpointing" in key), None)
    for bits in ("quantization=null", _FOUR_BITS) if "quantization" in keys else (None,):
        for again in ("false", "true") if checkpointing else (None,):
            changes = [] if bits is None else [bits]
            changes += [] if again is None else [f"{checkpointing}={again}"]
            changes += ["training.micro_batch_size=1"] if "training.micro_batch_size" in keys else []
            found = recipe.with_overrides(changes)
            if available is not None and count(found).peak <= available:
                return _grow(found, count, available) if "training.micro_batch_size" in keys else found
    return found


def _grow(recipe: Recipe, count: Counted, available: int) -> Recipe:
    """The largest micro-batch that fits: memory grows with it in a straight line, which two counts draw."""
    samples = recipe.training.samples_per_step
    sizes = [size for size in range(2, samples + 1) if samples % size == 0]
    if not sizes:
        return recipe

    def of(size: int) -> Recipe:
        return recipe.with_overrides([f"training.micro_batch_size={size}"])

    def tokens(size: int) -> int:
        return max(sum(sample.tokens for sample in group) for group in count.micro_batches(of(size)))

    first, second = count(recipe).step, count(of(sizes[0])).step
    slope = max(1.0, (second - first) / (sizes[0] - 1))
    for size in reversed(sizes):
        expected = first + slope * (size - 1)
        if expected <= 1.02 * available and tokens(size) <= _ENOUGH_TOKENS and count(of(size)).peak <= available:
            return of(size)
    return recipe


def smaller(recipe: Recipe, count: Counted, available: int) -> list[Change]:
    """What makes a recipe fit, each on top of the ones before; all there is where even that is not enough."""
    made: list[Change] = []
    for override in _savings(recipe, count(recipe).answering > available):
        recipe = recipe.with_overrides([override])
        made.append(Change(override, count(recipe).peak))
        if made[-1].peak <= available:
            break
    return made


def _savings(recipe: Recipe, answers: bool) -> list[str]:
    """What saves memory, the cheapest in time first; `answers`: also the answers to held-out rows take too much."""
    options = recipe.training.options
    found = ["evaluation.batch_size=1"] if answers and recipe.evaluation.batch_size > 1 else []
    if recipe.training.tokens_per_micro_batch is not None:
        found.append("training.tokens_per_micro_batch=null")
    if recipe.training.micro_batch > 1:
        found.append("training.micro_batch_size=1")
    if checkpointing(options) is None:
        found.append("training.gradient_checkpointing=true")
    if recipe.lora is None:  # 8-bit moments cannot be cut, and ranks that share a model cut them
        found += [] if options.get("fsdp") else ["training.optim=adamw_8bit"]
        found.append("lora={r: 16}")
    if recipe.quantization is None and find_spec("bitsandbytes") is not None:
        found.append(_FOUR_BITS)
    if recipe.image.max_tokens is None and recipe.image.num_crops != 1:
        found.append("image.num_crops=4" if recipe.image.num_crops is None else "image.num_crops=1")
    return found


def faster(recipe: Recipe, count: Counted, available: int | None) -> list[Change]:
    """Checkpointing that is not needed."""
    name = checkpointing(recipe.training.options)
    if name is None or available is None:
        return []
    override = f"training.{name}=false"
    peak = count(recipe.with_overrides([override])).peak
    return [Change(override, peak)] if peak <= _COMFORTABLE * available else []
