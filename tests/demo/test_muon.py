"""Muon in float32: it orthogonalises, and its updates are those of torch's own Muon but for bfloat16's rounding."""

import pytest
import torch

from phi3v.demo.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(96, 32), (32, 80)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    flat = orthogonalise(matrix)
    values = torch.linalg.svdvals(flat)
    assert flat.shape == matrix.shape
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    mixed = left.mT @ flat @ right.mT
    torch.testing.assert_close(mixed - torch.diag(torch.diag(mixed)), torch.zeros_like(mixed), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(96, 32), (32, 80)])
def test_three_steps_are_those_of_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], lr=1e-2, weight_decay=0.01)
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bfloat16 keeps 8 bits
    assert moved > 1e-3


def test_a_matrix_without_a_gradient_stays() -> None:
    still = torch.nn.Parameter(torch.ones(4, 4))
    Muon([still], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4))
