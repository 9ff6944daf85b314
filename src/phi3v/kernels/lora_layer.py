"""A decoder layer of frozen base weights and LoRA, forward and backward by hand, put into a PEFT model from outside.

`attach_fast_lora(model)` gives the decoder layers that it can serve another class and leaves everything else as it was:
parameters, their names, what PEFT stores, what checkpointing does. Attention goes through transformers' interface with
the arguments that the layer was called with, so packed, padded, sdpa and FlashAttention runs work alike. A layer, or a
call, that is not served takes transformers' own forward, and the reason is kept: `fast_lora_state` tells.

Gradients equal those of the plain layer to rounding. Generation (a cache and no gradient) takes the plain forward.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.kernels.lora_functions import Heads, Norm, NormQkvRope, OutputAndMlp
from phi3v.kernels.lora_operands import Operands, Together, WidenedWeights, active_adapter, adapter_weights, base_weight
from phi3v.model.step_phi3_v import attend, pick

_SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class LayerState:
    """What a hand-written layer keeps beside the module's own parts.

    Attributes:
        widened: its base weights with columns for B.
        calls: how many forward passes went which way: {"fast": 64, "generation": 2} for instance.
        looked_at: the projections, with their active adapters, that the rest is of.
        reason: why these projections cannot be served, None when they can.
        adapters: the active adapter of each projection by its name, None where it has none.
        parts: every module of the layer.
        hooks: their hooks on forward passes.
        heads: numbers of heads.
    """

    widened: WidenedWeights = field(default_factory=WidenedWeights)
    calls: Counter[str] = field(default_factory=Counter)
    looked_at: tuple[Any, ...] = ()
    reason: str | None = None
    adapters: dict[str, str | None] = field(default_factory=dict)
    parts: tuple[nn.Module, ...] = ()
    hooks: tuple[dict, ...] = ()
    heads: Heads | None = None


@dataclass(frozen=True)
class FastLoraState:
    """Which way the decoder layers of a model went.

    Attributes:
        layers: decoder layers of the model.
        attached: those that are hand-written.
        reasons: why the others are not, and how many there are for each reason.
        calls: forward passes by the way they took, over all hand-written layers, "fast" or a reason.
    """

    layers: int
    attached: int
    reasons: dict[str, int]
    calls: dict[str, int]


class HandWrittenLayer:
    """A Phi-3 decoder layer's forward with both halves around attention written by hand.

    `attach_fast_lora` puts it before a layer's own class, whose parameters and submodules stay. Forward passes of the
    submodules are not called, so a hook on one of them sends the layer back to the plain way.
    """

    lora_state: LayerState
    training: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        kept_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the plain layer's, `[B, S, H]` to `[B, S, H]`.

        With `kept_positions`, flat positions `[K]`, which the last layer of a training step may be given, the result is
        `[1, K, H]`, and what stands behind attention works at those positions alone.
        """
        together = self.lora_state.widened.together
        together.comes(self.lora_state.widened.place)
        reason = _obstacle_now(self, hidden_states, past_key_values, position_embeddings)
        self.lora_state.calls[reason or "fast"] += 1
        if reason:
            if kept_positions is not None:
                kwargs["kept_positions"] = kept_positions
            return super().forward(  # type: ignore[misc]  # of the layer's own class, which stands behind this one
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        together.scale()
        queries, keys, values, residual = self._before_attention(hidden_states, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.self_attn.layer_idx)
        kwargs = {**kwargs, "position_ids": position_ids, "use_cache": use_cache}
        attended = attend(self.self_attn, queries, keys, values, attention_mask, **kwargs)
        attended = attended.reshape(*hidden_states.shape[:2], -1)
        if kept_positions is not None:
            attended, residual = pick(attended, kept_positions), pick(residual, kept_positions)
        return self._after_attention(attended, residual)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing where layers are compiled one by one: between the products there is nothing left to fuse."""

    def _before_attention(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[B, heads, S, D]`, and the residual."""
        state, projection = self.lora_state, self.self_attn.qkv_proj
        adapter, heads = state.adapters["qkv_proj"], state.heads
        assert heads is not None
        return NormQkvRope.apply(
            hidden,
            *adapter_weights(projection, adapter),
            _norm(self.input_layernorm),
            state.widened.operands("qkv_proj", projection, adapter, training=self.training),
            cos.reshape(-1, heads.size).contiguous(),
            sin.reshape(-1, heads.size).contiguous(),
            heads,
        )

    def _after_attention(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Output projection, residual, norm, MLP, residual."""
        widened, adapters, training = self.lora_state.widened, self.lora_state.adapters, self.training
        operands: list[Operands] = []
        weights: list[torch.Tensor | None] = []
        for name, projection in _projections(self)[1:]:
            adapter, join = adapters[name], name != "o_proj"
            operands.append(widened.operands(name, projection, adapter, training=training, join=join))
            weights.extend(adapter_weights(projection, adapter))
        return OutputAndMlp.apply(attended, residual, _norm(self.post_attention_layernorm), *operands, *weights)


def attach_fast_lora(model: nn.Module, *, force: bool = False) -> int:
    """Makes the decoder layers of a PEFT model hand-written where that is possible.

    Args:
        model: frozen base weights with LoRA on some of qkv_proj, o_proj, gate_up_proj, down_proj.
        force: also where there is no CUDA; torch's operations then stand in for the kernels.

    Returns:
        How many layers were replaced, 0 when none could be; `fast_lora_state` says why.

    Example: a PEFT model of 32 layers on a GPU gives 32; the same model in 4 bits gives 0.
    """
    replaced, together = 0, Together()
    for layer in _decoder_layers(model):
        if not isinstance(layer, HandWrittenLayer) and obstacle(layer, force=force) is None:
            plain: Any = type(layer)
            layer.__class__ = _hand_written(plain)
            layer.lora_state = LayerState(WidenedWeights(together=together))
            replaced += 1
    return replaced


def detach_fast_lora(model: nn.Module) -> int:
    """Undoes `attach_fast_lora`: plain layers, each weight in one piece. Returns how many were put back."""
    restored = 0
    for layer in _decoder_layers(model):
        if isinstance(layer, HandWrittenLayer):
            for name, projection in _projections(layer):
                layer.lora_state.widened.release(name, projection)
            del layer.lora_state
            layer.__class__ = type(layer).__mro__[2]
            restored += 1
    return restored


def fast_lora_state(model: nn.Module, *, force: bool = False) -> FastLoraState:
    """Which layers are hand-written, why the others are not, and which way the forward passes went so far."""
    layers = list(_decoder_layers(model))
    reasons: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for layer in layers:
        if isinstance(layer, HandWrittenLayer):
            calls.update(layer.lora_state.calls)
        else:
            reasons[obstacle(layer, force=force) or "it was not asked for"] += 1
    return FastLoraState(len(layers), len(layers) - sum(reasons.values()), dict(reasons), dict(calls))


def obstacle(layer: Any, *, force: bool = False) -> str | None:
    """Why a decoder layer cannot be hand-written, in a few words; None when it can.

    Example: "down_proj uses DoRA or another variant of LoRA".
    """
    plain: Any = type(layer).__mro__[2] if isinstance(layer, HandWrittenLayer) else type(layer)
    if plain is not Phi3DecoderLayer and "kept_positions" not in inspect.signature(plain.forward).parameters:
        return f"the layer is a {plain.__name__}"
    if layer._compiled_call_impl is not None:
        return "the layer is compiled"
    if layer.config.hidden_act not in ("silu", "swish"):
        return f"the MLP uses {layer.config.hidden_act}"
    if layer.resid_attn_dropout.p or layer.resid_mlp_dropout.p:
        return "the residual has dropout"
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if any(type(norm).__name__ != "Phi3RMSNorm" or norm.weight.requires_grad for norm in norms):
        return "a norm is trained or of another kind"
    for name, projection in _projections(layer):
        if reason := _projection_obstacle(projection):
            return f"{name} {reason}"
    bases = [getattr(projection, "base_layer", projection).weight for _, projection in _projections(layer)]
    weights = [*bases, *(norm.weight for norm in norms)]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1 or weights[0].dtype not in _SERVED_DTYPES:
        return "the base weights are not of one floating-point type on one device"
    if not any(active_adapter(projection) for _, projection in _projections(layer)):
        return "no LoRA on it"
    if not force and (weights[0].device.type != "cuda" or find_spec("triton") is None):
        return "no CUDA device" if weights[0].device.type != "cuda" else "Triton is not installed"
    return None


def _projection_obstacle(projection: Any) -> str | None:
    """Why a projection cannot be served: the end of a sentence that begins with its name."""
    base = getattr(projection, "base_layer", projection)
    kind = type(base)
    weight: Any = getattr(base, "weight", None)
    if kind is not nn.Linear or type(weight) not in (nn.Parameter, torch.Tensor) or base.bias is not None:
        return f"is a {kind.__name__}" + (" with a bias" if getattr(base, "bias", None) is not None else "")
    if weight.requires_grad:
        return "is trained itself"
    if base is projection:
        return None
    if (type(projection).__module__, type(projection).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return f"has an adapter of another kind ({type(projection).__name__})"
    names = [name for name in projection.active_adapters if name in projection.lora_A]
    if len(names) > 1:
        return f"has {len(names)} active adapters"
    if any(name in projection.lora_variant for name in names):
        return "uses DoRA or another variant of LoRA"
    if projection.fan_in_fan_out or any(projection.lora_bias.get(name) for name in names):
        return "has a LoRA bias or a transposed weight"
    if any(not isinstance(projection.lora_dropout[name], nn.Identity | nn.Dropout) for name in names):
        return "has a dropout of another kind"
    return None


def _obstacle_now(
    layer: Any, hidden: torch.Tensor, cache: Any, angles: tuple[torch.Tensor, torch.Tensor] | None
) -> str | None:
    """Why this call takes the plain way, None when it is hand-written."""
    if cache is not None and not torch.is_grad_enabled():
        return "generation"
    projections = _projections(layer)
    if any(getattr(one, "disable_adapters", False) or getattr(one, "merged", False) for _, one in projections):
        return "an adapter is disabled or merged"
    if reason := _obstacle_of_parts(layer, projections):
        return reason
    weight, state = base_weight(projections[-1][1]), layer.lora_state
    kind = hidden.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if mixed and torch.get_autocast_dtype(kind) != weight.dtype:
        return "autocast to another type than the base weights'"
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        return "hidden states of another type or place than the weights"
    if hidden.is_cuda and hidden.get_device() != torch.cuda.current_device():
        return "not the current CUDA device"
    if angles is None or angles[0].shape[-1] != state.heads.size:
        return "rope on a part of each head"
    if any(state.hooks):
        return "a hook on a part of the layer"
    return None


def _obstacle_of_parts(layer: Any, projections: list[tuple[str, Any]]) -> str | None:
    """Why the layer's parts cannot be served; looked at again when a projection or its adapter is another one."""
    state: LayerState = layer.lora_state
    looked_at = tuple((id(one), tuple(getattr(one, "active_adapters", ()))) for _, one in projections)
    if looked_at != state.looked_at:
        reasons = [reason for _, one in projections if (reason := _projection_obstacle(one))]
        state.reason = f"a projection {reasons[0]}" if reasons else None
        state.adapters = {} if reasons else {name: active_adapter(one) for name, one in projections}
        if not reasons and not any(state.adapters.values()):
            state.reason = "no active adapter"
        # the modules are held, so that an id is not given to another one
        state.looked_at, state.parts = looked_at, tuple(part for part in layer.modules() if part is not layer)
        state.hooks = tuple(hooks for part in state.parts for hooks in (part._forward_hooks, part._forward_pre_hooks))
        attention = layer.self_attn
        state.heads = Heads(attention.config.num_attention_heads, attention.num_key_value_heads, attention.head_dim)
    frozen = [layer._modules[name]._parameters["weight"] for name in ("input_layernorm", "post_attention_layernorm")]
    frozen += [base_weight(one) for _, one in projections]
    return "a base weight is trained" if any(weight.requires_grad for weight in frozen) else state.reason


@functools.cache
def _hand_written(plain: type) -> type:
    """A layer's class with the hand-written forward before its own; checkpointing wraps it as it does any layer."""
    return type(f"HandWritten{plain.__name__}", (HandWrittenLayer, plain), {})


def _projections(layer: Any) -> list[tuple[str, Any]]:
    """The four projections of a decoder layer by name."""
    attention, mlp = layer._modules["self_attn"]._modules, layer._modules["mlp"]._modules
    return [
        ("qkv_proj", attention["qkv_proj"]),
        ("o_proj", attention["o_proj"]),
        ("gate_up_proj", mlp["gate_up_proj"]),
        ("down_proj", mlp["down_proj"]),
    ]


def _norm(module: Any) -> Norm:
    """A norm's operands."""
    return Norm(module.weight.detach(), module.variance_epsilon)


def _decoder_layers(model: nn.Module) -> Iterator[Any]:
    """Every Phi-3 decoder layer of a model, in order."""
    yield from (module for module in model.modules() if isinstance(module, Phi3DecoderLayer))
