"""What a training gives back: its `RunResult`, made at its end, or read again from a run that is finished."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from phi3v.run_folder import RunFolder

_SUMMARY = ("steps", "metrics", "trainable", "held_out")
"""What the summary of a finished run has at least."""


@dataclass(frozen=True)
class RunResult:
    """What a call of `train` did.

    Attributes:
        status: "trained" from the start, "resumed" from a checkpoint, or "finished" before this call.
        folder: the run.
        steps: optimiser steps of the whole run.
        seconds: time that this call trained.
        metrics: the losses of the last step as metrics.jsonl names them, `{"loss": 0.4, "eval_loss": 0.5}`; no
            eval_loss without validation rows. `kept` has the score of the weights that are kept.
        trainable: parameters per part of the model, `{"projector": {"trainable": 0, "total": 22034432}, ...}`.
        held_out: rows kept for validation.
        resumed_from: step of the checkpoint that a resumed run went on from.
        planned: steps that the recipe asks for, more than `steps` where early stopping ended the run; None of a run
            that an earlier version trained.
        kept: the step whose weights are kept, `{"step": 10}`; where the best ones are, with their score and the last
            validation's, and with the patience where it ended the run:
            `{"step": 2, "metric": "eval_loss", "score": 0.41, "last_score": 0.5, "patience": 4}`.
        left_out: steps of the run that changed nothing, their loss or gradient being no number.
        samples: most images of a row, tokens of the shortest and the longest training row; empty for a stream.
        fast_lora: which decoder layers were hand-written and why others were not, `{"layers": 32, "attached": 0,
            "reasons": {"no CUDA device": 32}, "calls": {}}`; calls are forward passes by the way that they took.
    """

    status: Literal["trained", "resumed", "finished"]
    folder: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    trainable: dict[str, dict[str, int]]
    held_out: int
    resumed_from: int | None = None
    planned: int | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    left_out: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    fast_lora: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_finished(cls, run: RunFolder) -> "RunResult":
        """What is there to say of a run that was finished before. Raises: CheckpointError for a broken summary."""
        summary = run.read_summary(needed=_SUMMARY)
        kept = {entry.name: summary[entry.name] for entry in fields(cls) if entry.name in summary}
        return cls(**{**kept, "status": "finished", "folder": run.path, "seconds": 0.0, "resumed_from": None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def last_losses(run: RunFolder) -> dict[str, float]:
    """The last training and validation loss of the run's metrics."""
    return {
        name: line[name] for line in run.read_metrics() for name in ("loss", "eval_loss") if line.get(name) is not None
    }
