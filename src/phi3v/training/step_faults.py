"""What may be wrong with a step: its loss or gradient is no number, it does not fit into memory.

In come losses, norms and errors, out comes what is wrong in half a line, or a `TrainingError` that names step, samples
and the checkpoint to go on from. Knows nothing of the Trainer.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from phi3v.data.schema import Row
from phi3v.errors import TrainingError

_MOST_IN_A_ROW = 10
"""Steps one after the other that may be left out: a run that goes on like that trains nothing."""
_SPOILT = 1e6
"""A weight that trains is never that large in a model that answers: float16 ends at 65,504."""
_MOST_NAMED = 16
"""Samples of a step that are named."""
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What is said where there is no error class of its own: by torch's allocator on a CPU, and on a GPU by the driver and
by libraries that take memory beside torch's."""
_log = logging.getLogger(__name__)


class GatheringError(MemoryError):
    """Memory is used up while the samples of a step are put together; its text is what the allocator says."""


@dataclass
class NonFinite:
    """What happens to a step whose loss or gradient norm is no number.

    Attributes:
        action: "stop" ends the run, "skip" leaves the step out as if it had never been.
        name: names the rows of a step, see `name_rows`; None where rows have no names.
        tell: called with what is to be kept of a step that is left out, {"step": 3, "left_out": "loss is nan", "rows":
            "rows 4 and 7 of shop.csv"}; "rows" is "" where they have no names.
        in_a_row: steps left out one after the other.
    """

    action: Literal["stop", "skip"] = "stop"
    name: Callable[[Sequence[int]], str] | None = None
    tell: Callable[[dict[str, Any]], None] = field(default=lambda line: None)
    in_a_row: int = field(default=0, init=False)

    def fault(self, loss: torch.Tensor, norm: Any, scaler: Any = None) -> str | None:
        """What is no number, "loss is nan"; None for a step that may be applied.

        An infinite gradient under float16's scaler is none: the scaler leaves out the step and scales less, until that
        does not help any more.
        """
        norm = torch.as_tensor(norm, device=loss.device)
        values = dict(zip(("loss", "grad_norm"), torch.stack([loss.float(), norm.float()]).tolist(), strict=True))
        if scaler is not None and scaler.get_scale() >= 1:
            del values["grad_norm"]
        fault = next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)
        self.in_a_row = 0 if fault is None else self.in_a_row + 1
        return fault

    def judge(self, fault: str, step: int, rows: Sequence[int], saved: Path | None, weight: float = 0.0) -> None:
        """Says what is done about it; `weight` is the largest one that trains, by its absolute value.

        Raises: TrainingError unless the step may be left out, which is then told and logged.
        """
        names = self.name(rows) if self.name is not None and rows else ""
        named = f" ({names})" if names else ""
        if weight > _SPOILT:
            held = f"{saved}, the newest checkpoint, may hold such" if saved is not None else "nothing is saved"
            raise TrainingError(
                f"{fault} at step {step}{named}: the updates before have spoilt the weights (up to {weight:.0e}), not "
                f"these rows; {held}: take a smaller training.learning_rate in another output"
            )
        if self.action == "skip" and self.in_a_row <= _MOST_IN_A_ROW:
            self.tell({"step": step, "left_out": fault, "rows": names})
            _log.warning("%s at step %d%s: the step is left out", fault, step, named)
            return
        again = f"the last good checkpoint is {saved}" if saved is not None else "no checkpoint was written yet"
        many = f" and in the {_MOST_IN_A_ROW} steps before it" if self.action == "skip" else ""
        way_out = "" if self.action == "skip" else ", or leave such steps out by training.non_finite=skip"
        raise TrainingError(
            f"{fault} at step {step}{named}{many}: its update was not applied, {again}; look at these rows, take a "
            f"smaller training.learning_rate in another output{way_out}"
        )


def refuse_weights(step: int, saved: Path | None) -> None:
    """Raises: TrainingError for weights that an update has made no numbers."""
    again = f"the last good checkpoint is {saved}" if saved is not None else "no checkpoint was written yet"
    raise TrainingError(
        f"after step {step} weights, or what the optimiser keeps of them, are no numbers: they are not saved, {again}; "
        "take a smaller training.learning_rate, or other numbers for training.optim, in another output"
    )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers are finite, with one look at each device; of tensors that are sharded this rank's part.

    Example: [1.0, 3e38] and [2.0] are, [nan, 1.0] is not.
    """
    return math.isfinite(largest(tensors))


def largest(tensors: Iterable[torch.Tensor]) -> float:
    """The largest absolute value of all, 0 without any, NaN where there is one; of sharded ones this rank's part."""
    with torch.no_grad():
        parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        alike: dict[torch.device, list[torch.Tensor]] = {}
        for part in parts:
            if part.is_floating_point() and part.numel():
                alike.setdefault(part.device, []).append(part)
        found = [
            float(torch.stack([norm.float() for norm in torch._foreach_norm(same, ord=math.inf)]).max())
            for same in alike.values()
        ]
        return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def refuse_untrained(left_out: int, steps: int) -> None:
    """Raises: TrainingError where each step of a run was left out: its weights are those that it began with."""
    if left_out and left_out >= steps:
        raise TrainingError(
            f"nothing was trained: each of the {steps} steps was left out, as its loss or gradient was no number "
            "(left_out in metrics.jsonl names their rows); look at these rows, or take a smaller "
            "training.learning_rate in another output"
        )


def name_rows(rows: Sequence[Row], numbers: Sequence[int]) -> str:
    """The rows of a step by their places in their sources: "rows 4 and 7 of shop.csv, row 0 of more.csv"."""
    places: dict[str, list[str]] = {}
    for number in numbers[:_MOST_NAMED]:
        places.setdefault(rows[number].source, []).append(str(rows[number].index))
    parts = []
    for source, found in places.items():
        several, last = ", ".join(found[:-1]), found[-1]
        parts.append(f"rows {several} and {last} of {source}" if several else f"row {last} of {source}")
    return ", ".join(parts) + (f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else "")


def gathering_error(error: BaseException) -> GatheringError:
    """The same, of what was raised here or in a loader worker, behind whose traceback the allocator's words come last.

    Example: "Caught RuntimeError in DataLoader worker process 0.\\n...\\nRuntimeError: not enough memory: you tried to
    allocate 8 bytes." -> "not enough memory: you tried to allocate 8 bytes."
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return GatheringError(lines[-1].removeprefix("RuntimeError: ") if lines[0].startswith("Caught") else lines[0])


def note_halvings(facts: dict[str, Any], halvings: int, step: int, *, tell: bool) -> None:
    """Notes in `facts` how often micro-batches were halved; one line for each time that they are."""
    if tell and halvings > facts.get("halvings", 0):
        _log.warning(
            "out of memory at step %d: done again, with the same samples, in micro-batches of 1/%d of the size, as are "
            "the steps behind it",
            step,
            2**halvings,
        )
    facts["halvings"] = halvings


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, a GPU's or the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
