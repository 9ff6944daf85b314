"""From a run's files to its report.html: gathers what `report` draws. Reads and writes through `RunFolder` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from phi3v.data.data_uri import photo_uri
from phi3v.data.images import open_image
from phi3v.data.schema import Row
from phi3v.errors import CheckpointError, ImageError
from phi3v.evaluation.figures import ending
from phi3v.evaluation.headline import column_names
from phi3v.evaluation.report import Photos, ReportContent, render_report
from phi3v.evaluation.report_curves import loss_curve_png
from phi3v.evaluation.report_rows import choose_extremes
from phi3v.evaluation.result import Evaluation, HeldOut
from phi3v.evaluation.sources import run_fingerprints
from phi3v.run_folder import RunFolder, gather_versions
from phi3v.whole_files import replace_file

NEEDED = (
    "target base against rows kind primary metrics scores majority notes problems seconds".split()  # in its own order
)
"""What evaluation.json holds at least, for the report and for the screen."""
PHOTO_BYTES = 4_000_000  # of all photos in a page, as they stand in it
MOST_PHOTOS = 500  # rows of the list whose photos are opened: minutes at most for photos of a camera
SMALL_SIDE = 112  # pixels of a photo in the list, about 3 kB


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
    name, samples = f"Run {run.path.resolve().name}", recipe.report.samples
    shown = chain(*choose_extremes(predictions, evaluation["primary"], samples)) if evaluation else ()
    content = ReportContent(
        title=f"{name}: tuned answers beside the base's" if evaluation and evaluation["base"] else name,
        evaluation=evaluation,
        metrics=run.read_metrics(),
        predictions=predictions,
        samples=samples,
        photos=gather_photos(rows, shown, recipe.image.max_pixels) if samples else Photos(),
        trained=trained_parts(summary.get("trainable", {})),
        ending=ending(summary),
        recipe=run.recipe.read_text(encoding="utf-8"),
        versions=run.read_versions(),
        times=times | (evaluation["seconds"] if evaluation else {}),
        memory_gib=_most_memory(training=summary, evaluation=evaluation),
        fingerprints=(evaluation or {}).get("fingerprints") or run_fingerprints(run, rows),
        problems=left_out(run, evaluation),
        controls=controls or {},
    )
    (run.path / "loss.png").unlink(missing_ok=True)
    write_curve(run)
    run.write_report(render_report(content))


def write_curve(run: RunFolder) -> None:
    """Writes the loss curve as loss.png, where it is not there and something was logged."""
    file = run.path / "loss.png"
    if not file.is_file() and (curve := loss_curve_png(run.read_metrics())) is not None:
        replace_file(file, curve)


def write_report_apart(folder: RunFolder, evaluation: Evaluation, held_out: HeldOut) -> None:
    """Writes the report.html of an evaluation that is no run's own: other rows, or another target beside.

    Args:
        folder: where it lies.
        evaluation: what was found.
        held_out: the rows, and the recipe that they were asked by.
    """
    found, recipe, said = evaluation.to_dict(), held_out.recipe, evaluation.predictions
    names, samples = column_names(found), recipe.report.samples
    shown = chain(*choose_extremes(said, found["primary"], samples))
    content = ReportContent(
        title=f"{names['tuned']} beside {names['base']}" if evaluation.base else names["tuned"],
        evaluation=found,
        predictions=said,
        samples=samples,
        photos=gather_photos(held_out.rows, shown, recipe.image.max_pixels) if samples else Photos(),
        recipe=recipe.to_yaml(),
        versions=gather_versions(),
        times=evaluation.seconds,
        memory_gib=_most_memory(evaluation=found),
        fingerprints=evaluation.fingerprints,
        problems=evaluation.problems,
        apart=True,
    )
    folder.write_report(render_report(content))


def gather_photos(rows: Sequence[Row], shown: Iterable[int], max_pixels: int) -> Photos:
    """Photos of the rows that are shown large, then small ones for the list, until 4 MB are full or 500 rows have them.

    Args:
        rows: all rows.
        shown: positions of those that are shown large.
        max_pixels: the largest image that is opened.
    """
    large: dict[int, list[str]] = {}
    small: dict[int, list[str]] = {}
    left, broken, bare, full = PHOTO_BYTES, 0, 0, False
    first = list(shown)
    for at in dict.fromkeys([*first, *range(len(rows))]):
        if full or len(small) == MOST_PHOTOS:
            break
        try:
            photos = [open_image(image, max_pixels=max_pixels) for image in rows[at].images]
        except ImageError:
            broken += 1
            continue
        bare += not photos
        its = [photo_uri(photo, SMALL_SIDE) for photo in photos]
        ours = [photo_uri(photo) for photo in photos] if at in first else []
        left -= sum(map(len, (*its, *ours)))
        full = left < 0
        if not full:
            small[at] = its
            large |= {at: ours} if ours else {}
    note = f"{len(small) - bare} of {len(rows)} rows have their photos here"
    note += f" ({bare} without any)" if bare else ""
    if len(small) + broken < len(rows):
        note += f": a page holds those of {MOST_PHOTOS} rows, and {PHOTO_BYTES // 10**6} MB at most"
    return Photos(large, small, note + (f"; those of {broken} could not be opened" if broken else ""))


def _most_memory(**stages: Mapping[str, Any] | None) -> dict[str, float]:
    """What took at most how many GiB: training={"memory_gib": 3.25}, evaluation=None -> {"training": 3.25}."""
    return {name: said["memory_gib"] for name, said in stages.items() if said and said.get("memory_gib")}


def left_out(run: RunFolder, evaluation: Mapping[str, Any] | None) -> list[str]:
    """Rows that were left out of training and of the evaluation, a line each: "shop.csv, row 3: column is empty"."""
    told = [f"{one.get('source')}, row {one.get('row')}: {one.get('message')}" for one in run.read_problems()]
    return list(dict.fromkeys([*told, *(evaluation["problems"] if evaluation else [])]))


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
