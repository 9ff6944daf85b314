"""One trial: a training with a trial's values, ended early where it is worse than others, and its score with an
interval; and the score of what trials begin with.

In come a recipe and who is asked at each validation; out comes an `Outcome`. The run is what `phi3v train` makes, so a
trial that was killed goes on from its checkpoint. Knows nothing of Optuna.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from phi3v.data.reading import Reading
from phi3v.data.sources import stream_data
from phi3v.errors import ConfigError, DataError, TrainingError
from phi3v.evaluation.answers import answer_rows
from phi3v.evaluation.checks import CHEAP
from phi3v.evaluation.intervals import estimate
from phi3v.evaluation.result import scoring_of
from phi3v.evaluation.row_scores import score_rows
from phi3v.evaluation.run import answer_options, held_out_rows
from phi3v.features.store import FeatureStore
from phi3v.first_look import open_data, row_options
from phi3v.loading import load_target
from phi3v.recipe import Recipe
from phi3v.recipe_sweep import SweepSection
from phi3v.run_folder import RunFolder
from phi3v.sweep.space import with_values
from phi3v.targets import resolve_target
from phi3v.training.callbacks import TrainingEvent, Watcher
from phi3v.training.conditions import name_data
from phi3v.training.train import release_memory, train

State = Literal["complete", "pruned", "failed"]
Judge = Callable[[int, float], bool]
"""Told of a validation, counted from 1, and its score; says whether the trial ends here."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: complete with a value; pruned at a validation; failed with an error's line.
        value: the sweep's metric on held-out rows; None unless complete.
        ends: lower and upper end of its 95 % interval; None where there is none.
        loss: held-out loss of the weights that count, of a complete trial; decides among those of equal value.
        steps: optimiser steps of the run.
        seconds: time of this call.
        error: why it failed, None where it did not.
        last: number of the last validation, from 1, and what it says, of a complete trial.
    """

    state: State
    value: float | None
    steps: int
    seconds: float
    error: str | None = None
    last: tuple[int, float] | None = None
    ends: tuple[float, float] | None = None
    loss: float | None = None


class _Pruned(Exception):
    """A trial is to end at a validation."""


def trial_recipe(recipe: Recipe, values: dict[str, Any], output: str) -> Recipe:
    """The recipe of a trial.

    It answers held-out rows only where that is the sweep's metric, by the tuned model alone, and where the recipe names
    no checks not once more with grey images, which would be 100 answers for each trial. Features of frozen vision parts
    are kept in memory, so that the trials of a process share them, unless the recipe says how.
    """
    sweep = recipe.sweep or SweepSection()
    trial = with_values(recipe, {**values, "output": output, "evaluation.against": None})
    changes: dict[str, Any] = {}
    if sweep.metric != "eval_loss" and sweep.metric not in (trial.evaluation.metrics or []):
        changes["evaluation.metrics"] = [sweep.metric, *(trial.evaluation.metrics or [])]
    if sweep.metric != "eval_loss" and trial.evaluation.checks is None:
        changes["evaluation.checks"] = [*CHEAP, *(["forgetting"] if trial.evaluation.keep is not None else [])]
    alike = trial.vision.frozen and not trial.data.streaming and not trial.image.augments
    if trial.vision.cache is None and alike:
        changes["vision.cache"] = "memory"
    return with_values(trial, changes) if changes else trial


def rows_of(recipe: Recipe, watch: Watcher, searched: Iterable[str] = ()) -> dict[str, str | None]:
    """Names for the rows of a sweep's recipe and their photos, by reading them once.

    {} where they cannot be read and a key of those `searched` gives trials others, data.train for instance.

    Raises: DataError where they cannot be read, and so by no trial.
    """

    def tell(stage: str, done: int, total: int) -> None:
        watch(TrainingEvent("look", done, total, stage=stage))

    try:
        if not recipe.data.streaming:
            return name_data(open_data(recipe, on_progress=tell))
        reading = Reading.of(**recipe.data.reading_options)
        return name_data(stream_data(options=row_options(recipe), reading=reading, **recipe.data.load_options))
    except DataError:
        if any(key.split(".")[0] == "data" or key in ("image", "image.max_pixels") for key in searched):
            return {}
        raise


def run_trial(recipe: Recipe, sweep: SweepSection, judge: Judge, watch: Watcher, store: FeatureStore | None) -> Outcome:
    """Trains a trial, or goes on with it.

    Args:
        recipe: of the trial.
        sweep: what is made best.
        judge: asked at each validation.
        watch: told of the training.
        store: features that all trials share.
    Raises: Interrupted, and errors that would end any trial: a device or a package that is missing, a full disk.
    """
    run, began = RunFolder(recipe.output), time.monotonic()

    def look(event: TrainingEvent) -> None:
        watch(event)
        if event.kind == "metrics" and "eval_loss" in event.metrics:
            count = sum("eval_loss" in line for line in run.read_metrics())
            if event.step < event.total and judge(count, _score(event.metrics, sweep.metric)):
                raise _Pruned

    def outcome(state: State, score: dict[str, Any] | None = None, error: str | None = None) -> Outcome:
        steps = max((line.get("step", 0) for line in run.read_metrics()), default=0)
        value, ends = (None, None) if score is None else (score["value"], _ends(score))
        return Outcome(state, value, steps, time.monotonic() - began, error, ends=ends)

    try:
        train(recipe, on_event=look, features=store, report=sweep.metric != "eval_loss")
        found = outcome("complete", _found(run, sweep.metric))
        return replace(found, last=_last(run, sweep.metric), loss=_loss(run, sweep.metric, found.value))
    except _Pruned:
        return outcome("pruned")
    except (ConfigError, DataError, TrainingError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        return outcome("failed", error=str(error))
    finally:
        release_memory()


def _score(metrics: dict[str, float], metric: str) -> float:
    """What a validation says of a trial, in the metric's direction.

    That is the metric itself where held-out rows are answered at each validation (`evaluation.during_training`), else
    the held-out loss, below zero for a metric that is to grow.
    Example: {"eval_loss": 0.5} is 0.5 for eval_loss, -0.5 for exact_match; with "eval_exact_match": 0.25 it is 0.25.
    """
    if metric == "eval_loss":
        return metrics["eval_loss"]
    return metrics.get(f"eval_{metric}", -metrics["eval_loss"])


def _last(run: RunFolder, metric: str) -> tuple[int, float] | None:
    """Number and score of a finished run's last validation, of which no pruner was told; None where there is none."""
    lines = [line for line in run.read_metrics() if line.get("eval_loss") is not None]
    return (len(lines), _score(lines[-1], metric)) if lines else None


def _found(run: RunFolder, metric: str) -> dict[str, Any]:
    """The score of a finished run: of the weights that it kept, where their step was validated, else the last one.

    Example: {"value": 0.31, "low": 0.28, "high": 0.35}, with more of an evaluation's.
    Raises: TrainingError when the run has none.
    """
    if metric != "eval_loss":
        found = run.read_evaluation()["metrics"].get(metric) if run.evaluation.is_file() else None
        if found is None or found["tuned"]["value"] is None:
            raise TrainingError(f"the run has no {metric}: it holds out no rows, or their answers have no such score")
        return dict(found["tuned"])
    lines = [line for line in run.read_metrics() if line.get("eval_loss") is not None]
    if not lines:
        raise TrainingError(
            "the run has no held-out loss: hold out rows (data.split, data.validation), and leave "
            "training.eval_strategy as it is"
        )
    step = run.read_summary().get("kept", {}).get("step")  # the best by another score may have a higher loss
    line = next((line for line in reversed(lines) if line["step"] == step), lines[-1])
    return {"value": line["eval_loss"], "low": line.get("eval_loss_low"), "high": line.get("eval_loss_high")}


def _loss(run: RunFolder, metric: str, value: float | None) -> float | None:
    """The held-out loss beside a trial's score, on the same rows; None where an evaluation has none."""
    if metric == "eval_loss":
        return value
    found = run.read_evaluation()["metrics"].get("loss")
    return None if found is None else found["tuned"]["value"]


def _ends(score: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of a score, where it has one."""
    return None if score["low"] is None or score["high"] is None else (score["low"], score["high"])


def score_untuned(recipe: Recipe, file: Path, metric: str, watch: Watcher) -> dict[str, Any]:
    """What trials begin with, the base or the adapter that the recipe goes on from, on the same held-out rows.

    For the loss one token of each answer is asked for, so it costs the loading of the model and a validation.

    Args:
        recipe: of the sweep.
        file: where it stands.
        metric: what the sweep makes best.
        watch: told of the answers.
    Returns: {"value": 2.1, "low": 1.9, "high": 2.4, "interval": "bca", "rows": 50}.
    Raises: Phi3VError where it cannot be asked.
    """
    loss = metric == "eval_loss"
    changes = ["evaluation.rows=null", "evaluation.max_new_tokens=1"] if loss else []
    name, revision = recipe.model.adapter or recipe.model.name, recipe.model.revision
    held_out = held_out_rows(resolve_target(name, revision=revision), file, None, changes)
    rows = held_out.rows
    scoring = scoring_of(held_out, [] if loss else [metric])

    def tell(done: int) -> None:
        watch(TrainingEvent("answers", done, len(rows), stage="base answers"))

    try:
        loaded = load_target(name, revision=revision, **held_out.recipe.loading_options)
        said = answer_rows(loaded.model, loaded.processor, rows, **answer_options(held_out.recipe), on_row=tell)
    finally:
        release_memory()
    expected, questions = [row.answer for row in rows], [row.question for row in rows]
    columns = score_rows(scoring, expected, said.texts, questions, said.losses, said.tokens, held_out.groups)
    return estimate([columns["loss" if loss else metric]])[0][0].to_dict()
