"""Keys and values of rows that are being answered: rows leave, others come in, and a new token copies nothing.

transformers' dynamic cache, whose layers keep room for tokens to come: its own layers copy all that they hold for each
new token. Every row ends at the right edge, with padding in front of it. Knows no model, prompts or answers.

Letters: R rows, N heads, W columns in use, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values `[R, N, W, D]`, the front part of tensors that have room behind it.

    Example: made of 10 columns with room for 4, `update` writes columns 11 to 14 in place; the 15th makes room anew.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        """Keep the tensors, of which `used` columns hold something."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room = max(1, keys.shape[2] - used)
        self._all = keys, values
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new columns behind those in use, and gives all of them."""
        assert self.keys is not None
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._all[0].shape[2]:
            self._all = tuple(_widened(one, end + self._room) for one in self._all)  # type: ignore[assignment]
        for whole, fresh in zip(self._all, (key_states, value_states), strict=True):
            whole[:, :, start:end] = fresh
        self.keys, self.values = (whole[:, :, :end] for whole in self._all)
        return self.keys, self.values


def joined_rows(
    running: Cache | None,
    kept: Sequence[int],
    kept_lengths: Sequence[int],
    fresh: Cache | None,
    fresh_lengths: Sequence[int],
    room: int,
) -> Cache:
    """Some rows of a running cache, and behind them those of a fresh one, all at the right edge.

    The running cache is used up: its layers are let go one by one, so that two whole caches are never in memory.

    Args:
        running: rows that end at the right edge; None for none.
        kept: its rows that stay.
        kept_lengths: tokens of each of these.
        fresh: rows that begin in column 0; what they hold behind their lengths is left out. None for none.
        fresh_lengths: tokens of each of its rows; 0 leaves a row out.
        room: columns for tokens to come.
    Example: running rows [.ab, cde], kept [1], fresh rows [fgh.., ijklm] of lengths [3, 5] -> [..cde, ..fgh, ijklm].
    """
    incoming = [row for row, length in enumerate(fresh_lengths) if length]
    most = max(kept_lengths, default=0)
    width = max([most, *fresh_lengths])
    layers: list[Any] = []
    for number in range(len((running or fresh or DynamicCache()).layers)):
        old = running.layers[number] if running is not None else None
        new = fresh.layers[number] if fresh is not None else None
        parts = []
        for name in ("keys", "values"):
            source: torch.Tensor = getattr(old or new, name)
            _, heads, _, size = source.shape
            whole = source.new_zeros((len(kept) + len(incoming), heads, width + room, size))
            if kept:
                rows = getattr(old, name)[list(kept)]
                whole[: len(kept), :, width - most : width] = rows[:, :, rows.shape[2] - most :]
            for place, row in enumerate(incoming, start=len(kept)):
                length = fresh_lengths[row]
                whole[place, :, width - length : width] = getattr(new, name)[row, :, :length]
            parts.append(whole)
        layers.append(RoomyLayer(parts[0], parts[1], width))
        for cache in (running, fresh):
            if cache is not None:
                cache.layers[number] = DynamicLayer()
    return Cache(layers=layers)


def padding_mask(lengths: Sequence[int], room: int, device: torch.device) -> torch.Tensor:
    """The attention mask `[R, W + room]` of rows that end at the right edge, tokens to come included.

    Example: lengths [2, 3], room 1 -> [[0, 1, 1, 1], [1, 1, 1, 1]].
    """
    width = max(lengths, default=0)
    padding = torch.tensor([width - length for length in lengths], device=device)
    return (torch.arange(width + room, device=device) >= padding[:, None]).long()


def _widened(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """A tensor with more columns, what it holds in front."""
    rows, heads, used, size = tensor.shape
    wide = tensor.new_zeros((rows, heads, columns, size))
    wide[:, :, :used] = tensor
    return wide
