"""The answers of a model in training to a few fixed held-out rows, at each validation: shown, logged, scored.

In come rows and a processor; out come scores of the answers, and the answers go to the run's metrics.jsonl, to whoever
watches, and with their photos to the trackers. Nothing of the model changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi3v.data.images import open_image
from phi3v.data.schema import Row
from phi3v.evaluation.answers import answer_rows
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.intervals import mean
from phi3v.evaluation.kinds import ALWAYS, choose_scoring
from phi3v.evaluation.row_scores import score_rows
from phi3v.evaluation.run import answer_options
from phi3v.recipe import Recipe


def scored_by(recipe: Recipe) -> list[str]:
    """What answers are scored by at each validation: ["exact_match", "similarity"] and the recipe's metrics."""
    return list(dict.fromkeys([*ALWAYS, *(recipe.evaluation.metrics or [])]))


@dataclass(frozen=True)
class SampleAnswer:
    """What a model said to one row at one step; `photos` are small copies of its images."""

    step: int
    row: int
    question: str
    expected: str
    answer: str
    photos: tuple[Any, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without photos."""
        return {"row": self.row, "question": self.question, "expected": self.expected, "answer": self.answer}


Listener = Callable[[int, list[SampleAnswer]], None]
"""Told of a step and its answers."""


class SampleAnswers:
    """Answers the same rows each time it is called."""

    def __init__(
        self,
        recipe: Recipe,
        rows: Sequence[Row],
        processor: Any,
        *,
        autocast: torch.dtype | None,
        listeners: Sequence[Listener],
    ) -> None:
        """Keep rows and how they are answered.

        Args:
            recipe: its sections evaluation and data.
            rows: held-out rows, evenly spaced over all of them, as many as `evaluation.during_training`.
            processor: the model's processor.
            autocast: number type of the training's mixed precision.
            listeners: who is told.
        """
        self.recipe, self.processor, self.autocast, self.listeners = recipe, processor, autocast, listeners
        count = min(recipe.evaluation.during_training, len(rows))
        self.rows = [rows[place * len(rows) // count] for place in range(count)]
        self._photos: list[tuple[Any, ...]] | None = None

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Answers, tells, and gives the scores: {"exact_match": 0.25, "similarity": 0.81}, and the recipe's metrics."""
        was_training, device = model.training, next(model.parameters()).device.type
        model.eval()
        try:
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                texts = answer_rows(model, self.processor, self.rows, **answer_options(self.recipe)).texts
        finally:
            model.train(was_training)
        expected = [row.answer for row in self.rows]
        questions, settings = [row.question for row in self.rows], self.recipe.evaluation
        template, named = AnswerTemplate(self.recipe.data.answer), settings.metrics or []
        scoring = choose_scoring(expected, questions, template, metrics=named, numeric_fields=settings.numeric_fields)
        columns = score_rows(scoring, expected, texts, questions)
        answers = [
            SampleAnswer(step, row.index, row.question, row.answer, text, photos)
            for row, text, photos in zip(self.rows, texts, self._small_photos(), strict=True)
        ]
        for listener in self.listeners:
            listener(step, answers)
        means = {name: mean(columns[name]) for name in scoring.metrics}
        return {name: value for name, value in means.items() if value is not None}

    def _small_photos(self) -> list[tuple[Any, ...]]:
        """The images of the rows, at most 336 pixels wide and high, made once."""
        if self._photos is None:
            self._photos = []
            for row in self.rows:
                photos = [open_image(image, max_pixels=self.recipe.image.max_pixels) for image in row.images]
                for photo in photos:
                    photo.thumbnail((336, 336))
                self._photos.append(tuple(photos))
        return self._photos
