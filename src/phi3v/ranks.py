"""Several processes that train one model: what they have to say to each other, beside the model's own traffic.

In comes a number, a list or a function, out comes the same on every rank, so that all of them decide alike. What goes
between them is numbers and JSON, no pickle. With one process nothing is sent. Knows nothing of models or the Trainer.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from phi3v.errors import ConfigError, OtherRankError
from phi3v.launch import Launch
from phi3v.passthrough import first_line

_BUCKET = 1 << 25
"""Numbers that are sent at once: 128 MiB of float32."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, seen from one of them.

    Attributes:
        rank: its number.
        count: how many there are.
        device: where tensors have to be that are sent; GPUs where the backend knows nothing else.
        joined: whether they met for this training alone.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    joined: bool = False

    @classmethod
    def join(cls, device: torch.device, *, backend: str | None = None, timeout: float | None = None) -> "Ranks":
        """Joins the others, where a launcher started several; waits for all of them.

        Args:
            device: what this process trains on.
            backend: of torch.distributed; None for NCCL between GPUs and gloo between CPUs.
            timeout: seconds that one waits for the others.
        """
        launch = Launch.here()
        if launch.count == 1:
            return cls()
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        if joined := not dist.is_initialized():
            chosen = backend or ("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
            limit = None if timeout is None else timedelta(seconds=timeout)
            try:
                dist.init_process_group(chosen, timeout=limit, **_meeting_place(limit))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"the {launch.count} ranks do not find each other: {first_line(error)}") from error
        has_gloo = "gloo" in str(dist.get_backend_config())
        return cls(dist.get_rank(), dist.get_world_size(), torch.device("cpu") if has_gloo else device, joined)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, one for each value: [3, 1] here and [4, 0] there are [7, 1]."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks, one for each value: [3, 1] here and [4, 0] there are [4, 1]."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it is so on one rank at least."""
        return bool(self.most([flag])[0])

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        """Values of all ranks as one; whole numbers stay exact up to 2**53."""
        if not self.several:
            return list(values)
        sent = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(sent, how)
        return sent.tolist()

    def share(self, value: Any) -> Any:
        """What the first rank has, of values that JSON holds; those of the others are not read."""
        if not self.several:
            return value
        text = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, 0)
        sent = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.first:
            sent.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(sent, 0)
        return json.loads(bytes(sent.tolist()))

    def gathered(self, value: Any) -> list[Any]:
        """What each rank has, of values that JSON holds, in their order: 3 here and 5 on the second are [3, 5]."""
        if not self.several:
            return [value]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=self.device))
        sent = text.new_zeros(max(map(int, sizes)))
        sent[: len(text)] = text
        found = [torch.zeros_like(sent) for _ in range(self.count)]
        dist.all_gather(found, sent)
        return [json.loads(bytes(one[: int(size)].tolist())) for one, size in zip(found, sizes, strict=True)]

    def told(self, find: Callable[[], Any]) -> Any:
        """What `find` gives on the first rank, which alone calls it; its error ends all of them."""
        found: list[Any] = []
        self.alone(lambda: found.append(find()))
        return self.share(found[0] if self.first else None)

    def alone(self, act: Callable[[], Any]) -> None:
        """Has the first rank do something while the others wait; its error ends all of them."""
        with self.together():
            if self.first:
                act()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Behind this context all ranks have gone through it, or none goes on.

        Raises: what was raised here, where that is the lowest rank that failed; OtherRankError on all others.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if not self.several:
                raise
            error = raised
        if not self.several:
            return
        lowest = self.count - int(self.most([0 if error is None else self.count - self.rank])[0])
        if error is not None and lowest == self.rank:
            raise error
        if lowest < self.count:
            raise OtherRankError(f"rank {lowest} failed") from error

    def average(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Makes each gradient the mean over all ranks, on all of them.

        A rank without a gradient, whose samples had no picture for instance, counts as zero; where no rank has one none
        is made. Example: gradients 2.0 here and none there are 1.0 on both.
        """
        has = [weight.grad is not None for weight in weights]
        kept = [weight for weight, held in zip(weights, self.most(has), strict=True) if held]
        for weight in kept:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype or weight.dtype)
        for bucket in _buckets([weight.grad for weight in kept if weight.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.count
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])

    def leave(self) -> None:
        """The end of what ranks do together: those that are through wait for the others once more."""
        if self.several:
            self.any(False)
        self.part()

    def part(self) -> None:
        """The end of what ranks do together, without waiting for those that may have failed."""
        if self.joined:
            dist.destroy_process_group()


ALONE = Ranks()
"""One process that trains by itself."""


def have_met() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one number type each, in order, as many as are sent at once."""
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        bucket = by_type.setdefault(gradient.dtype, [])
        if bucket and sum(one.numel() for one in bucket) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = by_type[gradient.dtype] = []
        bucket.append(gradient)
    yield from by_type.values()


def _meeting_place(limit: timedelta | None) -> dict[str, Any]:
    """Where ranks that torchrun has started again on one machine meet: the store that its agent keeps, under names of
    this start. Nothing for all others, which torch tells by itself.

    Under the old names lie the addresses of the ranks that are gone (torch 2.13 leaves them there), and a rank that
    reads one before its owner writes the new one never finds it. Several machines count their starts apart.

    Example: {"store": PrefixStore("start 1", ...), "rank": 0, "world_size": 2} at the first start after a rank died.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    given: dict[str, Any] = {} if limit is None else {"timeout": limit}
    store, rank, count = next(iter(dist.rendezvous("env://", **given)))
    return {"store": dist.PrefixStore(f"start {start}", store), "rank": rank, "world_size": count}
