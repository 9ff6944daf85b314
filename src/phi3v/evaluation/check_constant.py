"""Is a model better than one answer to everything? A column of scores in, a `Check` out.

Costs nothing: the answers are there. A model that learnt only which answers are frequent, since it was tuned on answers
that belong to other images or looks at none, gets far more than its base, and no more than the most frequent answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phi3v.evaluation.compared import Check, compare
from phi3v.evaluation.figures import counted, ends, figure, gain, gain_ends, p_said, shortened
from phi3v.evaluation.headline import CHANCE
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.metric_table import constant_columns
from phi3v.evaluation.paired import LEAST_ROWS
from phi3v.evaluation.row_scores import LABELS, Column
from phi3v.evaluation.shares import majority_answer


def check_constant(scoring: Scoring, expected: Sequence[str], questions: Sequence[str], tuned: Column) -> Check:
    """Whether answers are better than the most frequent expected answer, given to every row.

    Args:
        scoring: the metrics; the first one decides.
        expected: what should be answered.
        questions: what was asked.
        tuned: the first metric's scores of the answers, with the rows that belong together.
    Example: 191 of 200 rows right where the most frequent answer gets 2 -> pass; 132 where it gets 131 -> fail.
    """
    name, answer = scoring.metrics[0], shortened(majority_answer(expected))
    different = len(expected) if tuned.groups is None else len(np.unique(tuned.groups))
    if different < LEAST_ROWS:
        few = counted(different, "row" if tuned.groups is None or different == len(expected) else "photo")
        return Check("skipped", f"{few} {'is' if different == 1 else 'are'} too few: {LEAST_ROWS} at least can tell")
    constant = constant_columns(scoring, expected, questions, tuned.groups).get(name)
    if constant is None:
        return Check("skipped", f"every constant answer gets all of {LABELS[name]}")
    found = compare(tuned, constant)
    figures: dict[str, Any] = {
        "rows": len(expected),
        "metric": name,
        "answer": majority_answer(expected),
        "tuned": found.pop("one"),
        "constant": found.pop("other"),
        **found,
    }
    gap = figures["difference"]
    line = (
        f"{LABELS[name]} {figure(figures['tuned']['value'], 'share')} ({ends(figures['tuned'], 'share')}), "
        f"{figure(figures['constant']['value'], 'share')} by always answering “{answer}” "
        f"({gain(gap['value'], 'share')} points, {gain_ends(gap, 'share')}, p {p_said(figures['p'])})"
    )
    if gap["value"] <= 0 or figures["p"] >= CHANCE:
        return Check("fail", f"{line}: nothing shows that the model knows more than which answer is frequent", figures)
    return Check("pass", line, figures)
