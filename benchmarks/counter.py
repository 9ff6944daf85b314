"""Counts what a training step asks of a device, on the meta device: nothing is computed, every operation is seen.

In comes real code that runs on meta tensors inside a `Counter`; out come `Counts`: floating-point operations, bytes
read and written, kernel launches, places where the host waits for the device, and the most bytes alive at once. Knows
no model.

Meta tensors take no GPU kernels, so `GpuKernels` stands in for what a GPU does in one kernel and torch would split on
the meta device: attention (forward saves its inputs, its result and a row of sums), and for autocast's casts. Views
count nothing; an operation reads all its inputs and writes all its results once (expanded dimensions once).
"""

import weakref
from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = set(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias split split_with_sizes "
    "as_strided unbind chunk lift_fresh _reshape_alias empty empty_like new_empty empty_strided new_empty_strided "
    "is_same_size narrow diagonal reshape set_ resize_ _local_scalar_dense".split()
)
FLASH_FORWARD, FLASH_BACKWARD = 300e12, 250e12


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


def span(tensor: torch.Tensor) -> int:
    """Bytes that a tensor touches: [1, 8] of float32 expanded to [4, 8] is 32."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


class Counter(TorchDispatchMode):
    """Counts inside its context.

    Attributes:
        counts: what was counted so far.
        rows: what a boolean mask selects, which meta tensors cannot know.
        lengths: tokens of the samples of a pack, which its borders would say.
    """

    def __init__(self, *, rows: int = 0, rates: Rates | None = None) -> None:
        super().__init__()
        self.counts = Counts()
        self.rows = rows
        self.lengths: list[int] = []
        self.rates = rates or Rates()
        self.live = 0
        self._seen: set[int] = set()

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's memory for as long as it lives; on the meta device alone."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def kernel(
        self, kind: str, operations: float, moved: float, rate: float | None = None, bandwidth: float | None = None
    ) -> None:
        """One launch."""
        counts, rates = self.counts, self.rates
        counts.operations += operations
        counts.bytes += moved
        counts.launches += 1
        seconds = max(operations / (rate or rates.products), moved / (bandwidth or rates.bytes), rates.launch)
        counts.predicted_seconds += seconds
        tally = counts.kinds.setdefault(kind, Tally())
        tally["launches"] += 1
        tally["bytes"] += int(moved)
        tally["microseconds"] += round(1e6 * seconds)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation on its shapes, and counts it."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "_local_scalar_dense" and given[0].device.type == "meta":
            self.counts.waits += 1
            return False if given[0].dtype == torch.bool else 0
        made = self._masked(func, name, args, kwargs)
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        for tensor in results:
            self.hold(tensor)
        if name not in FREE and any(tensor.device.type == "meta" for tensor in [*given, *results]):
            self._count(func, name, args, kwargs, given, made, results)
        return made

    def _masked(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result; where a boolean mask decides its size, as many rows as were foretold."""
        if name == "index" and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]):
            self.counts.waits += 1
            mask = next(i for i in args[1] if i is not None)
            return args[0].new_empty((self.rows, *args[0].shape[mask.ndim :]))
        if name in ("index_put", "index_put_", "_index_put_impl_") and len(args[1]) and args[1][0].dtype == torch.bool:
            self.counts.waits += 1
            return args[0] if name.endswith("_") else torch.empty_like(args[0])
        return func(*args, **kwargs)

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, made: Any, results: Any) -> None:
        moved = float(sum(map(span, given)) + sum(map(span, results)))
        if name == "copy_":
            moved = span(given[0]) + span(given[1])
        if name.startswith("_varlen_attn"):
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


class _Attention(torch.autograd.Function):
    """A flash kernel each way: nothing of the square of the length is written."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, causal: bool, counter: Counter) -> torch.Tensor:
        rows, heads, length, width = query.shape
        ctx.operations = 4 * rows * heads * length * key.shape[2] * width * (0.5 if causal else 1)
        ctx.counter = counter
        made = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, made, query.new_empty((rows, heads, length), dtype=torch.float32))
        counter.kernel("attention", ctx.operations, 4 * span(query), FLASH_FORWARD)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.counter.kernel("attention", 2.5 * ctx.operations, 8 * span(query), FLASH_BACKWARD)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class GpuKernels(TorchFunctionMode):
    """What a GPU does otherwise than the meta device: attention and autocast; `autocast` is its number type."""

    def __init__(self, counter: Counter, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.counter, self.autocast = counter, autocast
        self._asked = (torch.is_autocast_enabled, torch.get_autocast_dtype)

    def __enter__(self) -> Any:
        """Answers for the meta device, of which torch knows no autocast, as a GPU would be answered for."""
        enabled, dtype = self._asked
        torch.is_autocast_enabled = lambda *kind: self.autocast is not None if kind == ("meta",) else enabled(*kind)
        torch.get_autocast_dtype = lambda kind: self.autocast if kind == "meta" else dtype(kind)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.is_autocast_enabled, torch.get_autocast_dtype = self._asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch."""
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if not tensors or tensors[0].device.type != "meta":
            return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            masked = kwargs.get("attn_mask") is not None
            return _Attention.apply(*args[:3], kwargs.get("is_causal", False) or masked, self.counter)
        if self.autocast and func in (torch.nn.functional.linear, torch.nn.functional.conv2d, torch.matmul):
            args = [
                value.to(self.autocast) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for value in args
            ]
        elif self.autocast and func is torch.nn.functional.layer_norm:
            tensors_up = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
            return func(*tensors_up, **{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
        return func(*args, **kwargs)


class OneKernelEach:
    """A context in which functions of a module count as one kernel each: it reads its tensors and writes its results.

    On a GPU they are hand-written kernels; elsewhere torch's operations stand in, whose many passes are not to be
    counted. A tensor that is given to be written to counts once; one that is changed in place (`twice`) counts as read
    and written.
    """

    def __init__(self, counter: Counter, module: Any, names: dict[str, bool]) -> None:
        self.counter, self.module = counter, module
        self.plain = {name: getattr(module, name) for name in names} if module else {}
        self.twice = names

    def __enter__(self) -> None:
        for name, function in self.plain.items():
            setattr(self.module, name, self._counted(name, function))

    def __exit__(self, *error: Any) -> None:
        for name, function in self.plain.items():
            setattr(self.module, name, function)

    def _counted(self, name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            with _disable_current_modes():
                made = function(*args)
            results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            for tensor in results:
                self.counter.hold(tensor)
            given = [value for value in args if isinstance(value, torch.Tensor)]
            moved = sum(map(span, given)) + sum(map(span, results))
            self.counter.kernel(name, 0, moved + (span(given[0]) if self.twice[name] else 0))
            return made

        return run
