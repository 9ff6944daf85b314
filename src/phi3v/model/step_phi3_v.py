"""The way through the decoder of a training step, and of prompts that are answered together: work where it is needed,
and nothing that has to ask the device.

In: embeddings, and indices that were made on the CPU with the batch (`data.step_batch`). Out: hidden states of the kept
positions alone. Lengths are known from shapes, so no step waits for a value: no mask is indexed, nothing is counted.

The last layer's keys and values are needed everywhere, everything behind its attention only where a logit is read: its
`o_proj`, both norms behind it, and its MLP see the kept positions alone.

A flat position is `row * S + column`: in two rows of 4 columns, position 6 is column 2 of row 1.

Letters: B rows, S positions, K kept positions, H hidden size, T image tokens of the batch.
"""

from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from .placement_phi3_v import MISMATCH


def pick(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Some positions of all rows as one row: `[B, S, H]` and flat positions `[K]` to `[1, K, H]`.

    Example: `[[[1], [2]], [[3], [4]]]` at `[1, 2]` gives `[[[2], [3]]]`.
    """
    return states.flatten(0, 1).index_select(0, positions)[None]


def place_at(embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Embeddings `[B, S, H]` with the features `[T, H]`, in the order of the text, at the flat positions `[T]`.

    Example: embeddings of one row `[0, 0, 0]`, features `[7, 8]` at `[0, 2]`: `[7, 0, 8]`.

    Raises: ValueError if there are not exactly as many features as positions.
    """
    if positions.shape[0] != features.shape[0]:
        raise ValueError(f"{MISMATCH}: {positions.shape[0]} tokens, {features.shape[0]} features")
    flat = embeddings.flatten(0, 1).index_copy(0, positions, features.to(embeddings.dtype))
    return flat.view_as(embeddings)


class Phi3VLastDecoderLayer(Phi3DecoderLayer):
    """transformers' decoder layer that can leave out what nobody reads."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        kept_positions: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[B, S, H]`, or `[1, K, H]` where `kept_positions`, flat positions `[K]`, are given; a cache gets all S."""
        if kept_positions is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        attended = attend_at(
            self.self_attn,
            self.input_layernorm(hidden_states),
            kept_positions,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = pick(hidden_states, kept_positions) + self.resid_attn_dropout(attended)
        return hidden_states + self.resid_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def attend_at(
    attention: Any,
    hidden_states: torch.Tensor,
    kept_positions: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Phi3Attention's forward, whose output projection sees the kept positions alone: `[B, S, H]` to `[1, K, H]`."""
    assert position_embeddings is not None
    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    widths = [number * attention.head_dim for number in _head_counts(attention)]
    parts = attention.qkv_proj(hidden_states).split(widths, dim=-1)
    query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
    # By its name in transformers' module, where other libraries put kernels of theirs.
    query, key = modeling_phi3.apply_rotary_pos_emb(query, key, *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    attended = attend(attention, query, key, value, attention_mask, **kwargs)
    return attention.o_proj(pick(attended.flatten(2), kept_positions))


def attend(
    attention: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """The attention that a Phi3Attention's config names, with that module's settings.

    Shapes: `[B, heads, S, D]` to `[B, S, heads, D]`; keys and values may have fewer heads.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, modeling_phi3.eager_attention_forward
    )
    return function(
        attention,
        queries,
        keys,
        values,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=getattr(attention.config, "sliding_window", None),
        **kwargs,
    )[0]


def _head_counts(attention: Any) -> tuple[int, int, int]:
    """Heads of queries, keys and values."""
    keys = attention.config.num_key_value_heads
    return attention.config.num_attention_heads, keys, keys


def hidden_at(
    decoder: Any,
    embeddings: torch.Tensor,
    position_ids: torch.Tensor | None,
    kept_positions: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Hidden states `[1, K, H]` after the final norm, of rows that begin in column 0 and are padded on the right.

    Such rows need no mask beside the causal one: padding stands behind everything that is read. The mask is made
    without positions, from which transformers would look for packed rows and wait for the answer. Rows that are packed
    say so by `cu_seqlens`, and bring a mask, or have it made from positions that restart at 0.

    Args:
        decoder: a `Phi3VModel`.
        embeddings: `[B, S, H]`.
        position_ids: `[B, S]`; padding repeats the last position, so that it does not count for a row's length.
        kept_positions: flat positions `[K]`.
        attention_mask: a mask of four dimensions in the form of the attention, handed on as it is; None has it made.
        past_key_values: an empty cache that takes the keys and values of all positions, padding too; None for none.
        **kwargs: for the attention.
    """
    if position_ids is None:
        position_ids = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    borders = kwargs.get("cu_seqlens") is not None and not decoder.config._attn_implementation.startswith("flash")
    make_mask = create_causal_mask if decoder.config.sliding_window is None else create_sliding_window_causal_mask
    if attention_mask is None:
        attention_mask = make_mask(
            config=decoder.config,
            inputs_embeds=embeddings,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids if borders else None,
        )
    rope = decoder.rotary_emb(embeddings, position_ids=position_ids)
    inputs = {"attention_mask": attention_mask, "position_embeddings": rope, "past_key_values": past_key_values}
    hidden_states = embeddings
    for layer in decoder.layers[:-1]:
        hidden_states = layer(hidden_states, **inputs, **kwargs)
    hidden_states = decoder.layers[-1](hidden_states, kept_positions=kept_positions, **inputs, **kwargs)
    return decoder.norm(hidden_states)
