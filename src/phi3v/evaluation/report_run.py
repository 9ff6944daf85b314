"""From a run's files to its report.html: gathers what `report` draws. Reads and writes through `RunFolder` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3v.data.images import open_image
from phi3v.data.schema import Row
from phi3v.errors import CheckpointError
from phi3v.evaluation.report import ReportContent, Sample, loss_curve_png, render_report
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.whole_files import replace_file

NEEDED = (
    "target base against rows kind primary metrics scores majority notes problems seconds".split()  # in its own order
)
"""What evaluation.json holds at least, for the report and for the screen."""


def write_report(run: RunFolder, rows: Sequence[Row], controls: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes report.html and, beside it, the loss curve as loss.png.

    Args:
        run: a run that was evaluated, or one that is finished and has no held-out rows.
        rows: the evaluated rows, in the order of its predictions; none where nothing was evaluated.
        controls: name -> exact match under spoiled conditions as a `Share` dict.
    """
    recipe = run.read_recipe()
    summary = run.read_summary() if run.state() == "finished" else {}
    evaluation = run.read_evaluation(needed=NEEDED) if rows or summary.get("held_out") != 0 else None
    predictions = run.read_predictions() if evaluation else []
    if len(predictions) < len(rows):
        raise CheckpointError(
            f"{run.predictions} holds {len(predictions)} of {len(rows)} answered rows; remove it and let it be written "
            "again"
        )
    times = {"training": summary["seconds"]} if summary.get("seconds") else {}
    name = f"Run {run.path.resolve().name}"
    content = ReportContent(
        title=f"{name}: tuned answers beside the base's" if evaluation and evaluation["base"] else name,
        evaluation=evaluation,
        metrics=run.read_metrics(),
        samples=choose_samples(recipe, predictions, rows),
        trained=trained_parts(summary.get("trainable", {})),
        recipe=run.recipe.read_text(encoding="utf-8"),
        versions=run.read_versions(),
        times=times | (evaluation["seconds"] if evaluation else {}),
        controls=controls or {},
    )
    if (curve := loss_curve_png(run.read_metrics())) is not None:
        replace_file(run.path / "loss.png", curve)
    run.write_report(render_report(content))


def choose_samples(recipe: Recipe, predictions: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[Sample]:
    """The rows to show: `report.samples` of them, evenly spaced over all, so that nobody picked the good ones."""
    count = min(recipe.report.samples, len(rows))
    chosen = [position * len(rows) // count for position in range(count)]
    return [
        Sample(
            index=rows[at].index,
            photos=[open_image(image, max_pixels=recipe.image.max_pixels) for image in rows[at].images],
            question=predictions[at]["question"],
            expected=predictions[at]["expected"],
            base=predictions[at]["base"],
            tuned=predictions[at]["tuned"],
        )
        for at in chosen
    ]


def trained_parts(trainable: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Rows of the table "what was trained".

    Example: {"projector": {"trainable": 1, "total": 4}} -> [{"part": "projector", "parameters": 4, "trained": 1,
    "share": 0.25}].
    """
    return [
        {
            "part": part,
            "parameters": count["total"],
            "trained": count["trainable"],
            "share": count["trainable"] / max(count["total"], 1),
        }
        for part, count in trainable.items()
    ]
