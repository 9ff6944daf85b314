"""The two halves of a decoder layer around attention as autograd functions with backward passes written by hand.

`NormQkvRope` goes from hidden states to rotated queries, keys and values; `OutputAndMlp` from attention's result to the
next hidden states. Both take PEFT's A and B as inputs, so their gradients arrive where autograd puts any. Kept for the
backward pass are per token: hidden states before each norm, attention's result (attention keeps its inputs itself),
gate_up, and R numbers a projection; normed rows and the MLP's inner rows are made again. Under LoRA dropout one byte an
input says what was kept. Frozen weights (norms, projections) get no gradient.

Letters: B rows, S positions, T = B * S tokens, H hidden size, D head size, F width of the MLP, R see `lora_operands`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from phi3v.kernels import passes
from phi3v.kernels.lora_operands import Operands, dropped, factor_gradients, project, to_low_rank

Gradient = torch.Tensor | None


@dataclass(frozen=True)
class Norm:
    """A frozen RMSNorm: its weight `[H]` and epsilon."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Heads:
    """Numbers of query heads and of key (and value) heads, and their size D."""

    queries: int
    keys: int
    size: int


class NormQkvRope(torch.autograd.Function):
    """Hidden states `[B, S, H]` to queries, keys, values `[B, heads, S, D]`, and the hidden states for the residual.

    That the residual goes through here lets both gradients of the hidden states meet in one pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        a: Gradient,
        b: Gradient,
        norm: Norm,
        qkv_proj: Operands,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: Heads,
    ) -> tuple[torch.Tensor, ...]:
        """`a` and `b` are the adapter's weights, which `qkv_proj` holds in the form for multiplying."""
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        normed, scale = _normed(rows, norm, qkv_proj.spare)
        qkv, low, kept = project(normed, qkv_proj)
        passes.rotate(qkv, cos, sin, heads.queries + heads.keys)
        ctx.save_for_backward(rows, scale, low, kept, cos, sin)
        ctx.norm, ctx.qkv_proj = norm, qkv_proj
        every = qkv.view(*hidden.shape[:2], -1, heads.size).transpose(1, 2)
        queries, keys, values = every.split([heads.queries, heads.keys, heads.keys], 1)
        return queries, keys, values, hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Gradient, ...]:
        """Gradients of hidden states, A and B."""
        rows, scale, low, kept, cos, sin = ctx.saved_tensors
        shape, width = grads[3].shape, rows.shape[1]
        queries, keys, values = (grad.transpose(1, 2).flatten(0, 1) for grad in grads[:3])
        grad = passes.rotate_backward(queries, keys, values, cos, sin)
        residual = grads[3].reshape(-1, width).contiguous()
        to_rows, to_a, to_b = _behind_norm(
            grad, rows, scale, low, kept, ctx.norm, ctx.qkv_proj, residual, ctx.needs_input_grad[:2]
        )
        to_hidden = None if to_rows is None else to_rows.view(shape)
        return to_hidden, to_a, to_b, None, None, None, None, None


class OutputAndMlp(torch.autograd.Function):
    """Attention's result `[B, S, heads * D]` and the residual `[B, S, H]` to the layer's result `[B, S, H]`."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
        o_proj: Operands,
        gate_up_proj: Operands,
        down_proj: Operands,
        *adapters: Gradient,
    ) -> torch.Tensor:
        """`adapters` are A and B of the three projections in their order, None where one has no adapter."""
        outer = attended.reshape(-1, attended.shape[-1]).contiguous()
        middle = torch.addmm(residual.reshape(-1, residual.shape[-1]), outer, o_proj.weight.t())
        outer_low = outer_kept = None
        if o_proj.b is not None:
            outer_low, outer_kept = to_low_rank(outer, o_proj, out=outer.new_empty(outer.shape[0], o_proj.spare))
            middle.addmm_(outer_low, o_proj.b.t())
            outer_low = outer_low.mul_(o_proj.scale)
        normed, scale = _normed(middle, norm, gate_up_proj.spare)
        gate_up, normed_low, normed_kept = project(normed, gate_up_proj)
        del normed
        width = down_proj.weight.shape[1]
        inner = _with_spare(gate_up, width, down_proj.spare)
        passes.swiglu(gate_up, inner[:, :width])
        result, inner_low, inner_kept = project(inner, down_proj, residual=middle)
        ctx.save_for_backward(
            outer, outer_low, outer_kept, middle, scale, normed_low, normed_kept, gate_up, inner_low, inner_kept
        )
        ctx.norm, ctx.projections = norm, (o_proj, gate_up_proj, down_proj)
        return result.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Gradient, ...]:
        """Gradients of attention's result, the residual, and the three pairs of A and B."""
        (outer, outer_low, outer_kept, middle, scale, normed_low, normed_kept, gate_up, inner_low, inner_kept) = (
            ctx.saved_tensors
        )
        o_proj, gate_up_proj, down_proj = ctx.projections
        shape = grad.shape
        grad = grad.reshape(-1, shape[-1]).contiguous()
        to_gate_up, down_a, down_b = _behind_swiglu(grad, gate_up, inner_low, inner_kept, down_proj)
        to_middle, gate_up_a, gate_up_b = _behind_norm(
            to_gate_up, middle, scale, normed_low, normed_kept, ctx.norm, gate_up_proj, grad, (True, True)
        )
        del to_gate_up
        assert to_middle is not None
        to_outer, o_a, o_b = _behind_output(
            to_middle, outer, outer_low, outer_kept, o_proj, wanted=ctx.needs_input_grad[0]
        )
        if to_outer is not None:
            to_outer = to_outer.view(*shape[:2], -1)
        factors = (o_a, o_b, gate_up_a, gate_up_b, down_a, down_b)
        return to_outer, to_middle.view(shape), None, None, None, None, *factors


def _with_spare(like: torch.Tensor, width: int, spare: int) -> torch.Tensor:
    """Empty rows `[T, width + spare]` for as many rows as `like` has.

    On a CPU the spare columns begin as zeros: matrix products in bfloat16 (AMX) read behind the columns that they are
    given, up to a multiple of 32, and multiply what they find there with zero, which is no number where that is none.
    """
    rows = like.new_empty(like.shape[0], width + spare)
    if rows.device.type == "cpu":
        rows[:, width:] = 0
    return rows


def _normed(rows: torch.Tensor, norm: Norm, spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed rows with columns to spare behind them, `[T, H + R]`, and 1 / rms."""
    normed = _with_spare(rows, rows.shape[1], spare)
    return normed, passes.rms_norm(rows, norm.weight, norm.eps, normed)


def _behind_norm(
    grad: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor,
    low: Gradient,
    kept: Gradient,
    norm: Norm,
    operands: Operands,
    residual: torch.Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of rows, A and B of `project(norm(rows))` with the residual beside it; `wanted` is of rows and A."""
    width = rows.shape[1]
    if operands.a is None or low is None:
        return passes.rms_norm_backward(torch.mm(grad, operands.weight), rows, norm.weight, scale, residual), None, None
    assert operands.b is not None and operands.joined is not None
    if not wanted[0]:  # the first layer behind a frozen tower and embeddings: A and B alone
        seen = dropped(_normed(rows, norm, 0)[0], kept, operands)
        return None, *factor_gradients(grad, low, torch.mm(grad, operands.b), seen, operands)
    both = torch.mm(grad, operands.joined)
    to_normed, grad_low = both[:, :width], both[:, width:]
    if kept is None:
        to_normed.addmm_(grad_low, operands.a)
        to_rows = passes.rms_norm_backward(to_normed, rows, norm.weight, scale, residual, grad_low)
        # the normed rows are rows * scale * weight: the pass put scale into the R columns, weight goes to the R rows
        to_a, to_b = factor_gradients(grad, low, grad_low, rows, operands)
        return to_rows, to_a.mul_(norm.weight), to_b
    to_normed.add_(dropped(torch.mm(grad_low, operands.a), kept, operands))
    to_rows = passes.rms_norm_backward(to_normed, rows, norm.weight, scale, residual)
    seen = dropped(_normed(rows, norm, 0)[0], kept, operands)
    return to_rows, *factor_gradients(grad, low, grad_low, seen, operands)


def _behind_swiglu(
    grad: torch.Tensor, gate_up: torch.Tensor, low: Gradient, kept: Gradient, operands: Operands
) -> tuple[torch.Tensor, Gradient, Gradient]:
    """Gradients of gate_up, A and B of `project(swiglu(gate_up))`."""
    if operands.a is None or low is None:
        return passes.swiglu_backward(gate_up, torch.mm(grad, operands.weight), None, None)[0], None, None
    assert operands.joined is not None
    width = operands.weight.shape[1]
    both = torch.mm(grad, operands.joined)
    to_inner, grad_low = both[:, :width], both[:, width:]
    if kept is None:
        to_gate_up, inner = passes.swiglu_backward(gate_up, to_inner, grad_low, operands.a)
    else:
        to_inner.add_(dropped(torch.mm(grad_low, operands.a), kept, operands))
        to_gate_up, inner = passes.swiglu_backward(gate_up, to_inner, None, None)
    del both, to_inner
    return to_gate_up, *factor_gradients(grad, low, grad_low, dropped(inner, kept, operands), operands)


def _behind_output(
    grad: torch.Tensor, rows: torch.Tensor, low: Gradient, kept: Gradient, operands: Operands, *, wanted: bool
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of rows, A and B of a projection whose weight and B stand apart; `wanted` is that of rows."""
    to_rows = torch.mm(grad, operands.weight) if wanted else None
    if operands.a is None or operands.b is None or low is None:
        return to_rows, None, None
    grad_low = torch.mm(grad, operands.b)
    to_a, to_b = factor_gradients(grad, low, grad_low, dropped(rows, kept, operands), operands)
    if to_rows is not None and kept is None:
        to_rows.addmm_(grad_low, operands.a)
    elif to_rows is not None:
        to_rows.add_(dropped(torch.mm(grad_low, operands.a), kept, operands))
    return to_rows, to_a, to_b
