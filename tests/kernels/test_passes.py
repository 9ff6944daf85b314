"""The passes between matrix products: worked examples, and their backward passes against autograd in float64."""

import pytest
import torch

from phi3v.kernels import passes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: Triton kernels run there")


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random rows."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def angles(positions: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[positions, size]`, both halves equal."""
    turned = rows(positions, size // 2, seed=9).repeat(1, 2)
    return turned.cos().to(dtype), turned.sin().to(dtype)


def test_norm_of_the_docstring() -> None:
    out = torch.full((1, 3), 7.0)
    scale = passes.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0, out)
    torch.testing.assert_close(scale, torch.tensor([0.2828]), atol=1e-4, rtol=0)
    torch.testing.assert_close(out, torch.tensor([[0.8485, 2.2627, 7.0]]), atol=1e-4, rtol=0)


def test_rope_of_the_docstring() -> None:
    qkv = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    passes.rotate(qkv, cos, sin, heads=2)
    assert qkv.tolist() == [[-2, 1, -4, 3, 5, 6]]
    back = passes.rotate_backward(qkv[:, None, :2], qkv[:, None, 2:4], qkv[:, None, 4:], cos, sin)
    assert back.tolist() == [[1, 2, 3, 4, 5, 6]]


def test_swiglu_of_the_docstring() -> None:
    out = torch.empty(1, 2)
    passes.swiglu(torch.tensor([[0.0, 1, 5, 6]]), out)
    torch.testing.assert_close(out, torch.tensor([[0.0, 4.386]]), atol=1e-3, rtol=0)


def test_norm_backward_is_autograds() -> None:
    hidden, weight = rows(5, 12).requires_grad_(True), rows(12, seed=1)
    grad, residual = rows(5, 16, seed=2), rows(5, 12, seed=3)
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    (expected,) = torch.autograd.grad((normed, hidden), hidden, (grad[:, :12], residual))
    scale = passes.rms_norm(hidden.detach(), weight, 1e-5, torch.empty(5, 12, dtype=torch.float64))
    found = passes.rms_norm_backward(grad[:, :12], hidden.detach(), weight, scale, residual)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rope_is_transformers_and_its_backward_autograds() -> None:
    """Two rows of a batch share the angles of three positions; heads of keys are fewer than of queries."""
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    qkv, (cos, sin) = rows(6, 32).requires_grad_(True), angles(3, 4)
    parts = [part.view(2, 3, -1, 4).transpose(1, 2) for part in qkv.split([16, 8, 8], 1)]
    queries, keys = apply_rotary_pos_emb(parts[0], parts[1], cos[None], sin[None])
    outputs = [part.transpose(1, 2).reshape(6, -1) for part in (queries, keys, parts[2])]
    found = qkv.detach().clone()
    passes.rotate(found, cos, sin, heads=6)
    torch.testing.assert_close(found, torch.cat(outputs, 1), rtol=1e-12, atol=1e-12)
    grads = [rows(6, width, seed=width) for width in (16, 8, 8)]
    (expected,) = torch.autograd.grad(outputs, qkv, grads)
    back = passes.rotate_backward(*(grad.view(6, -1, 4) for grad in grads), cos, sin)
    torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 16, 128])
def test_swiglu_backward_is_autograds(rank: int) -> None:
    gate_up, grad = rows(5, 24).requires_grad_(True), rows(5, 20, seed=1)[:, :12]
    low, factor = (rows(5, rank, seed=2), rows(rank, 12, seed=3)) if rank else (None, None)
    gate, up = gate_up.chunk(2, 1)
    expected_y = torch.nn.functional.silu(gate) * up
    whole = grad if low is None else grad + low @ factor
    (expected,) = torch.autograd.grad(expected_y, gate_up, whole)
    found, y = passes.swiglu_backward(gate_up.detach(), grad, low, factor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)


def test_columns_of_an_adapter_get_the_norms_scale_on_the_way() -> None:
    hidden, weight, grad = rows(5, 12), rows(12, seed=1), rows(5, 16, seed=2)
    scale = passes.rms_norm(hidden, weight, 1e-5, torch.empty(5, 12, dtype=torch.float64))
    plain = passes.rms_norm_backward(grad[:, :12], hidden, weight, scale, hidden)
    expected = grad[:, 12:] * scale[:, None]
    found = passes.rms_norm_backward(grad[:, :12], hidden, weight, scale, hidden, grad[:, 12:])
    assert torch.equal(found, plain) and torch.equal(grad[:, 12:], expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_matrices_of_any_sizes_are_scaled_into_wider_ones(device: str) -> None:
    sources = [rows(*size, dtype=torch.float32).to(device) for size in ((300, 16), (7, 16), (130, 4))]
    wide = [torch.full((len(source), 40), 5.0, dtype=torch.bfloat16, device=device) for source in sources]
    targets, scales = (
        [one[:, 8 : 8 + source.shape[1]] for one, source in zip(wide, sources, strict=True)],
        [2.0, 0.3, 1],
    )
    table = passes.scaling_table(sources, targets, scales)
    assert (table is None) == (device == "cpu")
    passes.scale_all(sources, targets, scales, table)
    for one, source, scale in zip(wide, sources, scales, strict=True):
        expected = torch.full_like(one, 5.0)
        expected[:, 8 : 8 + source.shape[1]] = (source * scale).bfloat16()
        assert torch.equal(one, expected)
    assert passes.scaling_table([sources[0], sources[1].bfloat16()], targets[:2], scales[:2]) is None


@needs_cuda
@pytest.mark.parametrize("apart", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("tokens", [37, 48, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_torchs_operations(dtype: torch.dtype, tokens: int, apart: int) -> None:
    """Widths that are no powers of two; the columns behind a written matrix stay. A launch whose tensors lie elsewhere,
    or whose numbers cannot be divided by what those before could, is not given their kernel."""
    hidden, weight, grad = (
        rows(tokens, 96, dtype=dtype),
        rows(96, dtype=dtype),
        rows(tokens, 112, dtype=dtype, seed=4),
    )
    gate_up, low, factor = rows(tokens, 160, dtype=dtype), rows(tokens, 16, dtype=dtype), rows(16, 80, dtype=dtype)
    cos, sin = angles(tokens, 24, dtype)
    found = {}
    for device in ("cpu", "cuda"):
        h, w, g, gu, a, b, c, s = (
            torch.cat([t.new_zeros(apart), t.flatten()]).to(device)[apart:].view(t.shape)
            for t in (hidden, weight, grad, gate_up, low, factor, cos, sin)
        )
        normed, inner, qkv = torch.zeros_like(g), torch.zeros_like(g), h.clone()
        scale = passes.rms_norm(h, w, 1e-5, normed)
        passes.rotate(qkv, c, s, heads=2)
        passes.swiglu(gu, inner[:, :80])
        heads = [part.reshape(tokens, -1, 24) for part in h.split([48, 24, 24], 1)]
        columns = g.clone()
        found[device] = [
            *(normed, scale, passes.rms_norm_backward(g[:, :96], h, w, scale, h), qkv, inner),
            *(passes.rms_norm_backward(columns[:, :96], h, w, scale, h, columns[:, 96:]), columns),
            *(passes.rotate_backward(*heads, c, s), *passes.swiglu_backward(gu, g[:, :80], a, b)),
        ]
    for expected, other in zip(found["cpu"], found["cuda"], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(other.cpu(), expected, rtol=tolerance, atol=tolerance)
