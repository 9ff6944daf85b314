"""Tensors that are alive while code runs on the meta device: nothing is computed, every byte is counted.

In comes real code that runs on meta tensors inside `LiveTensors`; out come the most bytes alive at once, by the kind
that each tensor was held as. Knows no model, recipe or optimiser.

Meta tensors take no kernels of a device, so `DeviceKernels` and `OneKernelEach` stand in for what a device does in one
kernel and torch would split on the meta device: attention (forward keeps its inputs, its result and a row of sums),
dropout, autocast's casts, and functions that are hand-written kernels elsewhere.
"""

import weakref
from collections import Counter
from typing import Any, Self

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

FLASH_FORWARD, FLASH_BACKWARD = 300e12, 250e12
"""Operations a second of attention, for who counts time."""


class LiveTensors(TorchDispatchMode):
    """Follows the memory of meta tensors that are made inside its context, or given to `hold`.

    Attributes:
        device: whose tensors are followed: meta, or cpu to compare a count with what really runs.
        kind: what tensors that are made now are held as.
        rows: what a boolean mask selects, which meta tensors cannot know.
        live: bytes alive now, by kind.
        most: the same at the moment when the most were alive.
    Example: three times `torch.empty(1000, dtype=torch.uint8).add(1)` inside it -> 2,000 bytes at most, 0 alive.
    """

    def __init__(self, *, rows: int = 0, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.kind = "activations"
        self.rows = rows
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._total = self._most_total = 0
        self._held: dict[int, tuple[str, int]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return self._most_total

    def hold(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Counts a tensor's memory for as long as it lives, once; on the device that is followed alone."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return
        name = kind or self.kind_of(tensor)
        self._held[key] = (name, size)
        self.live[name] += size
        self._total += size
        self._note()
        weakref.finalize(storage, self._release, key)

    def move(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a tensor that is alive as of another kind from now on: what was made became a gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self._held:
            old, size = self._held[key]
            self._held[key] = (kind, size)
            self.live[old] -= size
            self.live[kind] += size

    def transient(self, size: int) -> None:
        """Bytes that a kernel takes for itself while it runs."""
        self.live[self.kind] += size
        self._total += size
        self._note()
        self.live[self.kind] -= size
        self._total -= size

    def kind_of(self, tensor: torch.Tensor) -> str:
        """What a tensor that is made now is held as."""
        return self.kind

    def kernel(
        self, kind: str, operations: float, moved: float, rate: float | None = None, bandwidth: float | None = None
    ) -> None:
        """One launch of a kernel that stands in here; for who counts arithmetic and bytes moved."""

    def _note(self) -> None:
        if self._total > self._most_total:
            self._most_total, self.most = self._total, Counter(self.live)

    def _release(self, key: int) -> None:
        kind, size = self._held.pop(key)
        self.live[kind] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation on its shapes, and holds what it makes."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "_local_scalar_dense" and given[0].device.type == "meta":
            self.wait()
            return False if given[0].dtype == torch.bool else 0
        made = self._masked(func, name, args, kwargs)
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        for tensor in results:
            self.hold(tensor)
        self.ran(func, name, args, kwargs, given, made, results)
        return made

    def ran(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, made: Any, results: Any) -> None:
        """An operation ran; for who counts more than what it made."""
        if name == "gemm_4bit":  # bitsandbytes makes the matrix whole before it multiplies many rows by it
            rows, columns = args[2]
            self.transient(rows * columns * args[0].element_size())

    def wait(self) -> None:
        """The host waits for the device; for who counts that."""

    def _masked(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result; where a boolean mask decides its size, as many rows as were foretold."""
        if self.device != "meta":
            return func(*args, **kwargs)
        if name == "index" and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]):
            self.wait()
            mask = next(i for i in args[1] if i is not None)
            return args[0].new_empty((self.rows, *args[0].shape[mask.ndim :]))
        if name in ("index_put", "index_put_", "_index_put_impl_") and len(args[1]) and args[1][0].dtype == torch.bool:
            self.wait()
            return args[0] if name.endswith("_") else torch.empty_like(args[0])
        return func(*args, **kwargs)


def span(tensor: torch.Tensor) -> int:
    """Bytes that a tensor touches: [1, 8] of float32 expanded to [4, 8] is 32."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


class _Attention(torch.autograd.Function):
    """A flash kernel each way: nothing of the square of the length is written."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, causal: bool, seen: LiveTensors) -> torch.Tensor:
        rows, heads, length, width = query.shape
        ctx.operations = 4 * rows * heads * length * key.shape[2] * width * (0.5 if causal else 1)
        ctx.seen = seen
        made = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, made, query.new_empty((rows, heads, length), dtype=torch.float32))
        seen.kernel("attention", ctx.operations, 4 * span(query), FLASH_FORWARD)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.seen.kernel("attention", 2.5 * ctx.operations, 8 * span(query), FLASH_BACKWARD)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class DeviceKernels(TorchFunctionMode):
    """What a device does otherwise than the meta device: attention, dropout and autocast.

    Attributes:
        autocast: its number type, None for none.
        fused_dropout: whether dropout keeps a byte for each value, as on a GPU, or a number.
        keeps_casts: whether autocast keeps its casts of weights, as it does while a forward pass runs.
    """

    def __init__(self, seen: LiveTensors, autocast: torch.dtype | None, *, fused_dropout: bool = True) -> None:
        super().__init__()
        self.seen, self.autocast, self.fused_dropout = seen, autocast, fused_dropout
        self.keeps_casts = False
        self._casts: dict[int, torch.Tensor] = {}
        self._asked = (torch.is_autocast_enabled, torch.get_autocast_dtype)

    def __enter__(self) -> Self:
        """Answers for the meta device, of which torch knows no autocast, as a GPU would be answered for."""
        enabled, dtype = self._asked
        torch.is_autocast_enabled = lambda *kind: self.autocast is not None if kind == ("meta",) else enabled(*kind)
        asked: Any = lambda kind: self.autocast if kind == "meta" else dtype(kind)  # noqa: E731 -- stands in for torch's
        torch.get_autocast_dtype = asked
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.is_autocast_enabled, torch.get_autocast_dtype = self._asked

    def forget_casts(self) -> None:
        """The forward pass is over: autocast drops the casts of weights that nothing else needs."""
        self.keeps_casts = False
        self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch."""
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if not tensors or tensors[0].device.type != "meta":
            return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            masked = kwargs.get("attn_mask") is not None
            heads = [self._cast(value) if self.autocast else value for value in args[:3]]
            return _Attention.apply(*heads, kwargs.get("is_causal", False) or masked, self.seen)
        if func is torch.nn.functional.dropout and self.fused_dropout:
            share, training = (*args[1:], kwargs.get("p", 0.5), kwargs.get("training", True))[:2]
            return torch.native_dropout(args[0], share, training)[0] if training and share else args[0]
        if self.autocast and func in (torch.nn.functional.linear, torch.nn.functional.conv2d, torch.matmul):
            args = [self._cast(value) if isinstance(value, torch.Tensor) else value for value in args]
        elif self.autocast and func is torch.nn.functional.layer_norm:
            tensors_up = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
            normalise: Any = func
            named = {
                name: value.float() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()
            }
            return normalise(*tensors_up, **named)
        return func(*args, **kwargs)

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor in autocast's type; float32 weights that train are cast once a pass."""
        if not value.is_floating_point() or value.dtype == self.autocast:
            return value
        kept = self.keeps_casts and value.is_leaf and value.requires_grad and value.dtype == torch.float32
        if not kept:
            return value.to(self.autocast)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(self.autocast)
        return self._casts[id(value)]


class OneKernelEach:
    """A context in which functions of a module count as one kernel each: it reads its tensors and writes its results.

    On a GPU they are hand-written kernels; elsewhere torch's operations stand in, whose many passes are not to be
    counted. A tensor that is given to be written to counts once; one that is changed in place (`twice`) counts as read
    and written.
    """

    def __init__(self, seen: LiveTensors, module: Any, names: dict[str, bool]) -> None:
        self.seen, self.module = seen, module
        self.plain = {name: getattr(module, name) for name in names} if module else {}
        self.twice = names

    def __enter__(self) -> None:
        for name, function in self.plain.items():
            setattr(self.module, name, self._counted(name, function))

    def __exit__(self, *error: object) -> None:
        for name, function in self.plain.items():
            setattr(self.module, name, function)

    def _counted(self, name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            with _disable_current_modes():
                made = function(*args)
            results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            for tensor in results:
                self.seen.hold(tensor)
            given = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            moved = sum(map(span, given)) + sum(map(span, results))
            self.seen.kernel(name, 0, moved + (span(given[0]) if self.twice[name] else 0))
            return made

        return run


HAND_WRITTEN = {"rms_norm": False, "rms_norm_backward": False, "rotate": True, "rotate_backward": False}
HAND_WRITTEN |= {"swiglu": False, "swiglu_backward": False, "scale_all": False}
"""Hand-written kernels of `kernels.passes`, and whether they change what they are given."""


def run_backward(loss: torch.Tensor) -> None:
    """`loss.backward()`, which itself would leave `DeviceKernels` for as long as it runs, recomputation included."""
    ones = (torch.ones_like(loss),)
    _engine_run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
