"""One page about one run: figures in, a single HTML file out that needs no network and no other file.

The page is `report.html.j2` filled by jinja2 with auto-escaping on, so no answer, file name or recipe can become
markup. The loss curve is drawn by matplotlib as SVG, the photos are small JPEGs inside the page. What a run is and
where its files lie is not known here: `run_folder` writes the text that `render_report` returns.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from phi3v.data.data_uri import photo_uri
from phi3v.evaluation.figures import counted, duration, interval, percent, short_number

TRAIN_COLOUR, EVALUATION_COLOUR, AXIS_COLOUR = "#3b7dd8", "#d9822b", "#8a8f98"  # readable on white and on black


@dataclass(frozen=True)
class Sample:
    """One row as the report shows it. `base` is None where there is no base to compare with."""

    index: int
    photos: Sequence[Image.Image]
    question: str
    expected: str
    base: str | None
    tuned: str


@dataclass(frozen=True)
class ReportContent:
    """Everything that the page says.

    Attributes:
        title: name of the run.
        evaluation: `Evaluation.to_dict()`; None for a run without held-out rows.
        metrics: the rows of metrics.jsonl; those with "step" and "loss" or
            "eval_loss" make the curve. samples: rows to show with their photos. trained: one dict per part of the model
            with "part", "parameters", "trained" and "share". recipe: the resolved recipe as YAML text. versions: name
            and version of what ran. times: what took how many seconds. controls: answers under spoiled conditions: name
            -> exact match as a `Share` dict; empty when none were asked for.
    """

    title: str
    evaluation: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sample] = ()
    trained: Sequence[Mapping[str, Any]] = ()
    recipe: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def render_report(content: ReportContent) -> str:
    """The whole page as one HTML text."""
    points = {name: curve_points(content.metrics, name) for name in ("loss", "eval_loss")}
    curve = loss_curve_svg(points["loss"], points["eval_loss"]) if any(points.values()) else ""
    return _template().render(
        content=content,
        evaluation=content.evaluation,
        base=content.evaluation["scores"].get("base") if content.evaluation else None,
        tuned=content.evaluation["scores"]["tuned"] if content.evaluation else None,
        curve=Markup(curve),
        colours={"loss": TRAIN_COLOUR, "eval_loss": EVALUATION_COLOUR},
        points=points,
    )


@functools.cache
def _template() -> Template:
    """The page's template, compiled once."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent,
        interval=interval,
        number=short_number,
        counted=counted,
        duration=duration,
        photo=photo_uri,
    )
    return environment.from_string(
        resources.files("phi3v.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    )


def curve_points(metrics: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The (step, value) points of one figure in the metrics of a run; of a step logged twice (after a resume) the last
    one counts.

    Example: [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 1, "loss": 1.5}], "loss" -> [(1.0,
    1.5)].
    """
    found = {float(row["step"]): float(row[name]) for row in metrics if "step" in row and row.get(name) is not None}
    return sorted(found.items())


def loss_curve_svg(train: Sequence[tuple[float, float]], evaluation: Sequence[tuple[float, float]]) -> str:
    """The loss over the steps as an SVG element without background, so that it reads in a light and in a dark page.

    The same points give the same text: no date and no random ids are in it.
    """
    drawn = _draw_curve(train, evaluation, "svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    return svg.replace("<svg", '<svg role="img" aria-label="loss over the optimiser steps"', 1)


def loss_curve_png(metrics: Sequence[Mapping[str, Any]]) -> bytes | None:
    """The same curve of a run's metrics as a picture on white; None where nothing was logged."""
    train, evaluation = (curve_points(metrics, name) for name in ("loss", "eval_loss"))
    return _draw_curve(train, evaluation, "png", dpi=160, facecolor="white") if train or evaluation else None


def _draw_curve(
    train: Sequence[tuple[float, float]], evaluation: Sequence[tuple[float, float]], form: str, **how: Any
) -> bytes:
    """The file of a curve. matplotlib is imported here, so that a training begins without it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "phi3v", "font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        if train:
            axes.plot(*zip(*train, strict=True), color=TRAIN_COLOUR, linewidth=1.6)
        if evaluation:
            axes.plot(*zip(*evaluation, strict=True), color=EVALUATION_COLOUR, linewidth=1.6, marker="o", markersize=4)
        values = [value for _, value in (*train, *evaluation)]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("optimiser step", color=AXIS_COLOUR)
        axes.set_ylabel("loss per trained token", color=AXIS_COLOUR)
        axes.grid(color=AXIS_COLOUR, alpha=0.25, linewidth=0.6)
        axes.tick_params(which="both", colors=AXIS_COLOUR)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(AXIS_COLOUR)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, **how)
    return buffer.getvalue()
