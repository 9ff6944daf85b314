"""The rate at which a device multiplies: what a step's least arithmetic (`phi3v.training.floor`) is divided by."""

import time

import torch


def matrix_rate(device: str, dtype: torch.dtype, *, side: int | None = None, rounds: int = 20) -> float:
    """Operations a second of a large product of random matrices on a device, the median of some rounds."""
    side = side or (8192 if device == "cuda" else 1024)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / sorted(seconds)[len(seconds) // 2]
