"""Measures one way of training on a device: seconds and memory of whole optimiser steps, and what disturbed them.

In come a `Way`, examples and a micro-batch; out comes a `Measured`. A step is measured from the first transfer of a
batch to the end of the optimiser's work on the device. Knows no names of ways, no files.
"""

import gc
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from ways import Example, Way, make_optimiser, run_step, synchronise, trained_tokens


@dataclass(frozen=True)
class Measured:
    """Some steps of one way.

    Attributes:
        seconds: of a step, the median.
        samples: of a step.
        micro_batches: into which a step was cut.
        peak_gib: most memory that tensors took; 0.0 on the CPU.
        loss: of the first step: equal for all ways up to rounding, as weights and samples are.
        waits: places in a step where the host waited for the device; None where that cannot be seen.
        compilations: graphs that were compiled after the warm-up.
        steps: that were measured.
    """

    seconds: float
    samples: int
    micro_batches: int
    peak_gib: float
    loss: float
    waits: int | None
    compilations: int
    steps: int

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds


def measure(
    way: Way,
    examples: list[Example],
    micro_batch: int,
    device: str,
    *,
    warm: int = 2,
    warm_seconds: float = 0.0,
    most_seconds: float = 6.0,
    least: int = 3,
) -> Measured:
    """Steps over all examples, at most so many seconds after the warm-up, but at least some.

    Args:
        way: what to measure.
        examples: the samples of every step.
        micro_batch: samples of a micro-batch, padded; a pack holds as many of the longest.
        device: cpu or cuda.
        warm: steps before the clock runs; the host's waits are counted in the last of them.
        warm_seconds: of more steps behind the first: in its first seconds a process is slower, as the compiler starts
            workers beside it, which a training of minutes does not see.
        most_seconds: the clock's limit.
        least: steps, whatever the clock says.
    Raises: torch.OutOfMemoryError.
    """
    batches = [pin(batch) for batch in way.batches(examples, micro_batch)] if device == "cuda" else None
    batches = batches or way.batches(examples, micro_batch)
    items, optimiser = trained_tokens(batches), make_optimiser(way, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss, waits = float(run_step(way, batches, items, optimiser, device)), None
    settled = synchronise(device) + warm_seconds
    while synchronise(device) < settled:
        run_step(way, batches, items, optimiser, device)
    for turn in range(1, warm):
        if device == "cuda" and turn == warm - 1:
            waits = count_waits(lambda: run_step(way, batches, items, optimiser, device))
        else:
            run_step(way, batches, items, optimiser, device)
    compiled, seconds = graphs(), []
    until = synchronise(device) + most_seconds
    while len(seconds) < least or (time.perf_counter() < until and len(seconds) < 20):
        began = synchronise(device)
        run_step(way, batches, items, optimiser, device)
        seconds.append(synchronise(device) - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return Measured(
        statistics.median(seconds), len(examples), len(batches), peak, loss, waits, graphs() - compiled, len(seconds)
    )


def measure_if_it_fits(way: Way, examples: list[Example], micro_batch: int, device: str, **how: Any) -> Measured | None:
    """As `measure`; None, with all memory given back, where the device has too little of it."""
    try:
        return measure(way, examples, micro_batch, device, **how)
    except torch.OutOfMemoryError:
        pass  # what the failed step held is let go of when the error is, behind this line
    for weight in way.trained:
        weight.grad = None
    release()
    return None


def pin(batch: dict) -> dict:
    """The batch in pinned memory, from which transfers go while the device computes, as the Trainer's loader does."""
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def count_waits(step) -> int:
    """How often the host waits for the device in a step, by torch's own watch."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def graphs() -> int:
    """Graphs that torch.compile has made so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def release() -> None:
    """Gives memory and compiled code back, before the next way is built."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
