"""From a loaded base to a model that is ready to train, as a recipe says: adapters, what is frozen, fast paths.

The same steps prepare the model that trains and the one on the meta device that `memory` counts. Knows nothing of
data or of the Trainer.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phi3v.adapters import adapter_state, check_adapter, load_adapter
from phi3v.errors import CheckpointError, ConfigError, DeviceError
from phi3v.fingerprints import name_weights
from phi3v.kernels.lora_layer import attach_fast_lora
from phi3v.kernels.packed_attention import attach_packed_attention
from phi3v.launch import Launch
from phi3v.loading import load_base, load_config, rank_device, resolve_device, resolve_dtype
from phi3v.meta_base import meta_base
from phi3v.ranks import Ranks
from phi3v.recipe import Recipe
from phi3v.targets import ADAPTER_CONFIG, Target, read_json, resolve_target
from phi3v.training.checkpointing import OWN_KWARGS, checkpointing, checkpointing_kwargs
from phi3v.training.faster_layers import compiles
from phi3v.training.freed_memory import give_back_freed, leave_unused_pages
from phi3v.training.master_weights import same_in
from phi3v.training.step_faults import all_finite
from phi3v.tuning import attach_lora, check_lora, freeze, mark_trained, vision_choices

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model with what trains marked in float32.

    Attributes:
        model: it.
        autocast: number type of mixed precision; None to compute in the weights' own.
        base: the name of the base's weights, see `fingerprints.name_weights`; nothing where it was not loaded.
        short: number type of weights that train on float32 masters, see `master_weights`; None where there are none.
    """

    model: Any
    autocast: torch.dtype | None
    short: torch.dtype | None
    base: str = ""


def training_device(device: str) -> torch.device:
    """The device of a recipe; training uses the first visible GPU, of several ranks each the one of its number."""
    wanted = rank_device(device)
    if Launch.here().count > 1 and resolve_device(device).index is None:
        return wanted
    if wanted.type == "cuda" and wanted.index not in (None, 0):
        raise DeviceError(
            f"model.device is {device!r}, training uses the first visible GPU: set CUDA_VISIBLE_DEVICES={wanted.index} "
            "and model.device=cuda"
        )
    return wanted


def join_ranks(recipe: Recipe) -> Ranks:
    """Joins the other ranks of a training, where a launcher started some.

    Raises: ConfigError where they cannot share the recipe's steps, or are to share a model and are not there.
    """
    options = recipe.training.options
    if options.get("fsdp") and Launch.here().count == 1:
        raise ConfigError(
            "training.fsdp shares a model among several processes, and this is one alone: start it with torchrun "
            "--nproc-per-node=N -m phi3v train, or take it out"
        )
    ranks = Ranks.join(
        training_device(recipe.model.device), backend=options.get("ddp_backend"), timeout=options.get("ddp_timeout")
    )
    samples = recipe.training.samples_per_step
    with ranks.together():
        if samples % ranks.count:
            raise ConfigError(
                f"training.samples_per_step is {samples}, which {ranks.count} ranks cannot share evenly: set a "
                f"multiple of {ranks.count}, as a step has so many samples over all ranks"
            )
    return ranks


def check_layout(recipe: Recipe) -> None:
    """Refuses LoRA that does not fit the modules of the recipe's model, by its config alone.

    The loaded model would tell the same, behind all rows of the data. Raises: ConfigError, CheckpointError.
    """
    if recipe.lora is None or recipe.model.adapter is not None:  # an adapter brings its own
        return
    config = load_config(recipe.model.name, revision=recipe.model.revision)
    base = meta_base(config, dtype=torch.float32)
    check_lora(base, recipe.lora, tower=recipe.vision.tower, projector=recipe.vision.projector)


def prepare_model(recipe: Recipe, device: torch.device, checkpoint: Path | None = None) -> Prepared:
    """Loads the base of a recipe and makes it ready to train on a device, or to go on from a checkpoint."""
    compute = resolve_dtype(recipe.model.dtype, device)
    if device.type == "cpu":
        give_back_freed()
    model = load_base(
        recipe.model.name,
        dtype=base_dtype(recipe),
        device=str(device),
        attn_implementation=recipe.model.attn_implementation,
        quantization=recipe.quantization,
        revision=recipe.model.revision,
    )
    if device.type == "cpu":
        leave_unused_pages(model)
    base = name_weights(model.state_dict().items())
    return replace(make_ready(model, recipe, compute, checkpoint=checkpoint), base=base)


def compute_twice(model: Any, options: Mapping[str, Any], *, offload: bool = True) -> None:
    """Has activations computed twice where the options of a training ask for it, as the Trainer will.

    Args:
        model: in its layers.
        options: of the Trainer.
        offload: False keeps checkpoints on the device, whatever the options say.
    """
    if checkpointing(options) is None:
        return
    how = checkpointing_kwargs(options)
    # arguments of their own, as the Trainer hands them; among the others they would reach torch, which drops them
    own = {name: how.pop(name) for name in OWN_KWARGS if name in how}
    own = {name: value for name, value in own.items() if offload or name != "offload"}
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(how, **own)


def base_dtype(recipe: Recipe) -> str:
    """The number type that a base is loaded in: weights that are tuned as a whole are float32."""
    return "float32" if recipe.lora is None else recipe.model.dtype


def make_ready(
    model: Any, recipe: Recipe, compute: torch.dtype, *, on_gpu: bool = False, checkpoint: Path | None = None
) -> Prepared:
    """Makes a base ready to train.

    Under LoRA on a bfloat16 base everything computes in bfloat16 and the optimiser keeps float32 masters. float16,
    whose gradients need scaling, and a model tuned as a whole compute under autocast.

    Args:
        model: the base.
        recipe: lora, vision and training are read.
        compute: the number type of the recipe's model.dtype.
        on_gpu: a model on the meta device stands for one on a GPU.
        checkpoint: of a run that goes on, whose adapter then takes the place of model.adapter.
    """
    wholly = recipe.lora is None
    vision = {"tower": recipe.vision.tower, "projector": recipe.vision.projector}
    if recipe.lora is None:
        freeze(model, language_model=True, **vision)
    elif recipe.model.adapter is not None:
        model = _go_on(model, recipe, str(checkpoint or recipe.model.adapter))
    else:
        model = attach_lora(model, recipe.lora, revision=recipe.model.revision, **vision)
    if checkpointing_kwargs(recipe.training.options)["use_reentrant"]:
        model.enable_input_require_grads()  # re-entrant checkpoints need an input that asks for a gradient
    sharded = bool(recipe.training.options.get("fsdp"))  # whole weights are there while a layer runs, and masters never
    whole_graph = bool(recipe.training.options.get("torch_compile"))
    replaced = 0
    if recipe.training.fast_lora == "auto" and not whole_graph and not sharded:
        replaced = attach_fast_lora(model, force=on_gpu)
    if recipe.training.packing:
        each = compiles(recipe.training.compile_layers, model.device, quantized=recipe.quantization is not None)
        attach_packed_attention(model, compiled=whole_graph or (each and not replaced))
    if wholly:
        _shorten_frozen_tower(model, compute)
    short = torch.bfloat16 if compute == torch.bfloat16 and not wholly and not sharded else None
    return Prepared(model, None if compute in (torch.float32, short) else compute, short)


def _go_on(base: Any, recipe: Recipe, name: str) -> Any:
    """The base with a trained adapter on it, ready for more training.

    Raises: ConfigError when it does otherwise to the vision parts than the recipe; CheckpointError when it does not
        fit the base, or holds what is no number.
    """
    place = adapter_place(name, recipe.model.name)
    place = replace(place, base=str(recipe.model.name))
    freeze(base, language_model=False, tower="frozen", projector="frozen")
    tuned = load_adapter(base, place, trainable=True, on_meta=next(base.parameters()).device.type == "meta")
    if spoilt := [
        key for key, weight in adapter_state(tuned).items() if not weight.is_meta and not all_finite([weight])
    ]:
        raise CheckpointError(
            f"model.adapter {name}: {len(spoilt)} of its tensors hold NaN or infinity, {spoilt[0]} for instance: name "
            "another adapter, one of an earlier checkpoint say, or tune it again"
        )
    for part, does in vision_choices(tuned).items():
        if does != (wanted := getattr(recipe.vision, part)):
            raise ConfigError(f"model.adapter {name} has its {part} {does}: set vision.{part}={does}, it is {wanted}")
    config = tuned.peft_config["default"]
    if getattr(config, "lora_alpha", 1) == 0:
        raise CheckpointError(
            f"model.adapter {name}: lora_alpha in its {ADAPTER_CONFIG} is 0, by which nothing of it answers or trains: "
            "set it there to what it was tuned with, or name another adapter"
        )
    if Path(before := str(config.base_model_name_or_path)).is_absolute() and not Path(before).is_dir():
        _log.warning("model.adapter %s was tuned on %s, which is not here: it fits %s", name, before, place.base)
    elif not _is_named(before, place.base):
        _log.warning(
            "model.adapter %s was tuned on %s, and goes on on %s: its shapes fit, whether it is the same model is not "
            "known",
            name,
            before,
            place.base,
        )
    config.base_model_name_or_path = str(Path(place.base).resolve()) if Path(place.base).is_dir() else place.base
    config.revision = recipe.model.revision
    return mark_trained(tuned)


def adapter_place(name: str, base: str | None = None) -> Target:
    """Where an adapter to go on from lies; `base` is its own where that is a folder of another machine.

    Raises: CheckpointError when there is none, or a broken one.
    """
    place = resolve_target(name, instead=base)
    if place.adapter is None:
        raise CheckpointError(f"model.adapter {name} holds no adapter: name a run under LoRA or an adapter's folder")
    check_adapter(place.adapter)
    return place


def _is_named(one: str, base: str) -> bool:
    """Whether a base is the one of a name, or by its own name a copy of it.

    Example: "microsoft/Phi-3-vision-128k-instruct" and a folder of this last name, or one whose config.json says it,
    or a snapshot in the hub's cache -> True.
    """
    if one == base or (Path(one).is_dir() and Path(base).is_dir() and Path(one).resolve() == Path(base).resolve()):
        return True
    names = {_last(base)}
    if (file := Path(base) / "config.json").is_file():
        names.add(_last(str(read_json(file).get("_name_or_path") or base)))
    return not (Path(one).is_dir() and Path(base).is_dir()) and _last(one) in names


def _last(name: str) -> str:
    """The last part of a hub id or of a path; of a snapshot in the hub's cache, that of the id."""
    of_cache = re.search(r"models--[^/\\]+?--([^/\\]+)", name)
    return of_cache.group(1) if of_cache else Path(name).name


def _shorten_frozen_tower(model: Any, dtype: torch.dtype) -> None:
    """Puts a frozen tower into the compute dtype, where that changes none of its weights, to spare casts."""
    tower = model.model.vision_embed_tokens.img_processor
    weights = list(tower.parameters())
    if any(weight.requires_grad for weight in weights):
        return
    if weights[0].device.type == "meta" or same_in(dtype, weights):  # files are taken to be in that type
        tower.to(dtype)
