"""Every word of a report's tables in plain words. Names in, sentences out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from phi3v.evaluation.headline import column_names, out_of_form
from phi3v.evaluation.row_scores import LABELS

COLUMNS = {
    "difference": "the later column minus the earlier one, over the rows that have both; the interval beneath says "
    "where it would probably lie on other rows like these",
    "p": "how often a difference as large would come up if neither were better: below 0.05 it is hardly chance",
    "won, lost": "rows that the later column answers better, and worse",
    "best single answer": "the control: what one answer would get if it were given to every row, by each score the "
    "best of a few: the best one by the headline's score, the most frequent one, the one made of the most frequent "
    "fields, the one with the median numbers, and what the model says most often; for a field, its own most frequent "
    "value, and for a mean absolute error the median of the expected numbers, which no other number is nearer to on "
    "average. “none” where that says nothing: one answer to everything always has the right form, and it has no loss. "
    "Beneath it: what the paired test says of the model beside it, on the rows that both have; “not clearly better” is "
    "not shown to be better than one answer to everything",
    "small print": "the 95 % interval: where the figure would probably lie on other rows like these",
}
"""Columns of the tables."""

IN_FORM = {
    "value there, answer out of form": "answers that are not built as the template is and hold the expected value all "
    "the same: where they become right, the form is what was learnt",
    "answers without a number at its place": "answers that are not in the template's form, or say something else there",
}
"""Rows beneath fields."""

METRICS = {
    "exact_match": "answers that are the expected one, letter by letter",
    "field_accuracy": "of the fields that make up an answer, the share that is right; numbers count as numbers",
    "well_formed": "answers that are built as the expected ones are, whatever they say",
    "json_valid": "answers that a program can read as JSON, whatever they say",
    "json_field_accuracy": "of the values in the JSON, the share that is right; what is left out or invented counts as "
    "wrong",
    "multiple_choice": "answers that name the right option and no other",
    "anls": "how alike the letters of answer and expected text are; 0 where half of them or more differ",
    "relaxed_accuracy": "answers whose number is at most 5 % off",
    "rouge_l": "how many words answer and expected text share in the same order",
    "chrf": "how many short runs of letters answer and expected text share",
    "similarity": "how much of the letters of answer and expected text match in blocks",
    "absolute_error": "how far a number is off on average, over the answers that have one; less is better, and a few "
    "answers that are far off make it large and its interval wide",
    "loss": "how surprised the model is by the expected answer, word piece by word piece; less is better, and only the "
    "difference says something",
}
"""What scores mean."""

CHECKS = {
    "overlap": "were evaluated rows in the training data?",
    "form": "are the answers built as expected, whole, and in the right script? “Beside it” is what stands in the "
    "other column",
    "constant": "is the model better than the best single answer, given to everything?",
    "images": "do the answers get worse when the pictures are grey?",
    "forgetting": "can the model still do what it could before?",
}
"""What checks ask."""

KEPT = {
    "kept rows": "questions about other things than the tuning's, with their right answers: who loses them has "
    "forgotten what the model could do before",
}
"""What the check of forgetting looks at."""


HELD_OUT = "rows that are there to ask about alone: training does not learn from them (data.split, data.validation)"
"""What the rows of a run's own page are."""


CURVE = (
    "How surprised the model is by the expected answers, word piece (token) by word piece; less is better. At each "
    "optimiser step the model is changed once, after a look at a few training rows."
)
"""What the axes of the loss curve are."""


def legend(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The words that the scores of an evaluation need, columns first: {"p": "how often ...", "exact match": ...}.

    Scores of checks too, which need not be those of the rows: captions that were kept are told by another one.
    Columns that compare are left out where nothing stands beside.
    """
    metrics, checks = evaluation["metrics"].values(), evaluation.get("checks", {})
    alone = len(column_names(evaluation)) == 1
    found = {name: text for name, text in COLUMNS.items() if not (alone and name in ("difference", "p", "won, lost"))}
    if any(out_of_form(evaluation, one) for one in metrics):
        found |= IN_FORM
    return found | score_words(metrics, checks.items())


def score_words(
    metrics: Iterable[Mapping[str, Any]], checks: Iterable[tuple[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """What scores mean, those of the checks with them: {"kept rows": "questions about ...", "exact match": ...}.

    Args:
        metrics: figures with "metric", "field" and "label", of one evaluation or of several.
        checks: names of checks and what they found.
    """
    whole: dict[str, str] = {}
    found: dict[str, str] = {}
    for one in metrics:
        if one["field"] is None:
            whole[one["metric"]] = one["label"]
        elif one["metric"] == "absolute_error":
            whole["absolute_error"] = LABELS["absolute_error"]
    for check, one in checks:
        if (name := one.get("metric")) in LABELS:
            whole.setdefault(name, LABELS[name])
            if check == "forgetting":
                found |= KEPT
    return found | {label: METRICS[name] for name, label in whole.items() if name in METRICS}


def comparison_words(runs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The words of a page about several runs, see `compare.Comparison.runs`; of checks those that failed, whose lines
    stand there."""
    runs = list(runs)
    failed = [item for run in runs for item in run["checks"].items() if item[1]["verdict"] == "fail"]
    metrics = [one for run in runs for one in run["metrics"].values()]
    return {"held-out rows": HELD_OUT, "p": COLUMNS["p"], **score_words(metrics, failed)}
