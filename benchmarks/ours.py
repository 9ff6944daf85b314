"""Our own side: what `phi3v.train` sets up for a step, without its Trainer.

In come a size and which parts to use; out come a model with its adapter, a function that makes micro-batches, and
notes on the parts that ran. A part that this version of phi3v does not have is left out, and the notes say so.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from sizes import LORA, build, bytes_of, fill_adapters
from torch import nn

from phi3v.data.collate import Collator
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.tuning import attach_lora

Example = dict[str, torch.Tensor]
Batch = dict[str, Any]
Batches = Callable[[list[Example], int], list[Batch]]


@dataclass(frozen=True)
class Parts:
    """Which of our parts a way uses.

    Attributes:
        packed: samples end to end; False pads each micro-batch to its longest.
        fast_lora: the hand-written layer.
        compiled: torch.compile for each layer, those of the tower alone where the decoder's are hand-written.
        checkpointing: activations of every n-th layer are made again in the backward pass; 0 of none, 1 of all.
        quantized: the decoder's matrices in 4 bits (bitsandbytes, CUDA alone).
    """

    packed: bool = True
    fast_lora: bool = True
    compiled: bool = True
    checkpointing: int = 0
    quantized: bool = False


@dataclass
class Ours:
    """A model ready to train.

    Attributes:
        model: with its adapter, in training mode.
        batches: examples and samples of a micro-batch -> micro-batches.
        masters: float32 masters of weights that compute in a shorter type, by name.
        autocast: number type of mixed precision, None where everything is in its own type.
        note: which parts ran.
    """

    model: Any
    batches: Batches
    masters: dict[str, nn.Parameter]
    autocast: torch.dtype | None
    note: str


def part(name: str) -> ModuleType | None:
    """A module of phi3v, or None where this version has none of that name."""
    try:
        return importlib.import_module(f"phi3v.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("phi3v"):
            return None
        raise


def set_up(config: Phi3VConfig, parts: Parts, *, device: str, dtype: torch.dtype) -> Ours:
    """Our model, as `phi3v.train` would set it up with a recipe that says `parts`."""
    base = build(Phi3VForCausalLM, config, device=device, dtype=dtype, attention="sdpa")
    if parts.quantized:
        from four_bits import quantise

        quantise(base)
    with torch.device(device):
        tuned = attach_lora(base, LORA)
    fill_adapters(tuned)
    if parts.checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False}, every_n_layers=int(parts.checkpointing))
    notes = _attach(tuned, base, parts, device)
    batches, note = batches_of(config, packed=parts.packed)
    masters: dict[str, nn.Parameter] = {}
    short = part("training.master_weights")
    if short is not None and dtype == torch.bfloat16:
        masters = short.shorten_weights(tuned, dtype)
    mixed = dtype if dtype != torch.float32 and not masters else None
    return Ours(tuned.train(), batches, masters, mixed, ", ".join([*filter(None, notes), note]))


def _attach(tuned: Any, base: Any, parts: Parts, device: str) -> list[str]:
    """Puts attention of packs, hand-written and compiled layers in place; says which."""
    notes: list[str] = []
    attention, fast = part("kernels.packed_attention"), part("kernels.lora_layer")
    layers = part("training.faster_layers")
    replaced = fast.attach_fast_lora(tuned, force=device == "meta") if fast and parts.fast_lora else 0
    if attention and parts.packed:
        notes.append(attention.attach_packed_attention(tuned, compiled=parts.compiled and not replaced))
    if parts.fast_lora:
        notes.append(f"{replaced} hand-written layers")
    if parts.compiled and layers and device == "cuda":
        if replaced:
            tower = base.model.vision_embed_tokens.img_processor.vision_model
            for layer in tower.encoder.layers[: tower.layers_read]:
                layer.compile(dynamic=True)
            notes.append("tower compiled")
        else:
            notes.append(f"{layers.compile_layers(base)} compiled layers")
    return notes


def batches_of(config: Phi3VConfig, *, packed: bool) -> tuple[Batches, str]:
    """What makes micro-batches: packs, or padded rows where this version cannot pack; and which of both."""
    image = {"image_token_id": config.image_token_id}
    in_bytes = part("model.crops_phi3_v") is not None
    features = part("features.collate")
    with_features: Any = getattr(features, "CollateFeatures", lambda collate: collate)
    padded = with_features(Collator(0, **_known(Collator, image)))
    plan = part("data.plan") if packed else None
    if plan is None:

        def pad(examples: list[Example], size: int) -> list[Batch]:
            ready = [bytes_of(example) if in_bytes else example for example in examples]
            return [padded(ready[start : start + size]) for start in range(0, len(ready), size)]

        return pad, "padded" if not packed else "padded: no packs in this version"
    collating: Any = part("data.collate")
    collate = with_features(collating.PackedCollator(**_known(collating.PackedCollator, image)))

    def pack(examples: list[Example], size: int) -> list[Batch]:
        ready = [bytes_of(example) if in_bytes else example for example in examples]
        return collating.StepCollator(collate, plan.MicroBatches(size))(ready)

    return pack, "packed"


def _known(kind: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a class of this version takes."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(kind).parameters}


def paths_of(model: Any) -> str:
    """Which way the decoder's layers went so far: "32 of 32 layers hand-written, calls: fast 640" for instance."""
    fast = part("kernels.lora_layer")
    if fast is None or not hasattr(fast, "fast_lora_state"):
        return ""
    state = fast.fast_lora_state(model)
    calls = ", ".join(f"{way} {count}" for way, count in state.calls.items())
    return f"{state.attached} of {state.layers} layers hand-written" + (f", calls: {calls}" if calls else "")


def loss_of(model: Any, batch: Batch, items: int) -> torch.Tensor:
    """A micro-batch's part of the step's loss, with logits at trained positions alone, as StepTrainer asks for it."""
    wanted = {} if "trained_positions" in batch else {"trained_logits_only": True}
    return model(**batch, **wanted, num_items_in_batch=items, use_cache=False).loss
