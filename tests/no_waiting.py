"""A place in which nothing may ask a device for a value: what would make a GPU's host wait raises, or is told.

On the CPU nothing waits, but the calls are the same: `item()`, `bool()`, `tolist()`, copies to the host, and operations
whose result's size depends on values (`nonzero`, `masked_select`, an index that is a mask, `unique`).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    "_local_scalar_dense nonzero masked_select is_nonzero equal unique_dim _unique2 unique_consecutive bincount "
    "repeat_interleave"
).split()
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Waited(AssertionError):
    """Something asked the device."""


class Waits(TorchDispatchMode):
    """Tells of operations that wait."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXED and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in list(args[1])
        )
        if by_mask or (name in WAITS and not (name == "repeat_interleave" and "self_int" in str(func))):
            self.tell(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def told_waits(tell: Callable[[str], None]) -> Iterator[None]:
    """Everything inside that asks the device for a value is told by its name, "Tensor.tolist", before it does."""

    def watched(name: str) -> Any:
        plain = getattr(torch.Tensor, name)

        def asks(*args: Any, **kwargs: Any) -> Any:
            tell(f"Tensor.{name}")
            return plain(*args, **kwargs)

        return asks

    with contextlib.ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, watched(name)))
        stack.enter_context(Waits(tell))
        yield


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Everything inside runs without asking the device.

    Example: `with no_waiting(): tensor[tensor > 0]` raises `Waited`.
    """

    def refuse(what: str) -> None:
        raise Waited(f"{what} waits for the device")

    with told_waits(refuse):
        yield
