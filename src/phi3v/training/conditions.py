"""What a run was trained under so far: its rows and photos, its base, and what it ran on.

In come rows and a recipe, out come short names for them that a checkpoint keeps; a run that goes on compares them.
Other rows, photos, another base or another adapter to begin with are refused: steps done would no longer be steps of
this run. So are other settings of answers by whose score the run ends or its best weights are chosen. Other versions
and devices compute a little differently and are listed. The rest of the recipe is compared in `run_folder`.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from phi3v.checkpoint_files import PROCESSOR_FILES
from phi3v.data.sources import LoadedData, StreamedData
from phi3v.errors import ConfigError
from phi3v.fingerprints import name_photos, name_rows, name_weights
from phi3v.recipe import Recipe
from phi3v.recipe_report import EvaluationSection
from phi3v.run_folder import OPTIONAL_PACKAGES, RunFolder, gather_versions
from phi3v.targets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, tensor_shapes
from phi3v.training.checkpoints import STATE, checkpoint_step, logged_lines, read_manifest
from phi3v.training.prepare import adapter_place
from phi3v.weight_files import find_file, read_weights

_BASE_FILES = ("config.json", *PROCESSOR_FILES)
_ANSWERING = ("during_training", "max_new_tokens", "metrics", "numeric_fields")
"""What of `evaluation` answers during a training, and their scores, follow from."""
_REFUSED = {
    "rows": "the training rows",
    "photos": "the photos of the training rows",
    "held_out": "the validation rows or their photos",
    "base": "the weights of the base model",
    **{file: f"the values in {file} of the base model" for file in _BASE_FILES},
    "adapter": "the weights of model.adapter",
    ADAPTER_CONFIG: f"the values in {ADAPTER_CONFIG} of model.adapter",
    **{f"evaluation.{name}": f"values of evaluation.{name}, by which this run is judged," for name in _ANSWERING},
}
_NOTES = tuple(
    "_name_or_path auto_map transformers_version base_model_name_or_path revision auto_mapping inference_mode "
    "peft_version".split()
)
"""Values of such files that change nothing."""
_SETS = ("target_modules", "exclude_modules", "modules_to_save")
"""Values of such files that peft writes in any order."""
_OF_BITSANDBYTES = ("8bit", "32bit", "bnb", "ademamix")
"""What the names of its optimisers have in them; those of "adamw_torch_..." are torch's."""
_log = logging.getLogger(__name__)


def conditions_of(
    data: LoadedData | StreamedData,
    recipe: Recipe,
    base: str,
    device: torch.device,
    dtype: torch.dtype,
    judged_by: str | None = None,
) -> dict:
    """What a checkpoint keeps, by name.

    Args:
        data: the run's rows; training rows of a stream are not known.
        recipe: it.
        base: what `name_weights` gave for the model as it was loaded.
        device: what trains.
        dtype: what it computes in.
        judged_by: the score of validations by which the run ends, its best weights are chosen or its learning rate
            falls, "eval_loss" for instance; None where none of this happens.
    Example: {"config.json": "1c9b...", ..., "base": "77ab...", "rows": "9f2c...", "photos": "08d1...",
    "held_out": "5e00...", "device": "cpu", "dtype": "float32", "torch": "2.13.0+cpu", ...}.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    left_out = {"platform", *OPTIONAL_PACKAGES} - used_packages(recipe, device)
    return {
        **name_files(recipe.model.name, recipe.model.revision),  # first, as rows have other lengths under other values
        "base": base,
        **name_adapter(recipe.model.adapter, recipe.model.name),
        **name_data(data),
        **_judging(recipe.evaluation, judged_by),
        "device": where,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: version for name, version in gather_versions().items() if name not in left_out},
    }


def used_packages(recipe: Recipe, device: torch.device) -> set[str]:
    """Those of `OPTIONAL_PACKAGES` that a recipe's training computes with on a device, where they are installed.

    Example: with `training.optim: adamw_8bit` on a CPU {"bitsandbytes"}.
    """
    options, attention, on_gpu = recipe.training.options, recipe.model.attn_implementation, device.type == "cuda"
    optimiser = str(options.get("optim"))
    of_bitsandbytes = not optimiser.startswith("adamw_torch") and any(word in optimiser for word in _OF_BITSANDBYTES)
    used = {
        "bitsandbytes": recipe.quantization is not None or of_bitsandbytes,
        "simplejpeg": recipe.image.fast,
        "liger-kernel": bool(options.get("use_liger_kernel")),
        "flash-attn": attention == "flash_attention_2",
        "flash-attn-4": attention == "flash_attention_4" or (on_gpu and attention in (None, "sdpa")),
        "triton": on_gpu,
    }
    return {name for name, so in used.items() if so}


def name_data(data: LoadedData | StreamedData) -> dict[str, str | None]:
    """Names for rows and their photos, see `conditions_of`; lengths are part of them where they were measured."""
    train, held_out = data.train if isinstance(data, LoadedData) else None, data.validation or []
    return {
        "rows": None if train is None else name_rows(train, getattr(data, "lengths", [])),
        "photos": None if train is None else name_photos(train),
        "held_out": name_rows(held_out) + name_photos(held_out),
    }


def facts_of(checkpoint: Path | None, now: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """What manifests of a run say besides their files, under today's conditions.

    Args:
        checkpoint: which the run goes on from; None at its start.
        now: what `conditions_of` gave.
        ranks: processes that share each step.
    Raises: ConfigError where the run cannot go on from it.
    """
    then = read_manifest(checkpoint) if checkpoint else {}
    now = {**now, "ranks": ranks}
    if checkpoint:
        compare(then.get("conditions", {}), now, checkpoint.name)
    return {"conditions": now, "halvings": then.get("halvings", 0)}


def note_begun(run: RunFolder, now: dict[str, Any]) -> None:
    """Notes what a run begins under; what is other than when it began before, and has no checkpoint of, is one warning.

    Nothing is refused: the run starts over, so all of its steps are of what is there now.
    """
    then = run.read_begun()
    if changed := [name for name in now if name in then and then[name] != now[name]]:
        told = dict.fromkeys(
            _REFUSED[name] if name in _REFUSED else f"{name} ({now[name]}, {then[name]} until then)" for name in changed
        )
        _log.warning(
            "%s has no checkpoint to go on from and starts over; not as it began before: %s", run.path, ", ".join(told)
        )
    run.write_begun(now)


def compare(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Compares the conditions of a checkpoint with those of today; what differs is one warning.

    Raises: ConfigError for other rows, photos, another base and what else is refused.
    """
    changed = [name for name in now if name in then and then[name] != now[name]]
    for name in changed:
        if name in _REFUSED:
            raise ConfigError(
                f"{_REFUSED[name]} are not those that {where} was trained with: put them back to go on with this run, "
                "or give another output to begin a new one"
            )
    if changed:
        told = ", ".join(f"{name} {now[name]} ({then[name]} until then)" for name in changed)
        _log.warning(
            "going on from %s with %s: the run will not end bit for bit as one without the change", where, told
        )


def keep_metrics(run: RunFolder, checkpoint: Path | None) -> None:
    """Leaves in metrics.jsonl what a checkpoint knows, nothing without one; where it is gone it is written again.

    The checkpoint knows what was logged, and no sample answers or steps that were left out.
    """
    if checkpoint is None:
        run.keep_metrics(-1)
    elif run.metrics.is_file():
        run.keep_metrics(checkpoint_step(checkpoint), logged_lines(checkpoint))
    else:
        lines = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]
        for line in lines:
            run.append_metrics({"step": line["step"], **line})
        _log.warning("%s is gone: the losses are written again, from %s", run.metrics, checkpoint.name)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Here transformers does not list what differs from a checkpoint by its own names: `compare` tells it."""

    def wanted(record: logging.LogRecord) -> bool:
        return "arguments do not match the ones in the `trainer_state.json`" not in record.getMessage()

    log = logging.getLogger("transformers.trainer_utils")
    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


def name_files(base: str, revision: str | None) -> dict[str, str | None]:
    """Names for what stands in a base's small files, however it is written there: {"config.json": "1c9b...", ...}."""
    places = {file: find_file(base, file, revision) for file in _BASE_FILES}
    return {file: None if place is None else _name_values(read_json(place)) for file, place in places.items()}


def name_adapter(name: str | None, base: str | None = None) -> dict[str, str]:
    """Names for the adapter that a run begins with: {"adapter": "40d1...", "adapter_config.json": "c2f7..."}, or {}."""
    folder = None if name is None else adapter_place(name, base).adapter
    if folder is None:
        return {}
    file = folder / ADAPTER_WEIGHTS
    weights = name_weights(read_weights(dict.fromkeys(tensor_shapes(file), file)))
    return {"adapter": weights, ADAPTER_CONFIG: _name_values(read_json(folder / ADAPTER_CONFIG))}


def _judging(evaluation: EvaluationSection, judged_by: str | None) -> dict[str, Any]:
    """Settings that a score follows from: its batches, in which numbers are rounded otherwise, and for one of answers
    how they are made. Example: {"evaluation.batch_size": 8} for "eval_loss".
    """
    of_answers = () if judged_by in ("loss", "eval_loss") else _ANSWERING
    names = () if judged_by is None else ("batch_size", *of_answers)
    return {f"evaluation.{name}": getattr(evaluation, name) for name in names}


def _name_values(values: dict[str, Any]) -> str:
    """A name for the values of a file, notes aside."""
    told = {
        key: sorted(value) if key in _SETS and isinstance(value, list) else value
        for key, value in values.items()
        if key not in _NOTES
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
