"""Loss curves, drawn by matplotlib: the lines of metrics.jsonl in, SVG for a page or PNG out."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

TRAIN_COLOUR, EVALUATION_COLOUR, AXIS_COLOUR = "#3b7dd8", "#d9822b", "#8a8f98"  # readable on white and on black
RUN_COLOURS = (TRAIN_COLOUR, EVALUATION_COLOUR, "#2f9e6e", "#b455c8", "#c94f4f", "#0f97a6", "#9a8c2c", AXIS_COLOUR)
"""A colour for each of several runs; a ninth begins again."""

Points = Sequence[tuple[float, float]]
Line = tuple[Points, Mapping[str, Any]]
"""Points, and how matplotlib draws them."""


def curve_points(metrics: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The (step, value) points of one figure in the metrics of a run; of a step logged twice (after a resume) the last
    one counts.

    Example: [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 1, "loss": 1.5}], "loss" -> [(1.0,
    1.5)].
    """
    found = {float(row["step"]): float(row[name]) for row in metrics if "step" in row and row.get(name) is not None}
    return sorted(found.items())


def loss_curve_svg(train: Points, evaluation: Points) -> str:
    """The loss over the steps as an SVG element without background, so that it reads in a light and in a dark page.

    The same points give the same text: no date and no random ids are in it.
    """
    return _as_svg(_lines(train, evaluation))


def loss_curve_png(metrics: Sequence[Mapping[str, Any]]) -> bytes | None:
    """The same curve of a run's metrics as a picture on white; None where nothing was logged."""
    lines = _lines(curve_points(metrics, "loss"), curve_points(metrics, "eval_loss"))
    return _draw(lines, "png", dpi=160, facecolor="white") if lines else None


def loss_curves_svg(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The curves of several runs' metrics on one plot, each run in its colour; "" where nothing was logged.

    Colours are `RUN_COLOURS`; the training's curve is pale, that of held-out rows has dots.
    """
    lines = []
    for number, metrics in enumerate(runs):
        train, evaluation = (curve_points(metrics, name) for name in ("loss", "eval_loss"))
        lines += _lines(train, evaluation, {"color": RUN_COLOURS[number % len(RUN_COLOURS)]})
    return _as_svg(lines) if lines else ""


def _lines(train: Points, evaluation: Points, colour: Mapping[str, str] | None = None) -> list[Line]:
    """The lines of a run that have points."""
    pale = {"alpha": 0.5, "linewidth": 1.2, **colour} if colour else {"color": TRAIN_COLOUR, "linewidth": 1.6}
    dotted = {"color": EVALUATION_COLOUR, "linewidth": 1.6, "marker": "o", "markersize": 4, **(colour or {})}
    return [(points, how) for points, how in ((train, pale), (evaluation, dotted)) if points]


def _as_svg(lines: Sequence[Line]) -> str:
    drawn = _draw(lines, "svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    return svg.replace("<svg", '<svg role="img" aria-label="loss over the optimiser steps"', 1)


def _draw(lines: Sequence[Line], form: str, **how: Any) -> bytes:
    """The file of a curve."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "phi3v", "font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for points, style in lines:
            axes.plot(*zip(*points, strict=True), **style)
        values = [value for points, _ in lines for _, value in points]
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
