"""Who watches a run: callbacks of the Trainer, trackers, answers during training.

In come a recipe and its run, out come callbacks. Of several ranks the first one alone writes and tells; what decides,
and what stops a run, is on all of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from phi3v.data.sources import LoadedData, StreamedData
from phi3v.ranks import Ranks
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import (
    LastStepCallback,
    MetricsCallback,
    NonFiniteCallback,
    OrderCallback,
    ProgressCallback,
    TrainingEvent,
    Watcher,
)
from phi3v.training.doctor import FirstStepCallback
from phi3v.training.feature_cache import FeatureReport
from phi3v.training.meter import Meter
from phi3v.training.sample_answers import SampleAnswer, SampleAnswers
from phi3v.training.step_faults import NonFinite, name_rows
from phi3v.training.trackers import tracker_callbacks
from phi3v.tuning import TrainableReport


def kept_event(report: FeatureReport | str) -> TrainingEvent:
    """What is kept of the images, or why nothing is, as an event."""
    kept, images = (report.kept, report.images) if isinstance(report, FeatureReport) else (0, 0)
    return TrainingEvent("kept", kept, images, line=str(report))


def run_callbacks(
    recipe: Recipe, run: RunFolder, report: TrainableReport, watch: Watcher, meter: Meter, ranks: Ranks
) -> list[TrainerCallback]:
    """What watches the run; metrics are written before the check for non-finite numbers stops it."""
    patience = recipe.training.early_stopping
    return [
        FirstStepCallback(meter),
        LastStepCallback(),
        OrderCallback(),
        *([MetricsCallback(run)] if ranks.first else []),
        NonFiniteCallback(),
        ProgressCallback(watch, report, meter),
        *([] if patience is None else [EarlyStoppingCallback(patience)]),
    ]


def non_finite(
    recipe: Recipe, run: RunFolder, data: LoadedData | StreamedData, meter: Meter, ranks: Ranks
) -> NonFinite:
    """What happens to a step whose loss or gradient is no number; rows of a stream have no names."""

    def tell(line: dict[str, Any]) -> None:
        meter.left_out += 1
        if ranks.first:
            run.append_metrics(line)

    name = partial(name_rows, data.train) if isinstance(data, LoadedData) else None
    return NonFinite(recipe.training.non_finite, name, tell)


def steps_left_out(run: RunFolder) -> int:
    """Steps of a run that changed nothing, by their lines in metrics.jsonl."""
    return len({line["step"] for line in run.read_metrics() if "left_out" in line})


def run_trackers(recipe: Recipe, run: RunFolder, ranks: Ranks, done: int) -> list[TrainerCallback]:
    """Weights & Biases and TensorBoard, as the recipe asks for them; `done` steps are behind the run."""
    if not ranks.first:
        return []
    return tracker_callbacks(
        list(recipe.report.to),
        folder=run.path,
        project=recipe.report.project,
        run_name=recipe.report.run_name or run.path.name,
        config=recipe.model_dump(),
        done=done,
    )


def sample_answers(
    recipe: Recipe,
    run: RunFolder,
    data: LoadedData | StreamedData,
    processor: Any,
    autocast: torch.dtype | None,
    watch: Watcher,
    trackers: Sequence[Any],
    ranks: Ranks,
) -> SampleAnswers | None:
    """What answers a few held-out rows at each validation; None where none are asked for.

    All ranks answer, since a model that is sharded answers on all of them or on none; the first one tells.
    """
    if not recipe.evaluation.during_training or not data.validation:
        return None

    def tell(step: int, answers: list[SampleAnswer]) -> None:
        plain = [answer.to_dict() for answer in answers]
        run.append_metrics({"step": step, "answers": plain})
        watch(TrainingEvent("samples", step, 0, answers=plain))

    listeners = [tell, *(tracker.log_answers for tracker in trackers)] if ranks.first else []
    return SampleAnswers(recipe, data.validation, processor, autocast=autocast, listeners=listeners)
