"""The passes of a decoder layer between its matrix products: norm, rope and SwiGLU, forward and backward.

In come matrices of one row a token, out come the same; each pass reads its inputs once and computes in float32 (float64
for float64). On CUDA a pass is one Triton kernel, elsewhere torch's operations with the same results. Knows nothing of
modules, adapters or autograd.

Letters: T tokens, H hidden size, D head size, F width of the MLP, R columns behind a matrix for an adapter.
"""

from collections.abc import Sequence

import torch

FUSED_COLUMNS = 64
"""Widest adapter whose product with A is made inside the backward pass of SwiGLU; both stay in shared memory."""


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """Writes `hidden / rms(hidden) * weight` into the first H columns of `out`, and gives 1 / rms, `[T]`.

    Example: the row `[3, 4]` with weight `[1, 2]` and eps 0 has 1 / rms = sqrt(2 / 25) = 0.2828 and becomes
    `[0.8485, 2.2627]`. `out` may be wider than `hidden`: what stands behind column H stays.
    """
    if hidden.is_cuda:
        from phi3v.kernels import triton_passes

        return triton_passes.rms_norm(hidden, weight, eps, out)
    wide = hidden.to(_accumulated(hidden))
    scale = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    out[:, : hidden.shape[1]] = wide * scale[:, None] * weight
    return scale


def rms_norm_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor,
    low: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of `rms_norm`'s input plus that of the residual beside it, `[T, H]`.

    With x = hidden * scale and g = grad * weight it is scale * (g - x * mean(g * x)) + residual.

    Args:
        grad: gradient of the normed rows, the first H columns of a matrix that may be wider.
        hidden: the input of the norm.
        weight: of the norm, frozen.
        scale: what `rms_norm` gave.
        residual: gradient that reaches the input without the norm.
        low: `[T, R]`, an adapter's columns, which are multiplied by `scale` in place.
    """
    if hidden.is_cuda:
        from phi3v.kernels import triton_passes

        return triton_passes.rms_norm_backward(grad, hidden, weight, scale, residual, low)
    if low is not None:
        low.mul_(scale[:, None])
    wide = _accumulated(hidden)
    normed = hidden.to(wide) * scale[:, None]
    inner = grad.to(wide) * weight
    outer = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale[:, None]
    return (outer + residual).to(hidden.dtype)


def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> None:
    """Rope, in place, on the first `heads` heads of each row: queries and keys; values behind them stay.

    Args:
        qkv: `[T, (heads + value heads) * D]`.
        cos: `[C, D]`, both halves of a row equal; token t takes row t % C, so that rows of one batch may share it.
        sin: the same.
        heads: query and key heads.

    Example: D = 2, one query head, one key head, one value head, cos = [[0, 0]], sin = [[1, 1]] (a quarter turn): the
    row `[1, 2, 3, 4, 5, 6]` becomes `[-2, 1, -4, 3, 5, 6]`.
    """
    if qkv.is_cuda:
        from phi3v.kernels import triton_passes

        triton_passes.rotate(qkv, cos, sin, heads)
        return
    head_size = cos.shape[1]
    turned = qkv[:, : heads * head_size].view(-1, cos.shape[0], heads, head_size)
    turned.copy_(_turn(turned, cos, sin))


def rotate_backward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradients of rotated queries and keys, and of values, `[T, heads, D]` each, as one matrix `[T, all heads * D]`.

    Example: with a quarter turn the gradients `[[-2, 1]]`, `[[-4, 3]]` and `[[5, 6]]` give `[1, 2, 3, 4, 5, 6]`.
    """
    if queries.is_cuda:
        from phi3v.kernels import triton_passes

        return triton_passes.rotate_backward(queries, keys, values, cos, sin)
    tokens = queries.shape[0]
    back = [
        _turn(grad.reshape(-1, cos.shape[0], *grad.shape[1:]), cos, -sin).to(grad.dtype) for grad in (queries, keys)
    ]
    return torch.cat([grad.reshape(tokens, -1) for grad in (*back, values)], dim=1)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes silu(gate) * up into `out`, `[T, F]`, from `gate_up`, `[T, 2 F]` with the gates first.

    Example: the row `[0, 1, 5, 6]` has the gates 0 and 1: silu(0) * 5 = 0, silu(1) * 6 = 4.386.
    """
    if gate_up.is_cuda:
        from phi3v.kernels import triton_passes

        triton_passes.swiglu(gate_up, out)
        return
    gate, up = gate_up.to(_accumulated(gate_up)).chunk(2, dim=1)
    out.copy_(gate * torch.sigmoid(gate) * up)


def swiglu_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, low: torch.Tensor | None, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `gate_up`, and once more what `swiglu` wrote, which was not kept.

    Args:
        gate_up: `[T, 2 F]`.
        grad: gradient of silu(gate) * up, `[T, F]`, without the adapter's part.
        low: `[T, R]`, the adapter's part as a product of low and factor; None without one.
        factor: A of the adapter, `[R, F]`.

    Returns:
        `[T, 2 F]` and `[T, F]`.
    """
    if low is not None and factor is not None and low.shape[1] > FUSED_COLUMNS:
        grad = torch.addmm(grad, low, factor)
        low = factor = None
    if gate_up.is_cuda:
        from phi3v.kernels import triton_passes

        return triton_passes.swiglu_backward(gate_up, grad, low, factor)
    wide = _accumulated(gate_up)
    grad = grad.to(wide)
    if low is not None and factor is not None:
        grad = grad + low.to(wide) @ factor.to(wide)
    gate, up = gate_up.to(wide).chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    swish = gate * sigmoid
    outer = torch.cat([grad * up * (sigmoid + swish * (1 - sigmoid)), grad * swish], dim=1)
    return outer.to(gate_up.dtype), (swish * up).to(gate_up.dtype)


def scaling_table(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], scales: Sequence[float]
) -> torch.Tensor | None:
    """What `scale_all` reads of where its operands lie: made once for as long as they lie there. None without CUDA, or
    where they are not all of one dtype each."""
    kinds = {
        (source.dtype, target.dtype, source.is_contiguous()) for source, target in zip(sources, targets, strict=True)
    }
    if not sources or not sources[0].is_cuda or len(kinds) > 1 or not sources[0].is_contiguous():
        return None
    from phi3v.kernels import triton_passes

    return triton_passes.scaling_table(sources, targets, scales)


def scale_all(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[float],
    table: torch.Tensor | None,
) -> None:
    """Writes each source, `[N, r]`, times its scale into its target, whose rows may lie apart.

    Args:
        sources: matrices of any sizes.
        targets: of the same sizes.
        scales: a number for each.
        table: of these operands, by `scaling_table`; without one they go one by one.

    Example: sources [[1, 2]] and [[3]] with the scales 2 and 10 write [[2, 4]] and [[30]].
    """
    if table is not None:
        from phi3v.kernels import triton_passes

        triton_passes.scale_all(sources, targets, table)
        return
    for source, target, scale in zip(sources, targets, scales, strict=True):
        torch.mul(source, scale, out=target)


def _accumulated(values: torch.Tensor) -> torch.dtype:
    """The dtype that a pass computes in: float32, or float64 for float64."""
    return torch.promote_types(values.dtype, torch.float32)


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads `[B, C, heads, D]` turned by the angles of `[C, D]`."""
    half = heads.shape[-1] // 2
    wide = heads.to(_accumulated(heads))
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
