"""What the hand-written layer multiplies with: a frozen projection and its adapter, side by side in one matrix.

In comes a projection of the model, plain or wrapped by PEFT, out come its operands of one forward pass. Base weights
are kept with columns to spare, `[W | s B]`, and the module's own weight becomes the view of its first columns: same
name, same values, one copy in memory. Then x W' + s (x A') B' is one product, `[x | x A'] [W | s B]'`, and dy [W | s B]
gives the gradients of x and of x A' at once. Knows PEFT's layers by their attributes, and imports nothing of PEFT.

Letters: N outputs, K inputs, r rank of the adapter, R columns to spare: r rounded up, 16 at least.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from phi3v.kernels import passes


@dataclass(frozen=True)
class Operands:
    """One projection in one forward pass.

    Attributes:
        weight: `[N, K]`, frozen.
        joined: `[N, K + R]`, weight and scaled B; None without an adapter, or where they were not asked for.
        a: `[R, K]` in the dtype of the weight, zero below row r; None without an adapter.
        b: `[N, R]`, B times its scale, zero behind column r; None without an adapter.
        rank: r, 0 without an adapter.
        scale: alpha / r, or alpha / sqrt(r) under rsLoRA.
        dropout: share of the adapter's input that is dropped, 0.0 outside training.
        grad_dtype: what the gradients of PEFT's A and B are, float32 where these are rounded from float32 masters.
    """

    weight: torch.Tensor
    joined: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    grad_dtype: torch.dtype | None = None

    @property
    def spare(self) -> int:
        """R: columns behind the input for x A', 0 without an adapter."""
        return 0 if self.a is None else self.a.shape[0]


def spare_columns(rank: int) -> int:
    """Columns for an adapter: a power of two, as Triton's blocks are, and a multiple of 16 that keeps rows aligned.

    Example: 4 -> 16, 16 -> 16, 24 -> 32.
    """
    return max(16, 1 << (rank - 1).bit_length())


def active_adapter(projection: nn.Module) -> str | None:
    """The adapter that a projection adds, None where it is a plain layer or the active adapter leaves it alone."""
    names = [name for name in getattr(projection, "active_adapters", ()) if name in projection.lora_A]  # type: ignore
    return names[0] if names else None


def adapter_weights(projection: Any, adapter: str | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A `[r, K]` and B `[N, r]` of an adapter as PEFT trains them, or None and None.

    By the modules' own dictionaries, as all that runs in each layer of each step: nn.Module finds an attribute that is
    a module or a weight in half a microsecond, a dictionary in a tenth, and few tokens a step wait for the host.
    """
    if adapter is None:
        return None, None
    modules = projection._modules
    a, b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    return a._parameters["weight"], b._parameters["weight"]


def base_weight(projection: Any) -> torch.Tensor:
    """The frozen weight of a projection, plain or wrapped by PEFT."""
    weight: torch.Tensor = projection._modules.get("base_layer", projection)._parameters["weight"]
    return weight


@dataclass
class _Filled:
    """The operands of a projection, and what is written into them anew in each forward pass.

    Attributes:
        operands: of the projection.
        key: places of the weights in memory, scale, dropout, dtype of gradients; with another key they are made anew.
        sources: A and B as PEFT trains them.
        scaled: `[N, r]`, the columns that take scaled B.
        padded: `[r, K]`, the rows that take A; None where A is used as it is.
        version: of B when it was last scaled, by torch's count of writes.
    """

    operands: Operands
    key: tuple[Any, ...]
    sources: tuple[torch.Tensor, torch.Tensor]
    scaled: torch.Tensor
    padded: torch.Tensor | None
    version: int = -1


@dataclass
class Together:
    """B of all hand-written layers of a model, scaled into their matrices in one launch of a forward pass.

    Layers come in their order, so one that is not behind the last one begins a pass. Those that are computed again in a
    backward pass begin none: an optimiser may have written past torch's count of writes before the next forward pass,
    whose first layer would be taken for a part of this one. Writes that torch counts are seen in between too.

    Example: layers 0, 1, 2, then 2 and 1 again in backward, then 0: the second pass begins at the last 0.

    Attributes:
        layers: the layers' matrices, in order.
        passes: forward passes begun so far.
        last: place of the layer that came last in one.
        scaled: the pass that B was last scaled in.
        filled: of all layers; None where one of them was made anew.
        table: what the kernel reads, made with `filled`.
        address: where the first B goes; another one in a copy of the model, whose table is to be another one too.
    """

    layers: list["WidenedWeights"] = field(default_factory=list)
    passes: int = 0
    last: int = 0
    scaled: int = 0
    filled: list[_Filled] | None = None
    table: torch.Tensor | None = None
    address: int = 0

    def take(self, layer: "WidenedWeights") -> int:
        """Takes a layer in, behind the others; its place."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def comes(self, place: int) -> None:
        """The layer at a place is computed, whichever way it goes."""
        if torch._C._current_graph_task_id() != -1:  # as torch's own checkpoints ask whether this is a backward pass
            return
        self.passes += place <= self.last
        self.last = place

    def scale(self) -> None:
        """Scales all B, unless that was done in this pass."""
        if self.scaled == self.passes:
            return
        self.scaled = self.passes
        if self.filled is None or (self.filled and self.filled[0].scaled.data_ptr() != self.address):
            self.filled = [filled for layer in self.layers for filled in layer.filled.values()]
            self.address = self.filled[0].scaled.data_ptr() if self.filled else 0
            self.table = passes.scaling_table(*self._operands(self.filled))
        passes.scale_all(*self._operands(self.filled), self.table)
        for filled in self.filled:
            filled.version = filled.sources[1]._version

    @staticmethod
    def _operands(filled: list[_Filled]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """B, where it goes, and its scale, of each."""
        return [it.sources[1] for it in filled], [it.scaled for it in filled], [it.operands.scale for it in filled]


@dataclass
class WidenedWeights:
    """The widened base weights of one layer, by projection; they follow a module that is moved or loaded anew.

    Attributes:
        together: all layers of the model, this one among them.
        place: its place among them.
    """

    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    filled: dict[str, _Filled] = field(default_factory=dict)
    together: Together = field(default_factory=Together)
    place: int = 0

    def __post_init__(self) -> None:
        """Take a place among the layers."""
        self.place = self.together.take(self)

    def operands(
        self, name: str, projection: Any, adapter: str | None, *, training: bool, join: bool = True
    ) -> Operands:
        """The operands of a projection with the adapter's weights of this moment.

        Args:
            name: which of the layer's projections it is.
            projection: the module, a linear layer or PEFT's around one.
            adapter: name of its active adapter.
            training: whether the adapter's dropout is at work.
            join: whether weight and B are wanted in one matrix.
        """
        weight = base_weight(projection)
        a, b = adapter_weights(projection, adapter)
        if a is None or b is None:
            return Operands(weight.detach())
        drop = projection._modules["lora_dropout"]._modules[adapter]
        share = float(drop.p) if training and isinstance(drop, nn.Dropout) else 0.0
        options = (float(projection.scaling[adapter]), share, a.grad_dtype or a.dtype)
        filled = self.filled.get(name)
        # memory that is held here is not given to another weight, so places tell weights apart
        if filled is None or filled.key != (weight.data_ptr(), a.data_ptr(), b.data_ptr(), *options):
            base = projection._modules.get("base_layer", projection)
            filled = self.filled[name] = self._fill(name, base, (a.detach(), b.detach()), options, join=join)
            self.together.filled = None
        if filled.version != b._version:
            torch.mul(filled.sources[1], options[0], out=filled.scaled)
            filled.version = b._version
        if filled.padded is not None:
            filled.padded.copy_(filled.sources[0])
        return filled.operands

    @torch.no_grad()
    def _fill(
        self,
        name: str,
        base: nn.Linear,
        sources: tuple[torch.Tensor, torch.Tensor],
        options: tuple[float, float, torch.dtype],
        *,
        join: bool,
    ) -> _Filled:
        """Room for A and B, the sources, beside a base weight; options are scale, dropout, and dtype of gradients."""
        (a, b), rank = sources, sources[0].shape[0]
        spare = spare_columns(rank)
        joined = self._widened(name, base, spare) if join else None
        outputs, inputs = base.weight.shape
        scaled = base.weight.new_zeros(outputs, spare) if joined is None else joined[:, inputs:]
        padded = None
        if a.dtype != base.weight.dtype or rank != spare:
            padded = base.weight.new_zeros(spare, inputs)
        operands = Operands(base.weight.detach(), joined, a if padded is None else padded, scaled, rank, *options)
        key = (base.weight.data_ptr(), a.data_ptr(), b.data_ptr(), *options)
        return _Filled(operands, key, sources, scaled[:, :rank], None if padded is None else padded[:rank])

    def _widened(self, name: str, base: nn.Linear, spare: int) -> torch.Tensor:
        """`[N, K + R]` whose first K columns are the module's weight; made anew when that is another one now."""
        weight, matrix = base.weight, self.matrices.get(name)
        outputs, inputs = weight.shape
        if (
            matrix is None
            or matrix.shape != (outputs, inputs + spare)
            or (matrix.dtype, matrix.device, matrix.data_ptr()) != (weight.dtype, weight.device, weight.data_ptr())
            or matrix.stride(0) != weight.stride(0)
        ):
            matrix = weight.new_zeros(outputs, inputs + spare)
            matrix[:, :inputs] = weight
            weight.data = matrix[:, :inputs]
            self.matrices[name] = matrix
        return matrix

    def release(self, name: str, projection: Any) -> None:
        """Gives a module a weight of its own again, in one piece."""
        base = getattr(projection, "base_layer", projection)
        self.filled.pop(name, None)
        self.together.filled = None
        if self.matrices.pop(name, None) is not None:
            base.weight.data = base.weight.data.contiguous()


def project(rows: torch.Tensor, operands: Operands, residual: torch.Tensor | None = None) -> tuple[Any, Any, Any]:
    """The projection of rows that stand in the first K columns of `[T, K + R]`; the columns behind are filled here.

    Args:
        rows: `[T, K + R]`.
        operands: with the joined matrix where there is an adapter.
        residual: `[T, N]`, added.

    Returns:
        The result `[T, N]`; x A' times the scale, `[T, R]`, for the backward pass, or None; and which inputs of the
        adapter were kept under dropout, `[T, K]`, or None.
    """
    low = kept = None
    matrix = operands.weight
    if operands.a is not None:
        assert operands.joined is not None
        inputs = operands.weight.shape[1]
        low, kept = to_low_rank(rows[:, :inputs], operands, out=rows[:, inputs:])
        matrix, low = operands.joined, low * operands.scale
    result = torch.mm(rows, matrix.t()) if residual is None else torch.addmm(residual, rows, matrix.t())
    return result, low, kept


def to_low_rank(rows: torch.Tensor, operands: Operands, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x A' `[T, R]`, written to `out`, of rows `[T, K]`; and which inputs were kept, None without dropout."""
    assert operands.a is not None
    kept = None
    if operands.dropout:
        # in one piece: on CUDA the order of random numbers depends on it, and the masks are to be those of plain PEFT
        rows, kept = torch.native_dropout(rows.contiguous(), operands.dropout, True)
    return torch.mm(rows, operands.a.t(), out=out), kept


def dropped(rows: torch.Tensor, kept: torch.Tensor | None, operands: Operands) -> torch.Tensor:
    """Rows as the adapter saw them, or a gradient as it passes them: what was kept, scaled up; all without dropout.

    Example: `[1, 2, 3]` with `[True, False, True]` and dropout 0.5 is `[2, 0, 6]`.
    """
    if kept is None:
        return rows
    scale = 1.0 / (1.0 - operands.dropout) if operands.dropout < 1.0 else 0.0
    return torch.ops.aten.native_dropout_backward(rows, kept, scale)


def factor_gradients(
    grad: torch.Tensor, low: torch.Tensor, grad_low: torch.Tensor, seen: torch.Tensor, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of A and B, `[r, K]` and `[N, r]`, in the dtype that they are wanted in.

    Args:
        grad: of the projection's result, `[T, N]`.
        low: x A' times the scale, `[T, R]`.
        grad_low: its gradient, the scale in it.
        seen: the adapter's input x, `[T, K]`.
        operands: of the projection.
    """
    to_a, to_b = _product(grad_low.t(), seen, operands.grad_dtype), _product(grad.t(), low, operands.grad_dtype)
    if operands.rank == operands.spare:
        return to_a, to_b
    return to_a[: operands.rank], to_b[:, : operands.rank]


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A product in a dtype of its own: CUDA writes float32 of half precision at once, with no rounding in between."""
    if dtype in (None, left.dtype):
        return torch.mm(left, right)
    if dtype == torch.float32 and left.device.type in ("cuda", "meta") and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
