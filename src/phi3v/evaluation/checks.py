"""The checks of an evaluation: which are made, which rows they ask beside the evaluation's own, what they find.

In come a recipe and the evaluated rows, out comes a plan; the answers of the plan's rows come back, and out come
verdicts: pass, warn, fail, or skipped. Loads no model, and asks nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from phi3v.data.schema import Row
from phi3v.errors import ConfigError
from phi3v.evaluation.answers import Answers
from phi3v.evaluation.check_answers import check_forgetting, check_images, some_answers
from phi3v.evaluation.check_constant import check_constant
from phi3v.evaluation.check_form import check_form
from phi3v.evaluation.check_overlap import check_overlap
from phi3v.evaluation.compared import Check, few_rows
from phi3v.evaluation.headline import better_fields
from phi3v.evaluation.image_groups import count_groups
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.paired import LEAST_ROWS
from phi3v.evaluation.result import Beside, Evaluation, HeldOut, scoring_of
from phi3v.evaluation.row_scores import Column, score_rows
from phi3v.evaluation.spoiled import blank_images
from phi3v.recipe import Recipe
from phi3v.recipe_report import CheckName

ALL: tuple[str, ...] = get_args(CheckName)
"""Every check."""
CHEAP = ("overlap", "form", "constant")
"""Those that ask the model nothing."""
USUAL = (*CHEAP, "images")
"""Those that are made where nothing is said; `images` of rows that have some."""
GREY_ROWS = 100
"""Rows that are asked once more with grey images, drawn by a fixed seed."""

More = Mapping[tuple[str, str], Answers]
"""(side, check) -> the answers to the rows of a check; sides are "tuned" and "base"."""


@dataclass(frozen=True)
class Asked:
    """Rows that a check wants answered.

    Attributes:
        check: its name.
        stage: what is told while they are answered.
        rows: the rows.
        taken_from: the rows that these were made of.
        both: whether the base answers them too.
    """

    check: str
    stage: str
    rows: Sequence[Row]
    taken_from: Sequence[Row]
    both: bool


@dataclass(frozen=True)
class Plan:
    """What will be checked.

    Attributes:
        names: the checks.
        places: evaluated rows that are asked with grey images.
        kept: rows of another task, see `evaluation.keep`; None where none are named.
    """

    names: tuple[str, ...] = ()
    places: Sequence[int] = ()
    kept: HeldOut | None = None

    def asked(self, held_out: HeldOut) -> list[Asked]:
        """The rows that have to be answered beside the evaluated ones."""
        found = []
        if self.places:
            some = [held_out.rows[place] for place in self.places]
            found.append(Asked("images", "with grey images", blank_images(some), held_out.rows, both=False))
        if self.kept is not None:
            rows = self.kept.rows
            found.append(Asked("forgetting", "what should be kept", rows, rows, both=True))
        return found


def plan_checks(held_out: HeldOut, named: Sequence[str] | None, keep: Callable[[], HeldOut]) -> Plan:
    """Chooses the checks: those named, else those of the recipe, else `default_checks`.

    Args:
        held_out: the evaluated rows.
        named: names of checks.
        keep: reads the rows of `evaluation.keep`.
    Raises: ConfigError for a name that is no check; DataError for rows to keep that cannot be read.
    """
    recipe = held_out.recipe
    names = tuple(dict.fromkeys(default_checks(recipe, held_out.rows) if named is None else named))
    for name in names:
        if name not in ALL:
            raise ConfigError(f"{name!r} is no check; there are {', '.join(ALL)}")
    pictured = []
    if "images" in names and count_groups(held_out.rows, held_out.groups)["different"] >= LEAST_ROWS:
        pictured = [place for place, row in enumerate(held_out.rows) if row.images]
    kept = keep() if "forgetting" in names and recipe.evaluation.keep is not None else None
    return Plan(names, few_rows(pictured, GREY_ROWS), kept)


def default_checks(recipe: Recipe, rows: Sequence[Row]) -> Sequence[str]:
    """The checks that a recipe asks for: those it names, else the usual ones, and forgetting with a `keep`."""
    if recipe.evaluation.checks is not None:
        return recipe.evaluation.checks
    names = USUAL if any(row.images for row in rows) else CHEAP
    return (*names, "forgetting") if recipe.evaluation.keep is not None else names


def run_checks(
    plan: Plan,
    held_out: HeldOut,
    scoring: Scoring,
    tuned: Answers,
    beside: Beside | None,
    found: Evaluation,
    more: More,
    train: Callable[[], Sequence[Row] | str],
) -> dict[str, dict[str, Any]]:
    """Verdict, line and figures of each check, by name.

    Args:
        plan: what is checked.
        held_out: the evaluated rows.
        scoring: how they are scored.
        tuned: the target's answers to them.
        beside: what stands beside it.
        found: the scores of these answers.
        more: the answers to the plan's own rows.
        train: gives the training rows, or says why there are none to look at.
    """
    rows = held_out.rows
    expected, questions = [row.answer for row in rows], [row.question for row in rows]

    def overlap() -> Check:
        known = train()
        if isinstance(known, str):
            return Check("skipped", known)
        others = _primary(scoring, held_out, beside.answers) if beside else None
        how = {"max_pixels": held_out.recipe.image.max_pixels}
        return check_overlap(known, rows, _primary(scoring, held_out, tuned), others, **how)

    def images() -> Check:
        asked = [rows[place] for place in plan.places]
        some = asked or [row for row in rows if row.images]  # of too few none is asked
        blind = more.get(("tuned", "images"), Answers([], [], []))
        return check_images(scoring, some, some_answers(tuned, plan.places), blind, found.constant.answer)

    def forgetting() -> Check:
        if plan.kept is None:
            return Check("skipped", "evaluation.keep names no rows of what the model should still do")
        before, after = more.get(("base", "forgetting")), more["tuned", "forgetting"]
        return check_forgetting(scoring_of(plan.kept), plan.kept.rows, before, after)

    def form() -> Check:
        others = beside.answers if beside else None
        return check_form(scoring, expected, questions, tuned, others, groups=held_out.groups)

    def constant() -> Check:
        fields = better_fields(found.metrics)
        own = _primary(scoring, held_out, tuned)
        return check_constant(scoring, expected, questions, own, found.constant, fields, found.control)

    makers = {"overlap": overlap, "form": form, "constant": constant, "images": images, "forgetting": forgetting}
    return {name: makers[name]().to_dict() for name in plan.names}


def _primary(scoring: Scoring, held_out: HeldOut, answers: Answers) -> Column:
    """The column of the metric that stands for the whole."""
    name, rows = scoring.metrics[0], held_out.rows
    expected, questions = [row.answer for row in rows], [row.question for row in rows]
    one = replace(scoring, metrics=(name,))
    return score_rows(one, expected, answers.texts, questions, groups=held_out.groups)[name]
