"""Frozen products of hand-written decoder layers in FP8, to be measured: not a part of phi3v.

Inside `in_eight_bits(model)` x W' and dy W of qkv_proj, gate_up_proj and down_proj, which are 92 % of a layer's
arithmetic, run through `torch._scaled_mm`: e4m3, weights with a scale for each output of a product, rows with a scale
each, made anew by one Triton kernel. o_proj, adapters and their gradients, norms, rope, attention and SwiGLU stay in
bfloat16. Needs a GPU of compute capability 8.9.

Letters: T tokens, N outputs, K inputs, R columns of the adapter behind the weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from phi3v.kernels import lora_functions
from phi3v.kernels.lora_layer import HandWrittenLayer
from phi3v.kernels.lora_operands import Operands, to_low_rank

MOST = 448.0
"""The largest number of e4m3."""


@triton.jit
def _quantise(rows, out, scale, stride, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    values = tl.load(rows + row * stride + col, mask=col < K, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(values)), 1e-12) / 448.0
    tl.store(scale + row, factor)
    tl.store(out + row * K + col, (values / factor).to(out.dtype.element_ty), mask=col < K)


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[T, K]` in e4m3, and their scales `[T, 1]`: the largest number of a row is 448 times its scale."""
    tokens, width = rows.shape
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    _quantise[(tokens,)](rows, out, scale, rows.stride(0), width, BLOCK=block, num_warps=8)
    return out, scale


class FrozenProduct:
    """A weight `[N, K]` twice in e4m3, for x W' with a scale an output, and for dy W with a scale an input."""

    def __init__(self, weight: torch.Tensor) -> None:
        forward, self.forward_scale = self._scaled(weight.detach().float())
        backward, self.backward_scale = self._scaled(weight.detach().float().t().contiguous())
        self.forward_weight, self.backward_weight = forward.t(), backward.t()

    @staticmethod
    def _scaled(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / MOST
        return (matrix / scale).to(torch.float8_e4m3fn), scale.t().contiguous()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, K]` to `[T, N]`."""
        return self._product(rows, self.forward_weight, self.forward_scale)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """`[T, N]` to `[T, K]`."""
        return self._product(grad, self.backward_weight, self.backward_scale)

    @staticmethod
    def _product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        small, own = quantise(rows)
        return torch._scaled_mm(
            small, weight, scale_a=own, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )


@contextmanager
def in_eight_bits(model: torch.nn.Module) -> Iterator[None]:
    """The hand-written layers of a model, which have run before, multiply so inside."""
    products: dict[int, tuple[torch.Size, FrozenProduct]] = {}
    for layer in model.modules():
        if isinstance(layer, HandWrittenLayer):
            for filled in layer.lora_state.widened.filled.values():
                joined = filled.operands.joined
                if joined is not None:
                    products[joined.data_ptr()] = (joined.shape, FrozenProduct(filled.operands.weight))
    plain = torch.mm

    def project(rows: torch.Tensor, operands: Operands, residual: torch.Tensor | None = None) -> tuple[Any, Any, Any]:
        assert operands.joined is not None and operands.b is not None
        inputs = operands.weight.shape[1]
        low, kept = to_low_rank(rows[:, :inputs], operands, out=rows[:, inputs:])
        result = products[operands.joined.data_ptr()][1].forward(rows[:, :inputs])
        result.addmm_(low, operands.b.t())
        return result if residual is None else result.add_(residual), low * operands.scale, kept

    def mm(left: torch.Tensor, right: torch.Tensor, *more: Any, **how: Any) -> torch.Tensor:
        """dy [W | s B] of the backward pass is known by its matrix, everything else goes the plain way."""
        shape, product = products.get(right.data_ptr(), (None, None))
        if product is None or right.shape != shape or more or how:
            return plain(left, right, *more, **how)
        both = left.new_empty(left.shape[0], right.shape[1])
        width = product.forward_weight.shape[0]
        both[:, :width] = product.backward(left)
        plain(left, right[:, width:], out=both[:, width:])
        return both

    with patch.object(lora_functions, "project", project), patch.object(torch, "mm", mm):
        yield
