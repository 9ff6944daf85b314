"""How fast a training is and what it holds: samples, tokens and pictures of its steps, seconds, bytes at most.

In come micro-batches as they are taken; out come rates. Knows no Trainer.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from phi3v.machine import most_memory


class Meter:
    """Counts from its first step on, or from the last call of `begin`."""

    def __init__(self) -> None:
        """Begin now."""
        self.begin()

    def begin(self) -> None:
        """Counts anew."""
        self.samples, self.tokens, self.began = 0, 0, time.monotonic()
        self.left_out = 0  # steps that changed nothing
        self.pictures = 0  # of the step that is being done

    def add(self, samples: int, tokens: int, pictures: int = 0) -> None:
        """A step is about to go through the model."""
        self.samples += samples
        self.tokens += tokens
        self.pictures = pictures

    def rates(self) -> dict[str, float]:
        """{"samples_per_second": 9.3, "tokens_per_second": 23800.0, "memory_gib": 30.0} so far.

        Where steps were left out, "left_out" has their number.
        """
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "memory_gib": most_memory() / 2**30,
            **({"left_out": float(self.left_out)} if self.left_out else {}),
        }

    def measured(self, logs: Mapping[str, float], loss: float = 0.0) -> dict[str, float]:
        """What the Trainer logs; at the end its samples a second, rows times epochs, become those that went through.

        Example: after 100 samples {"train_runtime": 25.0, "train_samples_per_second": 0.32} says 4.0 in place of 0.32.

        Args:
            logs: what it logs.
            loss: mean over all steps of the run, for "train_loss": the Trainer divides their sum by those of this call.
        """
        if not (seconds := logs.get("train_runtime")):
            return dict(logs)
        mean = {"train_loss": loss} if "train_loss" in logs else {}
        return {**logs, "train_samples_per_second": round(self.samples / seconds, 3), **mean}


def contents(micro_batches: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Samples, tokens and pictures that micro-batches hold; padding is no token.

    Example: a pack of 3 and 2 tokens, and a padded batch of 4 and 2 tokens with one picture -> (4, 11, 1).
    """
    samples, tokens, pictures = 0, 0, 0
    for batch in micro_batches:
        pictures += len(batch.get("image_sizes", ()))
        if batch.get("cu_seqlens") is not None:
            samples += len(batch["cu_seqlens"]) - 1
            tokens += batch["input_ids"].numel()
        else:
            samples += len(batch["input_ids"])
            positions = batch.get("position_ids")
            whole = batch["input_ids"].numel()
            tokens += whole if positions is None else int((positions.max(dim=1).values + 1).sum())
    return samples, tokens, pictures
