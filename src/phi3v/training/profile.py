"""`profile(recipe)`: where time and memory of a training go, and the one setting that would change most.

In comes a recipe, out comes a `Profile`. A few steps of the recipe's own training run in a folder that is thrown away,
on the recipe's rows or on generated ones; nothing of its own run is touched. It prints nothing.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phi3v.data.synthetic import write_synthetic_rows
from phi3v.errors import ConfigError, ImageError
from phi3v.image_tokens import CROP_SIZE, grid_tokens
from phi3v.launch import Launch
from phi3v.loading import load_config, load_processor, resolve_device
from phi3v.machine import usable_cores
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import Watcher
from phi3v.training.checkpointing import SHARDED_CHECKPOINTING, checkpointing, checkpointing_kwargs
from phi3v.training.device_time import check_trace
from phi3v.training.floor import TOWER_PASSES, useful_operations, vision_operations
from phi3v.training.memory_plan import adopt
from phi3v.training.outlook import measure_rate
from phi3v.training.step_marks import SeenBatch, StepMarks
from phi3v.training.train import train_watched

NOT_WATCHED = tuple(
    "save eval load_best_model metric_for_best_model greater_is_better push_to_hub early_stopping fsdp".split()
)
"""Beginnings of TrainingArguments that say what happens beside steps, or among several processes."""
_MOST_JPEG_SIDE = 65_500


@dataclass(frozen=True)
class PartTime:
    """One part of a step: its name, seconds a step, and most memory during it (None without a GPU)."""

    name: str
    seconds: float
    gib: float | None


@dataclass(frozen=True)
class Advice:
    """The setting to change: its dotted key, the value to try, and what was seen that speaks for it."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class Profile:
    """What some steps of a training took.

    Attributes:
        device: what they ran on, with the number type.
        steps: steps that were watched, behind those that warmed up.
        samples_per_step: samples of a step.
        micro_batches: micro-batches of a step, the mean.
        tokens: tokens of a step, padding left out, the mean.
        padding: share of padding among all positions.
        images: of a step that came as pixels, the mean; those with kept features are not among them.
        seconds: of a step.
        parts: where they went, in the order of a step.
        decode_seconds: making one sample from its row, on one core, in the loader; None for a stream.
        device_idle: share of the time in which nothing ran on the GPU; None without one, or where it hides its kernels.
        weights_gib: of the model as loaded.
        floor_share: the least arithmetic of these steps at `rate`, over their time; None when the whole model is tuned.
        rate: operations a second of a large matrix product there.
        advice: the one setting to change; None when nothing stands out.
        trace: the file for Perfetto, None without.
    """

    device: str
    steps: int
    samples_per_step: int
    micro_batches: float
    tokens: float
    padding: float
    images: float
    seconds: float
    parts: list[PartTime]
    decode_seconds: float | None
    device_idle: float | None
    weights_gib: float
    floor_share: float | None
    rate: float
    advice: Advice | None
    trace: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def share(self, name: str) -> float:
        """Share of a step's time that a part takes."""
        return next(part.seconds for part in self.parts if part.name == name) / self.seconds if self.seconds else 0.0


def profile(
    recipe: Recipe,
    *,
    steps: int = 5,
    warm: int = 2,
    rows: int | None = None,
    images: Sequence[Sequence[tuple[int, int]]] = (((1200, 1600),),),
    words: int = 60,
    trace: Path | None = None,
    on_event: Watcher | None = None,
) -> Profile:
    """Watches some steps of a recipe's training.

    Args:
        recipe: everything about the run.
        steps: that are watched.
        warm: steps before them, in which kernels are chosen and compiled.
        rows: train on so many generated rows instead of the recipe's, again and again where the steps take more.
        images: width and height in pixels of each photo of a generated row, for the rows in turn.
        words: of a generated answer.
        trace: writes what ran to this file, for Perfetto.
        on_event: told what `train` tells.
    Raises: as `train`; ConfigError for a trace that cannot be written or photos beyond the limits, before all else.
    """
    if (count := Launch.here().count) > 1:
        raise ConfigError(f"phi3v profile watches the steps of one process, and here are {count}: start it alone")
    if trace is not None:
        check_trace(trace)
    if rows is not None:
        for image in dict.fromkeys(size for row in images for size in row):
            _refuse_photos(recipe, image)
    with tempfile.TemporaryDirectory(prefix="phi3v_profile_") as folder:
        values = watched_recipe(recipe, steps + warm, Path(folder))
        if rows is not None:
            lines = (steps + warm) * recipe.training.samples_per_step  # or an epoch ends, and workers begin again
            values["data"] = write_synthetic_rows(Path(folder) / "rows", rows, images, words, lines=lines)
            values["vision"]["cache_folder"] = str(Path(folder) / "features")  # not among features that are wanted
        watched = type(recipe).from_dict(values)
        marks = StepMarks(resolve_device(recipe.model.device), warm, traced=trace is not None)
        train_watched(watched, [marks], on_event=on_event and _of_its_own(on_event))
        settled = adopt(recipe, RunFolder(watched.output))
    if trace is not None:
        marks.device_watch.write_trace(trace)
    return summarise(settled, marks, trace, chosen=recipe.automatic)


def _of_its_own(told: Watcher) -> Watcher:
    """A caller who is not told that good rows are in no epoch: so few steps are ours, not the recipe's."""
    return lambda event: told(event if event.rows is None else replace(event, rows=replace(event.rows, not_drawn=0)))


def _refuse_photos(recipe: Recipe, size: tuple[int, int]) -> None:
    """Raises: ConfigError for photos that the recipe or its model would refuse, or that no JPEG can be."""
    width, height = size
    if width * height > recipe.image.max_pixels:
        raise ConfigError(
            f"--image {width}x{height} is {width * height:,} pixels, more than image.max_pixels of "
            f"{recipe.image.max_pixels:,}: take smaller photos or raise image.max_pixels"
        )
    if max(size) > _MOST_JPEG_SIDE:
        raise ConfigError(
            f"--image {width}x{height}: the photos are JPEGs, of at most {_MOST_JPEG_SIDE:,} pixels a side"
        )
    if max(size) > CROP_SIZE * min(size):  # else no model finds them narrow, and none is asked
        processor = load_processor(recipe.model.name, revision=recipe.model.revision, **recipe.image.processor_options)
        try:
            processor.calc_num_image_tokens_from_image_size(*size)
        except ImageError as error:
            raise ConfigError(f"--image {width}x{height}: {error}") from error


def watched_recipe(recipe: Recipe, steps: int, folder: Path) -> dict[str, Any]:
    """The recipe's values for so many steps and nothing beside them, in a folder of its own.

    Example: 7 steps of 16 samples -> training.max_steps 7, data.max_rows 112, no validation, no checkpoint, no tracker.
    """
    values = recipe.model_dump()
    training = {key: value for key, value in values["training"].items() if not key.startswith(NOT_WATCHED)}
    if checkpointing(recipe.training.options) == SHARDED_CHECKPOINTING:
        training["gradient_checkpointing"] = True  # what ranks would do, one process does by itself
    values["training"] = {**training, "max_steps": steps, "save_strategy": "no"}
    values["data"] = {**values["data"], "split": None, "validation": None}
    if not recipe.data.streaming:
        needed = steps * recipe.training.samples_per_step
        values["data"]["max_rows"] = min(recipe.data.max_rows or needed, needed)
    values["report"] = {**values["report"], "to": []}
    values["output"] = str(folder / "run")
    return values


def summarise(recipe: Recipe, marks: StepMarks, trace: Path | None, *, chosen: Sequence[str] = ()) -> Profile:
    """What the marks of some steps say.

    Args:
        recipe: with what its `auto` came to.
        marks: of its steps.
        trace: the file for Perfetto.
        chosen: keys that were `auto`, see `advise`.
    """
    machine, rate = measure_rate(recipe)
    steps = max(marks.steps, 1)
    on_gpu = marks.device.type == "cuda"
    lengths = [length for batch in marks.batches for length in batch.lengths]
    positions = sum(rows * columns for rows, columns in (batch.shape for batch in marks.batches))
    floor = floor_operations(recipe, marks.batches) / rate if recipe.lora is not None else None
    watch = marks.device_watch
    found = Profile(
        device=machine,
        steps=marks.steps,
        samples_per_step=recipe.training.samples_per_step,
        micro_batches=len(marks.batches) / steps,
        tokens=sum(lengths) / steps,
        padding=1 - sum(lengths) / max(positions, 1),
        images=sum(len(batch.tower_grids) for batch in marks.batches) / steps,
        seconds=marks.seconds / steps,
        parts=[
            PartTime(name, use.seconds / steps, use.peak_bytes / 2**30 if on_gpu else None)
            for name, use in marks.parts().items()
        ],
        decode_seconds=marks.decode_seconds,
        device_idle=None if watch.busy_seconds is None else max(0.0, 1 - watch.busy_seconds / watch.seconds),
        weights_gib=marks.weights_bytes / 2**30,
        floor_share=None if floor is None or not marks.seconds else floor / marks.seconds,
        rate=rate,
        advice=None,
        trace=None if trace is None else str(trace),
    )
    return replace(found, advice=advise(recipe, found, chosen=chosen))


def floor_operations(recipe: Recipe, batches: Sequence[SeenBatch]) -> float:
    """The least arithmetic of these micro-batches; LoRA counts on all four projections, a projector as its tower."""
    config = load_config(recipe.model.name, revision=recipe.model.revision)
    rank = int((recipe.lora or {}).get("r", 16))
    total = 0.0
    for batch in batches:
        lengths = batch.lengths
        trained = batch.trained // max(len(lengths), 1)
        total += sum(
            useful_operations(config, tokens=length, image=0, crops=0, trained=trained, rank=rank) for length in lengths
        )
        grids = batch.tower_grids
        if grids:
            tokens = sum(grid_tokens(*grid) for grid in grids)
            passes = TOWER_PASSES[recipe.vision.tower]
            total += passes * vision_operations(config, tokens, sum(h * w + 1 for h, w in grids))
    return total


def advise(recipe: Recipe, found: Profile, *, chosen: Sequence[str] = ()) -> Advice | None:
    """The one setting that would change most; None when nothing stands out.

    What waits is told first, since nothing else helps while the device waits; then what is done in vain. Nothing is
    said against a value that `auto` chose by the memory, whose key is in `chosen`.
    Example: a step of 2 s, 1 s of it waiting for data and 16 samples of 0.1 s each, wants 3 workers of the loader.
    """
    training, options = recipe.training, recipe.training.options
    waiting = found.share("waiting for data")
    frozen = recipe.vision.frozen and not recipe.data.streaming and not recipe.image.augments
    if waiting > 0.05 and found.decode_seconds:
        computing = max(found.seconds * (1 - waiting), 1e-3)
        wanted = math.ceil(1.5 * found.decode_seconds * found.samples_per_step / computing)
        workers = min(wanted, usable_cores())  # more than cores would wait for each other
        if workers > int(options.get("dataloader_num_workers") or 0):
            seen = (
                f"{waiting:.0%} of a step waits for data; a sample takes {1000 * found.decode_seconds:.0f} ms of a core"
            )
            return Advice("training.dataloader_num_workers", str(workers), seen)
        if found.images and not recipe.image.fast:
            return Advice("image.fast", "true", f"{waiting:.0%} of a step waits for data, in spite of all workers")
    if found.padding > 0.1:
        key, value = ("training.packing", "true") if getattr(training, "packing", None) is False else (None, "")
        if key:
            return Advice(key, value, f"{found.padding:.0%} of all positions are padding")
    again = training.max_steps is None and training.epochs > 1  # how many rows max_steps go through is not known here
    if frozen and recipe.vision.cache is None and again and found.share("tower") > 0.1:
        seen = (
            f"{found.share('tower'):.0%} of a step is the frozen tower, and each epoch sends the same images through it"
        )
        return Advice("vision.cache", "memory", seen)
    checkpoints, every = checkpointing(options), checkpointing_kwargs(options).get("every_n_layers") or 1
    if checkpoints and f"training.{checkpoints}" not in chosen and found.share("decoder forward") / every > 0.05:
        twice = "each layer" if every == 1 else f"one layer in {every}"
        seen = f"{twice} is computed twice; without it memory grows, and more samples fit than one may think"
        return Advice(f"training.{checkpoints}", "false", seen)
    idle = 0.0 if found.device_idle is None else found.device_idle
    if idle - waiting > 0.15 and "training.micro_batch_size" not in chosen:
        seen = f"the GPU has nothing to do in {idle:.0%} of the time: its kernels are short"
        return _more_at_once(recipe, found, seen)
    return None


def _more_at_once(recipe: Recipe, found: Profile, seen: str) -> Advice | None:
    """More samples at once, in a number that the recipe takes; None where no larger one is left.

    Example: 12 samples a step of which 4 go at once -> micro_batch_size 6; packs of 5,000 tokens -> of 10,000.
    """
    training = recipe.training
    if found.micro_batches <= 1:
        return None
    if training.tokens_per_micro_batch is not None:
        pack = max(training.tokens_per_micro_batch, found.tokens / found.micro_batches)  # none is cut to the budget
        return Advice("training.tokens_per_micro_batch", str(round(2 * pack)), seen)
    larger = range(training.micro_batch + 1, training.samples_per_step + 1)
    size = next((size for size in larger if training.samples_per_step % size == 0), None)
    return None if size is None else Advice("training.micro_batch_size", str(size), seen)
