"""Counts what a training step asks of a device, on the meta device: nothing is computed, every operation is seen.

In comes real code that runs on meta tensors inside a `Counter`; out come `Counts`: floating-point operations, bytes
read and written, kernel launches, places where the host waits for the device, and the most bytes alive at once. Knows
no model.

What is alive, and what stands in for kernels of a GPU, is `phi3v.training.live_tensors`. Views count nothing; an
operation reads all its inputs and writes all its results once (expanded dimensions once).
"""

from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from phi3v.training.live_tensors import FLASH_BACKWARD, FLASH_FORWARD, LiveTensors, span

FREE = set(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias split split_with_sizes "
    "as_strided unbind chunk lift_fresh _reshape_alias empty empty_like new_empty empty_strided new_empty_strided "
    "is_same_size narrow diagonal reshape set_ resize_ _local_scalar_dense".split()
)


@dataclass(frozen=True)
class Rates:
    """A device for a prediction: operations and bytes a second that kernels reach, seconds of a launch at least."""

    products: float = 700e12
    products_of_attention: float = 380e12
    bytes: float = 3.7e12
    bytes_of_adapters: float = 2.4e12
    launch: float = 2.5e-6


@dataclass
class Counts:
    """What was counted. `kinds` splits launches and bytes by the kind of operation."""

    operations: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    waits: int = 0
    peak_bytes: int = 0
    predicted_seconds: float = 0.0
    kinds: dict[str, Tally] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in units that are read: 10^12 operations, 10^9 bytes, GiB."""
        return {
            "operations_1e12": round(self.operations / 1e12, 2),
            "bytes_1e9": round(self.bytes / 1e9, 1),
            "launches": self.launches,
            "host_waits": self.waits,
            "peak_gib": round(self.peak_bytes / 2**30, 2),
            "predicted_ms": round(1000 * self.predicted_seconds, 1),
            "kinds": {name: dict(tally) for name, tally in sorted(self.kinds.items())},
        }


class Counter(LiveTensors):
    """Counts inside its context.

    Attributes:
        counts: what was counted so far.
        lengths: tokens of the samples of a pack, which its borders would say.
    """

    def __init__(self, *, rows: int = 0, rates: Rates | None = None) -> None:
        super().__init__(rows=rows)
        self._counts = Counts()
        self.lengths: list[int] = []
        self.rates = rates or Rates()

    @property
    def counts(self) -> Counts:
        """What was counted so far."""
        self._counts.peak_bytes = self.peak
        return self._counts

    def wait(self) -> None:
        """The host waits."""
        self._counts.waits += 1

    def kernel(
        self, kind: str, operations: float, moved: float, rate: float | None = None, bandwidth: float | None = None
    ) -> None:
        """One launch."""
        counts, rates = self._counts, self.rates
        counts.operations += operations
        counts.bytes += moved
        counts.launches += 1
        seconds = max(operations / (rate or rates.products), moved / (bandwidth or rates.bytes), rates.launch)
        counts.predicted_seconds += seconds
        tally = counts.kinds.setdefault(kind, Tally())
        tally["launches"] += 1
        tally["bytes"] += int(moved)
        tally["microseconds"] += round(1e6 * seconds)

    def ran(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, made: Any, results: Any) -> None:
        """Counts an operation."""
        if name not in FREE and any(tensor.device.type == "meta" for tensor in [*given, *results]):
            self._count(func, name, args, kwargs, given, made, results)

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, made: Any, results: Any) -> None:
        moved = float(sum(map(span, given)) + sum(map(span, results)))
        if name == "copy_":
            moved = span(given[0]) + span(given[1])
        if name.startswith("_flash_attention"):
            heads, width = given[1 if "backward" in name else 0].shape[-2:]
            forward = 2 * heads * width * sum(length**2 for length in self.lengths)
            backward = "backward" in name
            rate = FLASH_BACKWARD if backward else FLASH_FORWARD
            self.kernel("attention", forward * (2.5 if backward else 1), moved, rate)
            return
        if name == "addmm_":  # as addmm, which writes to a matrix of its own
            func = torch.ops.aten.addmm.default
            name = "addmm"
        counted = flop_registry.get(func._overloadpacket) or flop_registry.get(func)
        if counted is None:
            self.kernel(name, 0, moved)
            return
        operations = counted(*args, **kwargs, out_val=made)
        if name in ("bmm", "baddbmm"):
            self.kernel("products of attention", operations, moved, self.rates.products_of_attention)
        elif name in ("mm", "addmm") and min(min(tensor.shape[-2:]) for tensor in given if tensor.ndim > 1) <= 64:
            self.kernel("products of adapters", operations, moved, bandwidth=self.rates.bytes_of_adapters)
        else:
            self.kernel("products", operations, moved)
