"""What an evaluation found, and how it is made of answers: scores, the table of metrics, a line for each row.

In come rows and answers that are there, out comes an `Evaluation`. Loads no model and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

from phi3v.data.address_guard import shorten
from phi3v.data.schema import Row, RowProblem
from phi3v.evaluation.answers import Answers
from phi3v.evaluation.categories import break_down
from phi3v.evaluation.constant import ConstantAnswer, best_constant, constant_columns
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.image_groups import count_groups, image_groups
from phi3v.evaluation.kinds import Scoring, choose_scoring
from phi3v.evaluation.metric_table import metric_table, remarks
from phi3v.evaluation.metrics import Scores, exact_match, majority_fields, score_answers
from phi3v.evaluation.row_scores import Column, Groups, score_rows, scores_of_row
from phi3v.evaluation.shares import Share, majority_answer
from phi3v.recipe import Recipe


@dataclass(frozen=True)
class HeldOut:
    """Rows to answer, and how.

    Attributes:
        rows: the rows.
        problems: rows that were left out.
        data: where they come from.
        recipe: whose templates, lengths and batch sizes apply.
        train: the training rows of the same recipe, where they were read with them.
    """

    rows: Sequence[Row]
    problems: list[RowProblem]
    data: str
    recipe: Recipe
    train: Sequence[Row] | None = None

    @cached_property
    def groups(self) -> Groups:
        """Which rows are about the same images, see `image_groups`."""
        return image_groups(self.rows)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        target: what was evaluated, as it was named.
        base: name of what answered beside it, its base or another target; None when there is none to compare with.
        against: which of the two that is, "base" or "target"; None for none.
        data: where the rows come from.
        template: the answer template, which fields are named after.
        scoring: the kind of the answers, and the metrics for it.
        images: how many rows have images, and how many different ones, see `count_groups`.
        metrics: the figures of each metric, see `metric_table`.
        categories: the primary metric for parts of the rows, see `categories.break_down`.
        tuned: scores of the target.
        base_scores: scores of the base; None without one.
        constant: the best single answer to every row by the primary metric.
        majority_answer: the most frequent expected answer.
        majority: what that answer would score on every row.
        majority_fields: the same for each field by itself.
        problems: rows that were left out, one line each.
        seconds: stage -> how long it took.
        memory_gib: the most memory that the process took since it began; 0 where nobody looked.
        created: when, in UTC.
        predictions: one dict per row, see `prediction_rows`.
        checks: name -> verdict, line and figures, see `checks`.
        settings: what the figures depend on besides the target: values of the recipe, and a name of the rows.
        fingerprints: digests of what the figures depend on, under the names that the report gives them.
        control: the primary metric's scores of that single answer, for the checks; None where there is no control.
        weights: side, "tuned" for instance -> name of the weights that answered, where answers were kept meanwhile or
            another target stands beside.
    """

    target: str
    base: str | None
    against: Literal["base", "target"] | None
    data: str
    template: str | None
    scoring: Scoring
    images: dict[str, int]
    metrics: dict[str, dict[str, Any]]
    categories: dict[str, dict[str, dict[str, Any]]]
    tuned: Scores
    base_scores: Scores | None
    constant: ConstantAnswer
    majority_answer: str
    majority: Share
    majority_fields: dict[str, Share]
    problems: list[str]
    seconds: dict[str, float]
    created: str
    predictions: list[dict[str, Any]] = field(repr=False)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    memory_gib: float = 0.0
    fingerprints: dict[str, str] = field(default_factory=dict)
    control: Column | None = field(default=None, repr=False)

    def _same_model(self) -> list[str]:
        """Says so where both sides are one model, a run beside its own adapter for instance."""
        tuned, other = (self.weights.get(side) for side in ("tuned", "other"))
        if tuned is None or tuned != other:
            return []
        return [f"{self.target} and {self.base} are the same model: their weights are equal, so no difference is shown"]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as plain values for JSON."""
        return {
            "target": self.target,
            "base": self.base,
            "against": self.against,
            "data": self.data,
            "rows": self.tuned.rows,
            "images": self.images,
            "answer_template": self.template,
            "kind": {"name": self.scoring.kind, "why": self.scoring.why},
            "primary": self.scoring.metrics[0],
            "metrics": self.metrics,
            "categories": self.categories,
            "notes": [*self.scoring.notes, *self._same_model(), *remarks(self.metrics, self.images, self.predictions)],
            "checks": self.checks,
            "settings": self.settings,
            "weights": self.weights,
            "fingerprints": self.fingerprints,
            "scores": {
                "base": self.base_scores.to_dict() if self.base_scores else None,
                "tuned": self.tuned.to_dict(),
            },
            "constant": self.constant.to_dict(),
            "majority": {
                "answer": self.majority_answer,
                "share": vars(self.majority),
                "fields": {name: vars(share) for name, share in self.majority_fields.items()},
            },
            "problems": self.problems,
            "seconds": self.seconds,
            "memory_gib": self.memory_gib,
            "created": self.created,
        }


@dataclass(frozen=True)
class Beside:
    """What answered beside a target: its name, whether it is the target's base, its answers."""

    name: str
    kind: Literal["base", "target"]
    answers: Answers


def scoring_of(held_out: HeldOut, metrics: Iterable[str] | None = None) -> Scoring:
    """The metrics for rows: those named, else those of the recipe, else those of the answers' kind.

    Raises: as `kinds.choose_scoring` does.
    """
    recipe = held_out.recipe
    return choose_scoring(
        [row.answer for row in held_out.rows],
        [row.question for row in held_out.rows],
        AnswerTemplate(recipe.data.answer),
        metrics=recipe.evaluation.metrics if metrics is None else metrics,
        numeric_fields=recipe.evaluation.numeric_fields,
    )


def build_evaluation(
    target: str,
    held_out: HeldOut,
    scoring: Scoring,
    tuned: Answers,
    beside: Beside | None,
    seconds: dict[str, float],
) -> Evaluation:
    """Scores of answers that are there.

    Args:
        target: name of what answered.
        held_out: the rows.
        scoring: the metrics, see `scoring_of`.
        tuned: its answers.
        beside: what answered beside it; None for nothing.
        seconds: stage -> how long it took.
    """
    recipe = held_out.recipe
    expected = [row.answer for row in held_out.rows]
    questions = [row.question for row in held_out.rows]
    template = scoring.template

    def scores(answers: Answers) -> Scores:
        numeric = recipe.evaluation.numeric_fields
        return score_answers(expected, answers.texts, template, numeric, answers.loss, held_out.groups)

    def columns(answers: Answers) -> dict[str, Column]:
        said = (answers.texts, questions, answers.losses, answers.tokens)
        return score_rows(scoring, expected, *said, held_out.groups)

    ours, theirs = columns(tuned), columns(beside.answers) if beside else None
    answer = majority_answer(expected)
    theirs_said = beside.answers.texts if beside else None
    texts = (tuned.texts, theirs_said)
    single = best_constant(scoring, expected, questions, tuned.texts)
    constant = constant_columns(scoring, expected, questions, held_out.groups, single.answer, tuned.texts)
    predictions = prediction_rows(held_out.rows, *texts, template, ours, theirs, held_out.groups)
    return Evaluation(
        target=target,
        base=beside.name if beside else None,
        against=beside.kind if beside else None,
        data=held_out.data,
        template=recipe.data.answer,
        scoring=scoring,
        images=count_groups(held_out.rows, held_out.groups),
        metrics=metric_table(ours, theirs, constant),
        categories=break_down(predictions, scoring.metrics[0], constant.get(scoring.metrics[0])),
        tuned=scores(tuned),
        base_scores=scores(beside.answers) if beside else None,
        constant=single,
        majority_answer=answer,
        majority=exact_match(expected, [answer] * len(expected), held_out.groups),
        majority_fields=majority_fields(expected, template, held_out.groups),
        problems=[str(problem) for problem in held_out.problems],
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        predictions=predictions,
        control=constant.get(scoring.metrics[0]),
    )


def prediction_rows(
    rows: Sequence[Row],
    tuned: Sequence[str],
    base: Sequence[str] | None,
    template: AnswerTemplate,
    tuned_columns: Mapping[str, Column],
    base_columns: Mapping[str, Column] | None,
    groups: Groups,
) -> list[dict[str, Any]]:
    """One dict per row for predictions.jsonl; rows of one image group have the same images.

    Example: {"row": 3, "source": "shop.csv", "images": ["a.jpg"], "image_group": 2, "question": "What is it?",
    "expected": "Product: Scarf", "base": "a red square", "tuned": "Product: Scarf", "right": true, "fields": {"title":
    {"expected": "Scarf", "base": null, "tuned": "Scarf"}}, "scores": {"tuned": {"exact_match": 1.0}, "base":
    {"exact_match": 0.0}}}; `fields` is {} where the template cannot be read backwards, `base` and `scores.base` are
    null without a base.
    """
    found = []
    for position, row in enumerate(rows):
        texts = {"expected": row.answer, "base": base[position] if base else None, "tuned": tuned[position]}
        parsed = {name: template.parse(text) if text is not None else None for name, text in texts.items()}
        fields = {
            name: {who: values[name] if values else None for who, values in parsed.items()} for name in template.fields
        }
        found.append(
            {
                "row": row.index,
                "source": row.source,
                "images": [shorten(image.url) if image.url else image.path for image in row.images],
                "image_group": int(groups[position]),
                "question": row.question,
                **texts,
                "right": tuned[position].strip() == row.answer.strip(),
                "fields": fields if template.separable else {},
                "scores": {
                    "tuned": scores_of_row(tuned_columns, position),
                    "base": None if base_columns is None else scores_of_row(base_columns, position),
                },
            }
        )
    return found
