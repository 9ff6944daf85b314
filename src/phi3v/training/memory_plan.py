"""`plan_recipe(recipe)`: memory, steps and time of a training, before any weight is loaded.

In comes a recipe, out comes a `Plan`: what the fullest moment of a step takes (`memory`), whether that fits a device,
what to change where it does not, and what the recipe's `auto` values come to there. Rows are looked at by headers and
texts; of the model its small files are read. Prints nothing.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.data.lengths import RowLength
from phi3v.data.plan import positions
from phi3v.data.sources import LoadedData, StreamedData
from phi3v.data.survey import RowFacts
from phi3v.errors import ConfigError, DataError
from phi3v.first_look import HELD_OUT, MeasuredData, Progress, find_rows, survey_options, survey_rows
from phi3v.image_tokens import most_image_tokens, num_image_tokens
from phi3v.loading import load_config, load_processor, resolve_device, resolve_dtype
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.checkpointing import check_checkpointing
from phi3v.training.memory import Memory
from phi3v.training.memory_choices import Change, Counted, Seen, automatic, choose, faster, smaller
from phi3v.training.outlook import Outlook, outlook
from phi3v.training.prepare import check_layout

GENERATED_TEXT, GENERATED_ANSWER = 160, 100
"""Tokens of a generated row beside its image, and how many of them are trained."""

CUDA_CONTEXT, PROGRAM = 600 * 2**20, 1000 * 2**20
"""What a GPU holds beside tensors, and a process in the machine's memory."""

_LOST_BY_ALLOCATOR = 0.05
_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


@dataclass(frozen=True)
class Plan:
    """What a training will take.

    Attributes:
        device: "GPU" or "CPU", with the number type: "GPU, bfloat16".
        memory: bytes at the fullest moments.
        available: bytes that are there for tensors; None where nothing says how many.
        total: bytes of the device.
        changes: what makes it fit, in order; or, of one that fits, what would make it faster and fit too.
        chosen: what `auto` came to, dotted key -> value.
        outlook: steps, tokens, arithmetic.
        largest: tokens of the largest micro-batch, padding included.
        unknown_images: rows whose images are not here, counted at the price of the dearest image.
        sharded: whether ranks are to share the model (`training.fsdp`), whose memory is that of one process here.
    """

    device: str
    memory: Memory
    available: int | None
    total: int | None
    changes: list[Change]
    chosen: dict[str, Any]
    outlook: Outlook
    largest: int
    unknown_images: int
    sharded: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where nothing says what is there."""
        return None if self.available is None else self.memory.peak <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        made = {"step": self.memory.step, "peak": self.memory.peak, **asdict(self.memory)}
        return {**asdict(self), "memory": made, "fits": self.fits}


def plan_recipe(
    recipe: Recipe,
    *,
    memory: str | None = None,
    rows: int | None = None,
    image: tuple[int, int] = (1200, 1600),
    on_progress: Progress | None = None,
) -> Plan:
    """Plans a training.

    Args:
        recipe: the run; `auto` in it is chosen here.
        memory: of a GPU to plan for, "24GiB" for instance; None for what is here.
        rows: plan for so many rows with a photo each instead of the recipe's rows.
        image: width and height of that photo.
        on_progress: told as rows are looked at.
    Raises: ConfigError, DataError, CheckpointError in one line.
    """
    check_checkpointing(recipe.training.options)
    total = None if memory is None else bytes_of(memory)
    on_gpu, compute = target_of(recipe, memory is not None)
    config = load_config(recipe.model.name, revision=recipe.model.revision)
    check_layout(recipe)
    seen = _generated(recipe, rows, image) if rows is not None else _look(recipe, config, on_progress)
    if total is None:
        total = device_memory(on_gpu)
    available = None if total is None else usable(total, on_gpu)
    counted = Counted(recipe, config, seen, on_gpu, compute)
    settled = choose(recipe, counted, available)
    found = counted(settled)
    fits = available is None or found.peak <= available
    here = settled if torch.cuda.is_available() or not on_gpu else settled.with_overrides(["model.device=cpu"])
    changes = faster(settled, counted, available) if fits else smaller(settled, counted, available or 0)
    return Plan(
        device=f"{'GPU' if on_gpu else 'CPU'}, {str(compute).removeprefix('torch.')}",
        memory=found,
        available=available,
        total=total,
        changes=changes,
        chosen={key: value for key, value in automatic(settled).items() if key in recipe.automatic},
        outlook=outlook(here, seen.rows, seen.facts, config, seen.num_crops),
        largest=max(
            positions([sample.tokens for sample in group], packed=settled.training.packing)
            for group in counted.micro_batches(settled)
        ),
        unknown_images=seen.unknown,
        sharded=bool(recipe.training.options.get("fsdp")),
    )


def bytes_of(text: str) -> int:
    """ "24GiB" -> 25769803776, "8 GB" -> 8000000000. Raises: ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"memory {text!r} is no size: write 24GiB or 24GB")
    unit = next(size for name, size in _UNITS.items() if name.lower() == found[2].lower())
    return int(float(found[1]) * unit)


def target_of(recipe: Recipe, stated: bool) -> tuple[bool, torch.dtype]:
    """Whether a recipe is planned for a GPU, and its number type there.

    A stated memory is a GPU's, except where the recipe itself says cpu. Of a GPU that is not here bfloat16 is taken.
    """
    device = recipe.model.device
    if device == "cpu" or (device == "auto" and not stated and not torch.cuda.is_available()):
        return False, resolve_dtype(recipe.model.dtype, torch.device("cpu"))
    if recipe.model.dtype == "auto" and not torch.cuda.is_available():
        return True, torch.bfloat16
    return True, resolve_dtype(recipe.model.dtype, resolve_device("auto") if not stated else torch.device("cuda"))


def device_memory(on_gpu: bool) -> int | None:
    """Bytes of the first GPU, or of the machine's memory that this process may take; None where neither is known."""
    if on_gpu:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    found = [_number_in(Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB", 1024)]
    found.append(_number_in(Path("/sys/fs/cgroup/memory.max"), r"(\d+)", 1))
    known = [number for number in found if number is not None]
    return min(known) if known else None


def _number_in(path: Path, pattern: str, unit: int) -> int | None:
    """A number of a small file of the system; None where it is not there."""
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return None if found is None else int(found[1]) * unit


def usable(total: int, on_gpu: bool) -> int:
    """What of a memory is there for tensors: not the context or the program, nor what an allocator loses."""
    return max(0, int((total - (CUDA_CONTEXT if on_gpu else PROGRAM)) * (1 - _LOST_BY_ALLOCATOR)))


def _generated(recipe: Recipe, rows: int, image: tuple[int, int]) -> Seen:
    """Rows of one shape."""
    processor = load_processor(recipe.model.name, revision=recipe.model.revision, **recipe.image.processor_options)
    crops = processor.image_processor.num_crops
    length = RowLength(num_image_tokens(*image, crops), GENERATED_TEXT, GENERATED_ANSWER, (image,))
    facts = [RowFacts("generated", 0, length, (image,), (), b"")] * min(rows, 256)
    return Seen(rows, facts, length.total, crops, 0)


def _look(recipe: Recipe, config: Any, on_progress: Progress | None) -> Seen:
    """The recipe's rows by headers and texts."""
    processor = load_processor(recipe.model.name, revision=recipe.model.revision, **recipe.image.processor_options)
    data = find_rows(recipe, download=False, on_progress=on_progress)
    options = survey_options(recipe, config.max_position_embeddings, decode=False, hashes=False)
    train = survey_rows(data.train, processor, options, on_progress=on_progress)
    held_out = survey_rows(data.validation, processor, options, stage=HELD_OUT, on_progress=on_progress)
    if not train.kept:
        raise DataError(f"{recipe.data.train_name} has no row to train on: see phi3v data check, or plan with --rows")
    crops = processor.image_processor.num_crops
    facts = [_assumed(fact, crops) for fact in train.facts if fact.too_long is None]
    longest = max((_assumed(fact, crops).length.total for fact in held_out.facts), default=0)  # type: ignore[union-attr]
    return Seen(len(train.kept), facts, longest, crops, sum(fact.length is None for fact in train.facts))


def _assumed(fact: RowFacts, num_crops: int) -> RowFacts:
    """A row's facts; one whose image is not here is taken to have the dearest image, a column of crops."""
    if fact.length is not None:
        return fact
    size = (336, 336 * num_crops)
    length = RowLength(most_image_tokens(num_crops), GENERATED_TEXT, GENERATED_ANSWER, (size,))
    return RowFacts(fact.source, fact.row, length, (size,), fact.images, fact.text)


def adopt(recipe: Recipe, run: RunFolder) -> Recipe:
    """A recipe with what its `auto` came to when its run began; unchanged where none has begun."""
    if not recipe.automatic or run.state() == "new":
        return recipe
    begun = run.read_recipe().model_dump()
    values = recipe.model_dump()
    for key in recipe.automatic:
        section, _, name = key.partition(".")
        if name:
            values[section][name] = begun[section].get(name)
        else:
            values[section] = begun[section]
    return type(recipe).from_dict(values)


def settle(recipe: Recipe, data: LoadedData | StreamedData, processor: Any, device: torch.device) -> Recipe:
    """A recipe whose `auto` values are chosen for a device, by the longest of its rows.

    Args:
        recipe: with or without `auto`.
        data: its rows; the first ones stand for a stream.
        processor: the model's processor.
        device: where it trains.
    """
    if not recipe.automatic:
        return recipe
    config = load_config(recipe.model.name, revision=recipe.model.revision)
    crops = processor.image_processor.num_crops
    if isinstance(data, MeasuredData):
        longest = sorted(range(len(data.lengths)), key=lambda row: -data.lengths[row])[
            : recipe.training.samples_per_step
        ]
        rows: Any = data.train.take(sorted(longest))
    else:
        rows = _look(recipe, config, None).facts
    options = survey_options(recipe, config.max_position_embeddings, decode=False, hashes=False)
    facts = survey_rows(rows, processor, options).facts if isinstance(data, MeasuredData) else rows
    held_out = survey_rows((data.validation or [])[:64], processor, options).facts
    answered = max((fact.length.total for fact in held_out if fact.length is not None), default=0)
    on_gpu, total = device.type == "cuda", device_memory(device.type == "cuda")
    seen = Seen(len(facts), [_assumed(fact, crops) for fact in facts], answered, crops, 0)
    counted = Counted(recipe, config, seen, on_gpu, resolve_dtype(recipe.model.dtype, device))
    return choose(recipe, counted, None if total is None else usable(total, on_gpu))
