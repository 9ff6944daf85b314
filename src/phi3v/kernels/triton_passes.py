"""The passes of `passes` as Triton kernels: imported on CUDA alone, where Triton is.

Contracts, letters and examples stand in `passes`. A kernel reads each input once and writes each output once; sums are
taken within a row, so results do not depend on the number of tokens or the order of programs.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

_block = functools.cache(triton.next_power_of_2)


@triton.jit
def _rms_norm(hidden, weight, out, scale, hidden_stride, out_stride, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < H
    x = tl.load(hidden + row * hidden_stride + col, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x) / H + eps)
    tl.store(scale + row, inverse)
    y = x * inverse * tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    grad, hidden, weight, scale, residual, out, low, grad_stride, low_stride,
    H: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < H
    inverse = tl.load(scale + row)
    normed = tl.load(hidden + row * H + col, mask=inside, other=0.0).to(tl.float32) * inverse
    inner = tl.load(grad + row * grad_stride + col, mask=inside, other=0.0).to(tl.float32)
    inner = inner * tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(inner * normed) / H
    beside = tl.load(residual + row * H + col, mask=inside, other=0.0).to(tl.float32)
    outer = (inner - normed * mean) * inverse + beside
    tl.store(out + row * H + col, outer.to(out.dtype.element_ty), mask=inside)
    if R > 0:
        place = low + row * low_stride + tl.arange(0, R)
        tl.store(place, (tl.load(place).to(tl.float32) * inverse).to(low.dtype.element_ty))


@triton.jit
def _turn(source, target, head, col, cos, sin, sign, angle, inside, HALF: tl.constexpr, D: tl.constexpr):
    """Heads of one row, from `source` turned to `target`; `sign` -1 turns back."""
    place = head * D + col
    c = tl.load(cos + angle + col, mask=col < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + col, mask=col < HALF, other=0.0).to(tl.float32) * sign
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + place, (first * c - second * s).to(target.dtype.element_ty), mask=inside)
    tl.store(target + place + HALF, (second * c + first * s).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    qkv,
    cos,
    sin,
    stride,
    angles,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (col < HALF) & (head < HEADS)
    start = qkv + row * stride
    _turn(start, start, head, col, cos, sin, 1.0, (row % angles) * (2 * HALF), inside, HALF, 2 * HALF)


@triton.jit
def _rotate_backward(
    queries, keys, values, out, cos, sin, query_stride, key_stride, value_stride, out_stride, angles,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    angle = (row % angles) * (2 * HALF)
    target = out + row * out_stride
    head = tl.arange(0, QUERY_BLOCK)[:, None]
    inside = (col < HALF) & (head < QUERY_HEADS)
    _turn(queries + row * query_stride, target, head, col, cos, sin, -1.0, angle, inside, HALF, 2 * HALF)
    head = tl.arange(0, KEY_BLOCK)[:, None]
    inside = (col < HALF) & (head < KEY_HEADS)
    target = target + QUERY_HEADS * 2 * HALF
    _turn(keys + row * key_stride, target, head, col, cos, sin, -1.0, angle, inside, HALF, 2 * HALF)
    target = target + KEY_HEADS * 2 * HALF
    place = head * (2 * HALF) + col
    first = tl.load(values + row * value_stride + place, mask=inside, other=0.0)
    second = tl.load(values + row * value_stride + place + HALF, mask=inside, other=0.0)
    tl.store(target + place, first, mask=inside)
    tl.store(target + place + HALF, second, mask=inside)


@triton.jit
def _swiglu(gate_up, out, out_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    gate = tl.load(gate_up + row * (2 * F) + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + col, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_stride + col, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    gate_up, grad, low, factor, outer, y, tokens, grad_stride, low_stride,
    F: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide_row = row.to(tl.int64)[:, None]
    inside = (row < tokens)[:, None] & (col < F)[None, :]
    dy = tl.load(grad + wide_row * grad_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        rank = tl.arange(0, R)
        left = tl.load(low + wide_row * low_stride + rank[None, :], mask=(row < tokens)[:, None], other=0.0)
        right = tl.load(factor + rank[:, None] * F + col[None, :], mask=(col < F)[None, :], other=0.0)
        dy += tl.dot(left, right, input_precision="ieee")
    place = wide_row * (2 * F) + col[None, :]
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    swish = gate * sigmoid
    tl.store(y + wide_row * F + col[None, :], (swish * up).to(y.dtype.element_ty), mask=inside)
    to_gate = dy * up * (sigmoid + swish * (1.0 - sigmoid))
    tl.store(outer + place, to_gate.to(outer.dtype.element_ty), mask=inside)
    tl.store(outer + place + F, (dy * swish).to(outer.dtype.element_ty), mask=inside)


@triton.jit
def _scale_all(table, like_source, like_target, R: tl.constexpr, ROWS: tl.constexpr):
    entry = table + tl.program_id(0) * 6
    source = tl.load(entry).to(tl.pointer_type(like_source.dtype.element_ty))
    target = tl.load(entry + 1).to(tl.pointer_type(like_target.dtype.element_ty))
    rows, rank, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    scale = tl.load(entry + 5).to(tl.float64, bitcast=True).to(tl.float32)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, R)[None, :]
    inside = (row < rows) & (col < rank)
    value = tl.load(source + row * rank + col, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(target + row * stride + col, value.to(like_target.dtype.element_ty), mask=inside)


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], constants: tuple[int, ...], warps: int) -> None:
    """Launches a kernel; what Triton compiled for such arguments is kept, so that it need not look at each one again.

    That look is a fifth of a launch, and a step of few tokens waits for its 260 launches. The key
    says of the arguments what Triton compiles for: type, and whether a place or a number can be divided by 16 or is 1.

    Args:
        kernel: what `triton.jit` made.
        grid: of programs, one or two numbers.
        given: its tensors, integers and floats, in its order.
        constants: the `tl.constexpr` behind them.
        warps: of a program.
    """
    key: tuple[Any, ...] = (kernel.__name__, given[0].get_device(), constants)
    for it in given:
        if isinstance(it, torch.Tensor):
            key += (it.dtype, it.data_ptr() % 16)
        elif isinstance(it, int):
            key += (it == 1, it % 16 == 0, it >= 2**31)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*given, *constants, num_warps=warps)
    else:
        compiled[(*grid, 1, 1)](*given, *constants)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """See `passes.rms_norm`."""
    tokens, width = hidden.shape
    scale = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    given = (hidden, weight, out, scale, hidden.stride(0), out.stride(0), eps)
    _launch(_rms_norm, (tokens,), given, (width, _block(width)), 8)
    return scale


def rms_norm_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor,
    low: torch.Tensor | None,
) -> torch.Tensor:
    """See `passes.rms_norm_backward`; `low` has a power of two of columns."""
    tokens, width = hidden.shape
    out = torch.empty_like(hidden)
    columns = out[:, :0] if low is None else low
    given = (grad, hidden, weight, scale, residual, out, columns, grad.stride(0), columns.stride(0))
    _launch(_rms_norm_backward, (tokens,), given, (width, _block(width), columns.shape[1]), 8)
    return out


def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> None:
    """See `passes.rotate`."""
    half = cos.shape[1] // 2
    given = (qkv, cos, sin, qkv.stride(0), cos.shape[0])
    _launch(_rotate, (qkv.shape[0],), given, (heads, _block(heads), half, _block(half)), 4)


def rotate_backward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """See `passes.rotate_backward`."""
    tokens, query_heads, head_size = queries.shape
    key_heads, half = keys.shape[1], head_size // 2
    queries, keys, values = _heads_together(queries), _heads_together(keys), _heads_together(values)
    out = queries.new_empty(tokens, (query_heads + 2 * key_heads) * head_size)
    strides = (queries.stride(0), keys.stride(0), values.stride(0), out.stride(0))
    given = (queries, keys, values, out, cos, sin, *strides, cos.shape[0])
    constants = (query_heads, key_heads, _block(query_heads), _block(key_heads), half, _block(half))
    _launch(_rotate_backward, (tokens,), given, constants, 4)
    return out


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """See `passes.swiglu`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(1024, _block(width))
    _launch(_swiglu, (tokens, triton.cdiv(width, block)), (gate_up, out, out.stride(0)), (width, block), 4)


def swiglu_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, low: torch.Tensor | None, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `passes.swiglu_backward`; `low` and `factor` have a power of two of columns and rows, 16 or more."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    outer, y = torch.empty_like(gate_up), gate_up.new_empty(tokens, width)
    rank = 0 if low is None else low.shape[1]
    rows, block = 32, 128
    thin = (grad, grad) if low is None or factor is None else (low, factor)
    given = (gate_up, grad, *thin, outer, y, tokens, grad.stride(0), thin[0].stride(0))
    grid = (triton.cdiv(tokens, rows), triton.cdiv(width, block))
    _launch(_swiglu_backward, grid, given, (width, rank, rows, block), 8)
    return outer, y


def scaling_table(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], scales: Sequence[float]
) -> torch.Tensor:
    """See `passes.scaling_table`: places, rows, columns, distance of target rows, bits of the scale as float64."""
    entries = [
        [source.data_ptr(), target.data_ptr(), *source.shape, target.stride(0)]
        for source, target in zip(sources, targets, strict=True)
    ]
    bits = torch.tensor(scales, dtype=torch.float64).view(torch.int64)[:, None]
    return torch.cat([torch.tensor(entries), bits], dim=1).to(sources[0].device)


def scale_all(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], table: torch.Tensor) -> None:
    """See `passes.scale_all`."""
    rows = 128
    most, widest = (max(source.shape[side] for source in sources) for side in (0, 1))
    grid = (len(sources), triton.cdiv(most, rows))
    _launch(_scale_all, grid, (table, sources[0], targets[0]), (_block(widest), rows), 4)


def _heads_together(grad: torch.Tensor) -> torch.Tensor:
    """`[T, heads, D]` whose heads lie one behind the other within a row; a copy only where they do not."""
    return grad if grad.stride(2) == 1 and grad.stride(1) == grad.shape[2] else grad.contiguous()
