"""One page about one run: figures in, a single HTML file out that needs no network and no other file.

The page is `report.html.j2` filled by jinja2 with auto-escaping on, so no answer, file name or recipe can become
markup, and the page's policy lets no script run but its own. The loss curve is drawn by matplotlib as SVG, the photos
are small JPEGs inside the page. What a run is and where its files lie is not known here: `run_folder` writes the text
that `render_report` returns.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from phi3v.evaluation import figures
from phi3v.evaluation.headline import (
    also_changed,
    beside_constant,
    beside_control,
    better_fields,
    cautions,
    conclusion,
    failures,
    in_words,
    not_looked_at,
    odds,
    out_of_form,
    row_label,
    single_answer,
    verdict,
    which_rows,
)
from phi3v.evaluation.legend import CHECKS, CURVE, HELD_OUT, legend
from phi3v.evaluation.report_curves import EVALUATION_COLOUR, TRAIN_COLOUR, curve_points, loss_curve_svg
from phi3v.evaluation.report_rows import choose_extremes, list_rows, side_names


@dataclass(frozen=True)
class Photos:
    """Photos of some rows, as JPEG data URIs.

    Attributes:
        large: position of a row among the predictions -> its photos, for rows that are shown large.
        small: the same for the list of all rows.
        note: which rows have them, and why others have none.
    """

    large: Mapping[int, Sequence[str]] = field(default_factory=dict)
    small: Mapping[int, Sequence[str]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ReportContent:
    """Everything that the page says.

    Attributes:
        title: name of the run.
        evaluation: `Evaluation.to_dict()`; None for a run without held-out rows.
        metrics: the rows of metrics.jsonl; those with "step" and "loss" or "eval_loss" make the curve.
        predictions: the rows of predictions.jsonl; all of them are listed.
        samples: how many of them are shown as worst and best.
        photos: photos of some.
        trained: one dict per part of the model with "part", "parameters", "trained" and "share".
        ending: whose weights are kept, and by what score; "" for those of the last step, unchosen.
        recipe: the resolved recipe as YAML text.
        versions: name and version of what ran.
        times: what took how many seconds.
        memory_gib: what took at most how many GiB: {"training": 3.25}.
        fingerprints: short names for data, base and recipe: other ones where anything changed.
        problems: rows that were left out, a line each.
        controls: answers under spoiled conditions: name -> exact match as a `Share` dict; empty when none were asked
            for.
        apart: whether the evaluation is no run's own, so that nothing is known of the rows, of training or of a run.
    """

    title: str
    evaluation: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]] = ()
    predictions: Sequence[Mapping[str, Any]] = ()
    samples: int = 12
    photos: Photos = Photos()
    trained: Sequence[Mapping[str, Any]] = ()
    ending: str = ""
    recipe: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    memory_gib: Mapping[str, float] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    apart: bool = False


def render_report(content: ReportContent) -> str:
    """The whole page as one HTML text."""
    points = {name: curve_points(content.metrics, name) for name in ("loss", "eval_loss")}
    curve = loss_curve_svg(points["loss"], points["eval_loss"]) if any(points.values()) else ""
    evaluation = content.evaluation
    rows, menus = list_rows(content.predictions, evaluation) if evaluation else ([], [])
    worst, best = (
        choose_extremes(content.predictions, evaluation["primary"], content.samples) if evaluation else ([], [])
    )
    return render_page(
        "report.html.j2",
        content=content,
        evaluation=evaluation,
        primary=evaluation["metrics"][evaluation["primary"]] if evaluation else None,
        curve=Markup(curve),
        colours={"loss": TRAIN_COLOUR, "eval_loss": EVALUATION_COLOUR},
        points=points,
        rows=rows,
        menus=menus,
        worst=worst,
        best=best,
        names=side_names(evaluation) if evaluation else {},
        one_question=len({one["question"] for one in content.predictions}) == 1,
        check_words=CHECKS,
        held_out_words=HELD_OUT,
    )


def render_page(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file: styles and script inside, all values escaped.

    The policy in its head names the script's digest, so that no other script runs, whatever a text brings. Half a
    character, of a photo's name that is no UTF-8 for instance, stands as its escape.
    """
    environment = Environment(
        loader=PackageLoader("phi3v.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=figures.percent,
        interval=figures.interval,
        figure=figures.figure,
        ends=figures.ends,
        gain=figures.gain,
        gain_ends=figures.gain_ends,
        p_value=figures.p_value,
        p_said=figures.p_said,
        unbroken=figures.unbroken,
        number=figures.short_number,
        counted=figures.counted,
        rows_about=figures.rows_about,
        duration=figures.duration,
        verdict=verdict,
        in_words=in_words,
        which_rows=which_rows,
        cautions=cautions,
        failures=failures,
        beside_constant=beside_constant,
        beside_control=beside_control,
        better_fields=better_fields,
        single_answer=single_answer,
        out_of_form=out_of_form,
        conclusion=conclusion,
        not_looked_at=not_looked_at,
        odds=odds,
        also_changed=also_changed,
        row_label=row_label,
        legend=legend,
    )
    script = resources.files("phi3v.evaluation").joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = environment.get_template(template).render(
        script=Markup(script), script_digest=digest, loss_words=CURVE, **values
    )
    return page.encode("utf-8", "backslashreplace").decode()
