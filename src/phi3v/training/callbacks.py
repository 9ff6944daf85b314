"""What watches a training: progress for the caller, `metrics.jsonl` for the run, a stop for numbers that are none.

Callbacks of transformers' Trainer that turn its events into ours. They print nothing and change no weight.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainerCallback

from phi3v.errors import TrainingError
from phi3v.first_look import RowUse
from phi3v.run_folder import RunFolder
from phi3v.training.meter import Meter
from phi3v.training.sampling import choose_epoch
from phi3v.tuning import TrainableReport


@dataclass(frozen=True)
class TrainingEvent:
    """One thing that a watcher may want to show.

    Attributes:
        kind: "start" (with `trainable`), "step" (after each optimiser step), "metrics" (losses were logged;
            before the "step"), "look" (images are downloaded, rows are looked at), "rows" (with `rows`), "features"
            (images go through the frozen tower in advance), "kept" and "way" (with `line`), "samples" (with
            `answers`), "end", or "answers" (held-out rows).
        step: steps done.
        total: steps of the whole run; for "look", "features" and "answers" `step` and `total` count rows or addresses.
        seconds_left: an estimate, None until there is one.
        metrics: what was logged, `{"loss": 1.2, "learning_rate": 0.0002, "epoch": 0.5}` for instance.
        trainable: what trains, at the start.
        resumed_from: step of the checkpoint that the run goes on from, at the start.
        stage: whose answers, for "answers": "base answers" or "tuned answers"; which rows, for "look".
        rows: how many rows the run uses, for "rows".
        line: what is kept of the images and what is not, for "kept"; `step` of `total` different images are. Which
            way a step goes (packs, attention, layers), for "way".
        rates: for "step", and for the "metrics" that are told before it, see `Meter.rates`.
        answers: for "samples": row, question, expected and answer of a few held-out rows at this step.
    """

    kind: Literal["start", "look", "rows", "features", "kept", "way", "step", "metrics", "samples", "end", "answers"]
    step: int
    total: int
    seconds_left: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trainable: TrainableReport | None = None
    resumed_from: int | None = None
    stage: str = ""
    rows: RowUse | None = None
    line: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


Watcher = Callable[[TrainingEvent], None]


class ProgressCallback(TrainerCallback):
    """Tells a watcher about each step and estimates the time left from the steps of this session."""

    def __init__(self, watcher: Watcher, trainable: TrainableReport, meter: Meter) -> None:
        self.watcher, self.meter = watcher, meter
        self.trainable = trainable
        self._step: TrainingEvent | None = None  # of a step whose losses are about to be logged: they are told first

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The run starts, or goes on."""
        self.began, self.first = time.monotonic(), state.global_step
        self.meter.begin()
        resumed = state.global_step or None
        self.watcher(
            TrainingEvent("start", self.first, state.max_steps, trainable=self.trainable, resumed_from=resumed)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        seconds = (time.monotonic() - self.began) / done * left
        rates = self.meter.rates()
        event = TrainingEvent("step", state.global_step, state.max_steps, seconds_left=seconds, rates=rates)
        if control.should_log:
            self._step = event
        else:
            self.watcher(event)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Losses are known."""
        rates = {} if self._step is None else self._step.rates  # a line of progress is printed at the first of the two
        self.watcher(
            TrainingEvent("metrics", state.global_step, state.max_steps, metrics=dict(logs or {}), rates=rates)
        )
        if self._step is not None:
            step, self._step = self._step, None
            self.watcher(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All steps are done."""
        self.watcher(TrainingEvent("end", state.global_step, state.max_steps, seconds_left=0.0))


class OrderCallback(TrainerCallback):
    """Gives each epoch its own order of rows, also one that is gone on with in its middle on several ranks."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """The sampler is told before batches are drawn."""
        choose_epoch(train_dataloader, state.global_step)


class LastStepCallback(TrainerCallback):
    """Has the last step logged, by itself: a logged loss is the mean over the steps since the line before."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a line of the last step, and of the one before it."""
        if state.global_step >= state.max_steps - 1:
            control.should_log = True


class MetricsCallback(TrainerCallback):
    """Appends what the Trainer logs to the run's metrics.

    Its own mean over the run, "train_loss", is left out: it is no loss of the step that it is logged at.
    Example: a line of `metrics.jsonl` is `{"step": 20, "loss": 0.71, "grad_norm": 1.3, "learning_rate": 0.0001,
    "epoch": 0.4}`, one of a validation `{"step": 50, "eval_loss": 0.65, ..., "epoch": 1.0}`.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Writes one line."""
        values = {name: value for name, value in (logs or {}).items() if name != "train_loss"}
        self.run.append_metrics({"step": state.global_step, **values})


class NonFiniteCallback(TrainerCallback):
    """Stops a run whose logged loss or gradient norm is no number."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Looks at the loss and the gradient norm.

        Raises:
            TrainingError: one of them is not finite.
        """
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {state.global_step}: start again with a smaller learning_rate "
                    "and another output, or look at the rows of the last steps"
                )
