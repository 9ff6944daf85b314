"""LongRoPE for each sequence by its own length, and the positions that it goes by.

In: position ids that restart at 0 where a sequence begins. Out: cosines and sines. Knows nothing of images or layers.

Letters: B rows, S positions, D head size.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_phi3_v import Phi3VConfig


def sequence_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the sequence that each position belongs to, from positions that restart at 0: `[B, S]` to `[B, S]`.

    Example: two sequences packed into one row, `[[0, 1, 2, 0, 1]]`, give `[[3, 3, 3, 2, 2]]`; a decoding step
    `[[4096]]` gives `[[4097]]`.
    """
    if position_ids.shape[-1] == 1:
        return position_ids + 1
    number = (position_ids == 0).cumsum(-1)
    last = torch.zeros_like(position_ids[:, :1]).expand(-1, position_ids.shape[-1] + 1)
    last = last.scatter_reduce(1, number, position_ids, reduce="amax")
    return last.gather(1, number) + 1


def positions_from_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of the last `length` columns, padding not counted.

    Example: the mask `[[0, 0, 1, 1, 1]]` with length 5 gives `[[0, 0, 0, 1, 2]]`.
    """
    return ((attention_mask.long().cumsum(-1) - 1).clamp(min=0))[:, -length:]


class Phi3VRotaryEmbedding(nn.Module):
    """LongRoPE, decided for each sequence by its own length.

    A sequence of at most `original_max_position_embeddings` tokens uses the short factors, a longer one the long
    factors for all its positions. Microsoft's code takes one decision for a whole batch; a row here does not depend on
    its neighbours. The attention factor sqrt(1 + ln(s) / ln(original)) multiplies cosine and sine in both cases.
    """

    short_inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.config = config
        self.limit = config.original_max_position_embeddings
        short, long, self.attention_scaling = self.frequencies()
        built_on = torch.get_default_device()
        if built_on.type != "meta":  # under meta they stay real: nothing fills a buffer that no file holds
            short, long = short.to(built_on), long.to(built_on)
        self.register_buffer("short_inv_freq", short, persistent=False)
        self.register_buffer("long_inv_freq", long, persistent=False)

    def frequencies(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Inverse frequencies `[D/2]` for short and long sequences in float32, and the factor on cosine and sine."""
        with torch.device("cpu"):
            if self.config.rope_parameters["rope_type"] == "default":
                dim = self.config.hidden_size // self.config.num_attention_heads
                theta = self.config.rope_parameters["rope_theta"]
                plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
                return plain, plain.clone(), 1.0
            longrope = ROPE_INIT_FUNCTIONS["longrope"]
            short, scaling = longrope(self.config, "cpu")
            long, _ = longrope(self.config, "cpu", seq_len=self.limit + 1)
        return short, long, scaling

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves with the model, but stays in float32: `model.bfloat16()` would round the frequencies."""
        super()._apply(fn, recurse)
        if self.short_inv_freq.dtype != torch.float32:
            short, long, _ = self.frequencies()
            device = self.short_inv_freq.device
            self.short_inv_freq, self.long_inv_freq = short.to(device), long.to(device)
        return self

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine `[B, S, D]` in the dtype of `x`, computed in float32, for positions `[B, S]`."""
        is_long = (sequence_lengths(position_ids) > self.limit)[..., None]
        inv_freq = torch.where(is_long, self.long_inv_freq, self.short_inv_freq)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
