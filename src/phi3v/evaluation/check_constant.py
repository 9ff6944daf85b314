"""Is a model better than one answer to everything? A column of scores in, a `Check` out.

The model is not asked again: the answers are there. A model that learnt only which answers are frequent, since it was
tuned on answers that belong to other images or looks at none, gets far more than its base, and no more than the best
single answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phi3v.evaluation.compared import Check, compare
from phi3v.evaluation.constant import ConstantAnswer, primary_control
from phi3v.evaluation.figures import counted, ends, figure, gain, gain_ends, p_said, shortened
from phi3v.evaluation.headline import CHANCE, odds
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.paired import LEAST_ROWS
from phi3v.evaluation.row_scores import LABELS, Column


def check_constant(
    scoring: Scoring,
    expected: Sequence[str],
    questions: Sequence[str],
    tuned: Column,
    single: ConstantAnswer,
    fields: Sequence[str] = (),
    control: Column | None = None,
) -> Check:
    """Whether answers are better than the best single answer, given to every row.

    Args:
        scoring: the metrics; the first one decides.
        expected: what should be answered.
        questions: what was asked.
        tuned: the first metric's scores of the answers, with the rows that belong together.
        single: the best single answer.
        fields: those that are clearly better than one answer, see `headline.better_fields`: with some the check warns,
            since a whole answer is wrong where one of its fields is.
        control: scores of the single answer by the first metric; None to make them.
    Example: 191 of 200 rows right where the best single answer gets 2 -> pass; 132 where it gets 131 -> fail.
    """
    name, answer = scoring.metrics[0], shortened(single.answer)
    different = len(expected) if tuned.groups is None else len(np.unique(tuned.groups))
    if different < LEAST_ROWS:
        few = counted(different, "row" if tuned.groups is None or different == len(expected) else "photo")
        return Check("skipped", f"{few} {'is' if different == 1 else 'are'} too few: {LEAST_ROWS} at least can tell")
    constant = control or primary_control(scoring, expected, questions, tuned.groups, single.answer)
    if constant is None:
        return Check("skipped", f"every constant answer gets all of {LABELS[name]}")
    found = compare(tuned, constant)
    figures: dict[str, Any] = {
        "rows": len(expected),
        "metric": name,
        "answer": single.answer,
        "origin": single.origin,
        "tuned": found.pop("one"),
        "constant": found.pop("other"),
        **found,
    }
    gap = figures["difference"]
    line = (
        f"{LABELS[name]} {figure(figures['tuned']['value'], 'share')} ({ends(figures['tuned'], 'share')}), "
        f"{figure(figures['constant']['value'], 'share')} by always answering “{answer}” "
        f"({gain(gap['value'], 'share')} points, {gain_ends(gap, 'share')}, p {p_said(figures['p'])}"
        f"{odds(figures)})"
    )
    if (dull := gap["value"] <= 0 or figures["p"] >= CHANCE) and fields:
        told = ", ".join(fields[:3]) + (f" and {len(fields) - 3} more" if fields[3:] else "")
        better = f"clearly better than one answer to everything {'is' if len(fields) == 1 else 'are'} {told}"
        return Check("warn", f"{line}: whole answers show no more than that, but {better}", figures)
    if dull:
        return Check("fail", f"{line}: nothing shows that the model knows more than one answer to everything", figures)
    return Check("pass", line, figures)
