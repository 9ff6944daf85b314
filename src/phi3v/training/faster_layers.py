"""Faster forms of the model's layers from libraries, as a recipe chooses them: torch.compile, Liger's kernels.

In comes a model that is ready to train; the same model computes the same things with fewer passes over memory. Nothing
of it is saved. `step_line` says in words which way a step goes. Knows nothing of rows or of the Trainer.
"""

import importlib.util
import inspect
from typing import Any

import torch
from torch import nn

from phi3v.data.plan import MicroBatches
from phi3v.errors import ConfigError, DeviceError, MissingPackageError, install
from phi3v.kernels.lora_layer import FastLoraState
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.passthrough import check_names
from phi3v.recipe import Recipe, TrainingSection
from phi3v.training.checkpointing import checkpointing, checkpointing_kwargs

_LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def check_faster_layers(recipe: Recipe, device: torch.device) -> None:
    """Refuses what cannot be had here, before anything is loaded.

    Raises:
        ConfigError: an argument that Liger does not have, or a loss of Liger's.
        MissingPackageError: Triton or Liger is not installed.
        DeviceError: Liger's kernels, offloaded checkpoints, or flex_attention, without a GPU.
    """
    training = recipe.training
    if device.type != "cuda" and checkpointing_kwargs(training.options).get("offload"):
        raise DeviceError(
            "training: offload moves checkpoints from a GPU to the machine's memory, and this run is on "
            f"{device.type}: take it out"
        )
    if device.type == "cpu" and recipe.model.attn_implementation == "flex_attention":
        raise DeviceError(
            "model.attn_implementation: flex_attention cannot train on a CPU, torch has no backward pass of it there: "
            "use sdpa"
        )
    if training.compile_layers is True and device.type == "cuda" and not _installed("triton"):
        raise MissingPackageError(
            "training.compile_layers is true and Triton, which torch.compile needs on a GPU, is not installed: "
            "pip install triton, or set compile_layers to auto"
        )
    if not training.options.get("use_liger_kernel"):
        return
    if device.type != "cuda":
        raise DeviceError(f"training.use_liger_kernel needs a GPU, and this run is on {device.type}: take it out")
    if not _installed("liger_kernel"):
        raise MissingPackageError(f"training.use_liger_kernel is true and Liger is not installed: {install('liger')}")
    _check_liger_options(training.options.get("liger_kernel_config") or {})


def _check_liger_options(options: Any) -> None:
    """Refuses arguments that Liger's `apply_liger_kernel_to_phi3` does not have, and its losses.

    Example: {"rms_nrom": False} -> "training.liger_kernel_config.rms_nrom is no option: did you mean rms_norm?".
    """
    from liger_kernel.transformers import apply_liger_kernel_to_phi3

    section = "training.liger_kernel_config"
    if not isinstance(options, dict):
        raise ConfigError(f"{section} is {options!r}, allowed is a mapping, {{rope: false}} for instance")
    known = [name for name in inspect.signature(apply_liger_kernel_to_phi3).parameters if name != "model"]
    check_names(section, options, known)
    if any(options.get(loss) for loss in _LIGER_LOSSES):
        raise ConfigError(f"{section}: the loss is phi3v's own, take (fused_linear_)cross_entropy out")


def use_faster_layers(model: Any, recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Does what the recipe asks for; how many layers each way has now, {"liger": 32, "compiled": 55} for instance.

    Args:
        model: a Phi-3-V, or a PEFT model of one.
        recipe: training.compile_layers, use_liger_kernel and liger_kernel_config are read.
        device: where it trains.
    """
    base = model if isinstance(model, Phi3VForCausalLM) else model.get_base_model()
    options, done = recipe.training.options, {"liger": 0, "compiled": 0}
    if options.get("use_liger_kernel"):
        done["liger"] = use_liger(base, options.get("liger_kernel_config") or {})
    if compiles(recipe.training.compile_layers, device, quantized=recipe.quantization is not None):
        chosen = recipe.training.compile_layers is True  # torch 2.11 does not compile Liger's norm and MLP
        done["compiled"] = compile_layers(base, decoder=chosen or not done["liger"])
    return done


def compiles(choice: bool | str, device: torch.device, *, quantized: bool) -> bool:
    """What `training.compile_layers` comes to: "auto" compiles on a GPU with Triton, except 4-bit and 8-bit bases.

    bitsandbytes' layers break a compiled layer into pieces, and on a CPU compiling takes longer than it gives back.
    """
    if choice == "auto":
        return device.type == "cuda" and not quantized and _installed("triton")
    return bool(choice)


def compile_layers(model: Phi3VForCausalLM, *, decoder: bool = True, **options: Any) -> int:
    """Compiles each layer of the decoder and of the tower by itself; how many are compiled: hand-written ones are not.

    Layers of one kind share their code, so few are compiled. Sizes are left open: a batch of another length or with
    other crops is no reason to compile again.

    Args:
        model: a Phi-3-V.
        decoder: whether its layers are compiled, or the tower's alone.
        **options: of torch.compile.
    """
    tower = model.model.vision_embed_tokens.img_processor
    transformer = _active(tower).vision_model
    layers: list[nn.Module] = [
        *(model.model.layers if decoder else []),
        *transformer.encoder.layers[: transformer.layers_read],
    ]
    for layer in layers:
        layer.compile(**{"dynamic": True, **options})
    return sum(layer._compiled_call_impl is not None for layer in layers)


def use_liger(model: Phi3VForCausalLM, options: dict[str, Any]) -> int:
    """Puts Liger's Phi-3 kernels for rope, norm and MLP into the decoder; the number of its layers.

    The loss stays ours: logits are made at trained positions alone, so there is little to fuse.

    Args:
        model: a Phi-3-V on a GPU.
        options: arguments of Liger's `apply_liger_kernel_to_phi3`, which `check_faster_layers` has looked at.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_phi3

    apply_liger_kernel_to_phi3(**{**options, **dict.fromkeys(_LIGER_LOSSES, False)}, model=model)
    return len(model.model.layers)


def step_line(attention: str, micro_batches: MicroBatches, state: FastLoraState, layers: dict[str, int]) -> str:
    """Which way the steps of a run go, in one line.

    Args:
        attention: its name.
        micro_batches: how a step is cut.
        state: of the decoder's layers, before any was compiled: of a compiled one no other reason is known.
        layers: what `use_faster_layers` did.
    Example: "each step: packs of at most 5,078 tokens, attention phi3v_packed_varlen, 32 of 32 decoder layers
    hand-written, 23 layers compiled", or "each step: 2 padded samples at a time, attention sdpa, 0 of 32 decoder layers
    hand-written (no CUDA device), none compiled".
    """
    if not micro_batches.packed:
        size = micro_batches.size
        cut = f"{size} padded samples at a time" if size > 1 else "one sample at a time"
    elif micro_batches.tokens:
        cut = f"packs of at most {micro_batches.tokens:,} tokens"
    else:
        cut = f"packs of at most {micro_batches.size} times a step's longest sample"
    written = f"{state.attached} of {state.layers} decoder layers hand-written"
    reasons = f" ({', '.join(state.reasons)})" if state.reasons else ""
    more = [f"{layers['compiled']} layers compiled" if layers["compiled"] else "none compiled"]
    liger = layers["liger"] - state.attached  # hand-written layers have kernels of their own
    more += [f"{liger} with Liger's kernels"] if liger > 0 else []
    return f"each step: {cut}, attention {attention}, {written}{reasons}, {', '.join(more)}"


def without_effect(training: TrainingSection, shortest: int, layers: int) -> list[str]:
    """What a run is told of choices that change nothing, or almost nothing.

    Args:
        training: the recipe's section.
        shortest: tokens of the shortest sample; 0 where it is not known.
        layers: of the decoder.
    Example: "training.tokens_per_micro_batch is 10 and the shortest sample has 331: each sample goes alone".
    """
    found, budget = [], training.tokens_per_micro_batch
    if budget is not None and budget < shortest:
        found.append(
            f"training.tokens_per_micro_batch is {budget:,} and the shortest sample has {shortest:,}: each sample goes "
            "alone"
        )
    every = checkpointing_kwargs(training.options).get("every_n_layers", 1)
    if checkpointing(training.options) is not None and every > layers:
        found.append(f"every_n_layers is {every} and the decoder has {layers} layers: one is computed twice at most")
    return found


def _active(module: Any) -> Any:
    """What computes behind PEFT's holder of a module that it trains as a whole."""
    return module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module


def _installed(package: str) -> bool:
    """Whether a package is there."""
    return importlib.util.find_spec(package) is not None
