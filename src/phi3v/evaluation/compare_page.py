"""A comparison of runs as one HTML page that needs no network and no other file: plain values in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from phi3v.evaluation.legend import comparison_words
from phi3v.evaluation.report import render_page
from phi3v.evaluation.report_curves import RUN_COLOURS, loss_curves_svg
from phi3v.evaluation.report_rows import Filter, ReportRow, say

PAGE_MARK = '<meta name="generator" content="phi3v compare">'
"""What every such page holds."""


def render_comparison(comparison: Mapping[str, Any], metrics: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The whole page as one HTML text.

    Args:
        comparison: `Comparison.to_dict()`.
        metrics: the lines of each run's metrics.jsonl.
    """
    names = [run["name"] for run in comparison["runs"]]
    labels = {name: one["label"] for run in comparison["runs"] for name, one in run["metrics"].items()}
    rows = [
        ReportRow(
            f"row {one['row']}",
            one["images"],
            one["question"],
            say(one["expected"], one["answers"]),
            " ".join(f"{'right' if one['right'][name] else 'wrong'}-{names.index(name)}" for name in one["right"]),
        )
        for one in comparison["disagreements"]
    ]
    told = [name for name in names if any(name in one["right"] for one in comparison["disagreements"])]
    menus = [
        Filter(name, {f"right-{names.index(name)}": "right", f"wrong-{names.index(name)}": "wrong"}) for name in told
    ]
    return render_page(
        "compare.html.j2",
        mark=Markup(PAGE_MARK),
        comparison=comparison,
        runs=comparison["runs"],
        labels=labels,
        words=comparison_words(comparison["runs"]),
        rows=rows,
        menus=menus,
        one_question=len({row.question for row in rows}) == 1,
        curves=Markup(loss_curves_svg(metrics)),
        colours=[RUN_COLOURS[at % len(RUN_COLOURS)] for at in range(len(names))],
    )
