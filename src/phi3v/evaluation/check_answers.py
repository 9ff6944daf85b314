"""Two checks that ask again: do answers depend on the images, and is what the base could do still there?

In come answers that were given with and without images, or before and after the tuning, to the same rows; out come
`Check`s. Asks nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from phi3v.data.schema import Row
from phi3v.evaluation.answers import Answers
from phi3v.evaluation.compared import Check, compare
from phi3v.evaluation.constant import primary_control
from phi3v.evaluation.figures import counted, ends, figure, gain, gain_ends, p_said, rows_about
from phi3v.evaluation.headline import CHANCE, ODDS, at_odds, odds
from phi3v.evaluation.image_groups import count_groups, image_groups
from phi3v.evaluation.intervals import estimate, mean
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.paired import LEAST_ROWS, paired_test, rows_to_show
from phi3v.evaluation.row_scores import LABELS, Column, Groups, score_rows
from phi3v.evaluation.shares import same_text

MOSTLY = 0.5
"""Part of what was above the best single answer; with more of it left, most of the score comes from elsewhere."""
KEPT_ROWS = 200
"""Of `evaluation.keep`: so many tell a loss of ten points."""
SMALL_LOSS = 0.05
"""A score that fell by less has fallen a little."""


def check_images(
    scoring: Scoring, rows: Sequence[Row], seeing: Answers, blind: Answers, single: str | None = None
) -> Check:
    """Whether answers get worse when every image is grey.

    Args:
        scoring: the metrics; the first one decides.
        rows: the rows, with images.
        seeing: answers with the images.
        blind: answers with grey ones.
        single: the best single answer to all evaluated rows; None for the best one among those expected here.
    Example: 90 of 100 rows right with images and 2 without -> pass; 40 and 40 -> fail; all wrong in both -> fail, since
        nothing shows that images are looked at.
    """
    groups = image_groups(rows)
    images = count_groups(rows, groups)
    if images["different"] < LEAST_ROWS:
        few = rows_about({"rows": len(rows), "images": images}, "row with images", "rows with images")
        return Check("skipped", f"{few} are too few: {LEAST_ROWS} at least can tell")
    expected, questions = [row.answer for row in rows], [row.question for row in rows]
    name = scoring.metrics[0]
    columns = [_columns(scoring, rows, answers, groups) for answers in (seeing, blind)]
    one, other = (column[name] for column in columns)
    found = compare(one, other)
    same_to_all = primary_control(scoring, expected, questions, None, single)
    constant = None if same_to_all is None else mean(same_to_all)
    same = [float(same_text(a, b)) for a, b in zip(seeing.texts, blind.texts, strict=True)]
    kept = estimate([replace(one, values=np.array(same))])[0][0]
    figures: dict[str, Any] = {
        "rows": len(rows),
        "metric": name,
        "with_images": found.pop("one"),
        "with_grey_images": found.pop("other"),
        **found,
        "constant": constant,
        "same_answers": kept.to_dict(),
    }
    if "loss" in columns[0]:
        losses = compare(columns[0]["loss"], columns[1]["loss"])
        figures["loss"] = {"with_images": losses["one"], "with_grey_images": losses["other"], "p": losses["p"]}
    with_images, without = figures["with_images"]["value"], figures["with_grey_images"]["value"]
    line = f"{_score(name, with_images)} ({ends(figures['with_images'], 'share')}) with the images, "
    line += f"{figure(without, 'share')} ({ends(figures['with_grey_images'], 'share')}) with grey ones in their place"
    line += "" if constant is None else f", {figure(constant, 'share')} by the best single answer"
    doubt = f"; the interval of the difference, {gain_ends(figures['difference'], 'share')} points, and p {ODDS}"
    line += f" (p {p_said(figures['p'])}, {rows_about({'rows': len(rows), 'images': images}, 'row')}"
    line += f"{doubt if at_odds(figures) else ''})"
    if (same_score := figures["difference"]["value"] <= 0 or figures["p"] >= CHANCE) and (
        fell := _fields_that_fall(*columns)
    ):
        return Check("pass", f"{line}: whole answers show nothing, but {', '.join(fell[:3])}", figures)
    if same_score:
        return Check("fail", f"{line}: nothing shows that answers depend on the images", figures)
    above = with_images - (constant or 0.0)
    if above > 0 and without - (constant or 0.0) > MOSTLY * above:
        return Check("warn", f"{line}: most of the score does not come from the images", figures)
    return Check("pass", line, figures)


def _fields_that_fall(seeing: Mapping[str, Column], blind: Mapping[str, Column]) -> list[str]:
    """Fields that are clearly worse with grey images, for when whole answers are right in neither case; the limit of p
    is shared among the fields, as in `headline.better_fields`.

    Example: ["field “price” falls from 90.0 % to 0 %"].
    """
    names = [name for name, column in seeing.items() if column.field is not None and column.unit == "share"]
    found = []
    for name in names:
        before, after = mean(seeing[name]), mean(blind[name])
        p = paired_test(seeing[name], blind[name]).p
        if p is not None and p < CHANCE / len(names) and before is not None and after is not None and before > after:
            field = f"field “{seeing[name].field}”"
            found.append(f"{field} falls from {figure(before, 'share')} to {figure(after, 'share')}")
    return found


def check_forgetting(scoring: Scoring, rows: Sequence[Row], before: Answers | None, after: Answers) -> Check:
    """Whether rows of another task are answered as well as before the tuning.

    Args:
        scoring: the metrics of these rows; the first one decides.
        rows: the rows.
        before: answers of the base; None where it was not asked.
        after: answers of the tuned model.
    """
    name = scoring.metrics[0]
    groups = image_groups(rows)
    own = _columns(scoring, rows, after, groups)
    theirs = _columns(scoring, rows, before, groups) if before is not None else None
    found = compare(own[name], theirs[name] if theirs else None)
    figures: dict[str, Any] = {
        "rows": len(rows),
        "metric": name,
        "kind": scoring.kind,
        "after": found.pop("one"),
        "before": found.pop("other"),
        **found,
    }
    if "loss" in own:
        losses = compare(own["loss"], theirs["loss"] if theirs else None)
        figures["loss"] = {"after": losses["one"], "before": losses["other"], "p": losses["p"]}
    now = _score(name, figures["after"]["value"])
    asked = f"{counted(len(rows), 'kept row')} (another task)"
    if theirs is None:
        return Check("skipped", f"{now} on {asked}; no base answered them before", figures)
    gap = figures["difference"]
    line = f"{now} on {asked}, {figure(figures['before']['value'], 'share')} before the tuning"
    line += (
        f" ({gain(gap['value'], 'share')} points, {gain_ends(gap, 'share')}, p {p_said(figures['p'])}{odds(figures)})"
    )
    return _loss_verdict(line, own[name], theirs[name], figures)


def _loss_verdict(line: str, after: Column, before: Column, figures: dict[str, Any]) -> Check:
    """What two columns of kept rows say of a loss.

    A pass needs rows that could have shown one: where all of five rows are lost p is 0.06, and what the base cannot do
    cannot be lost.
    """
    different = len(after.values) if after.groups is None else len(np.unique(after.groups))
    unit = "row" if different == len(after.values) else "photo"
    loss = -figures["difference"]["value"]
    if loss > 0 and figures["p"] < CHANCE:
        return Check("warn" if loss < SMALL_LOSS else "fail", line, figures)
    if loss >= SMALL_LOSS:
        needed = figures["rows_needed"] = rows_to_show(after, before)
        enough = f"; some {needed} such {unit}s would show a loss as large"
        enough += f", and {KEPT_ROWS} rows are asked at most" if needed > KEPT_ROWS else ""
    else:
        enough = ""
    if different < LEAST_ROWS:
        few = f"{counted(different, unit)} {'is' if different == 1 else 'are'} too few"
        return Check("skipped", f"{line}: {few}, {LEAST_ROWS} at least can tell{enough}", figures)
    if loss >= SMALL_LOSS:
        return Check("warn", f"{line}: too few to tell{enough}", figures)
    p = paired_test(replace(after, values=np.zeros_like(after.values)), before).p
    if p is None or p >= CHANCE:
        return Check("skipped", f"{line}: too few to tell, the loss of all that the base gets would not show", figures)
    return Check("pass", line, figures)


def some_answers(answers: Answers, places: Sequence[int]) -> Answers:
    """The answers of some rows, in their order."""
    return Answers(
        [answers.texts[place] for place in places],
        [answers.losses[place] for place in places],
        [answers.tokens[place] for place in places],
    )


def _columns(scoring: Scoring, rows: Sequence[Row], answers: Answers, groups: Groups) -> dict[str, Column]:
    expected, questions = [row.answer for row in rows], [row.question for row in rows]
    return score_rows(scoring, expected, answers.texts, questions, answers.losses, answers.tokens, groups)


def _score(name: str, value: float | None) -> str:
    """ "anls", 0.9 -> "ANLS 90.0 %", as the table of scores calls it."""
    return f"{LABELS[name]} {figure(value, 'share')}"
