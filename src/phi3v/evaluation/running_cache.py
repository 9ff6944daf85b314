"""Keys and values of rows that are being answered: rows leave, others come in, and those that stay are not copied.

transformers' dynamic cache, whose layers keep room for tokens to come: its own layers copy all that they hold for each
new token. Every row ends at the right edge, with padding in front of it. Knows no model, prompts or answers.

Letters: R rows, N heads, W columns in use, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

LEAST_USE = 0.5
"""Of a running cache's tensors, at least, that rows and the room behind them take; below it they are made anew."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values `[R, N, W, D]`, a window into tensors that have room behind it, and perhaps below.

    Example: made of 10 columns with room for 4, `update` writes columns 11 to 14 in place; the 15th makes room anew.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        """Keep the tensors, of which `used` columns hold something."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room = max(1, keys.shape[2] - used)
        self._all = keys, values
        self._end = used
        self.show(keys.shape[0], used)

    def show(self, rows: int, columns: int) -> None:
        """The first rows, and the last columns of those in use, are what the model sees from now on."""
        self.keys, self.values = (whole[:rows, :, self._end - columns : self._end] for whole in self._all)

    def suits(self, rows: int, columns: int, room: int) -> bool:
        """Whether so many rows fit in here, the longest of so many columns, without wasting much memory."""
        rows_here, _, columns_here, _ = self._all[0].shape
        fit = rows <= rows_here and columns <= self._end < columns_here
        return fit and rows * (columns + room) >= LEAST_USE * rows_here * columns_here

    def write(self, place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes keys and values `[N, length, D]` one of the rows: they end where the others do, behind zeros."""
        for whole, one in zip(self._all, (keys, values), strict=True):
            start = self._end - one.shape[1]
            whole[place, :, :start] = 0  # of whoever was here: even masked, what is no number spoils a sum
            whole[place, :, start : self._end] = one

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new columns behind those in use, and gives all of them."""
        assert self.keys is not None
        rows, _, columns, _ = self.keys.shape
        start, self._end = self._end, self._end + key_states.shape[2]
        if self._end > self._all[0].shape[2]:
            self._all = tuple(_widened(one, self._end + self._room) for one in self._all)  # type: ignore[assignment]
        for whole, fresh in zip(self._all, (key_states, value_states), strict=True):
            whole[:rows, :, start : self._end] = fresh
        self.show(rows, columns + key_states.shape[2])
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


def fewest_moves(kept: Sequence[int]) -> list[int]:
    """Rows that stay, ascending, in the order in which the fewest are copied: the last ones go where others left.

    Example: of five rows [0, 2, 3, 4] stay: in the order [0, 4, 2, 3] only the last is copied, in their own all three.
    """
    movable = [row for row in kept if row >= len(kept)]
    settled = set(kept).difference(movable)
    return [place if place in settled else movable.pop() for place in range(len(kept))]


def joined_rows(
    running: Cache | None,
    kept: Sequence[int],
    kept_lengths: Sequence[int],
    fresh: Cache | None,
    fresh_lengths: Sequence[int],
    room: int,
) -> Cache:
    """Some rows of a running cache, and behind them those of a fresh one, all at the right edge.

    Where they fit into the running cache they are written there: a row that comes in costs its own keys and values, and
    not those of all. Otherwise layers are made anew, and the running ones let go one by one, so that two whole caches
    are never in memory. Either way the running cache is used up.

    Args:
        running: rows that end at the right edge; None for none.
        kept: its rows that stay, in their order.
        kept_lengths: tokens of each of these.
        fresh: rows that begin in column 0; what they hold behind their lengths is left out. None for none.
        fresh_lengths: tokens of each of its rows; 0 leaves a row out.
        room: columns for tokens to come that a cache is made with.
    Example: running rows [.ab, cde], kept [1], fresh rows [fgh.., ijklm] of lengths [3, 5] -> [..cde, ..fgh, ijklm].
    """
    incoming = [(row, length) for row, length in enumerate(fresh_lengths) if length]
    rows, longest = len(kept) + len(incoming), max([*kept_lengths, *fresh_lengths])
    layers: list[Any] = []
    for number in range(len((running or fresh or DynamicCache()).layers)):
        old: Any = running.layers[number] if running is not None else None
        new: Any = fresh.layers[number] if fresh is not None else None
        in_place = isinstance(old, RoomyLayer) and old.suits(rows, longest, room)
        layer = old if in_place else _empty_layer(old or new, rows, longest, room)
        for place, (row, length) in enumerate(zip(kept, kept_lengths, strict=True)):
            if not in_place or place != row:
                layer.write(place, *(one[row, :, one.shape[2] - length :] for one in (old.keys, old.values)))
        for place, (row, length) in enumerate(incoming, start=len(kept)):
            layer.write(place, *(one[row, :, :length] for one in (new.keys, new.values)))
        layer.show(rows, longest)
        layers.append(layer)
        for cache in (running, fresh):
            if cache is not None:
                cache.layers[number] = DynamicLayer()
    return Cache(layers=layers)


def _empty_layer(like: DynamicLayer, rows: int, columns: int, room: int) -> RoomyLayer:
    """A layer of zeros for so many rows that end in a column, with room behind it."""
    assert like.keys is not None and like.values is not None
    keys, values = (
        one.new_zeros((rows, one.shape[1], columns + room, one.shape[3])) for one in (like.keys, like.values)
    )
    return RoomyLayer(keys, values, columns)


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
