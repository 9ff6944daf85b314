"""Ask a model about rows it was not trained on, and score what it says: base beside tuned.

In comes a TARGET (run, adapter, model folder, hub id) and, for anything but a run, the rows; out comes an `Evaluation`.
The model is loaded once, and its base answers with the adapter off. Where the tuned model does not hold its base (it
was tuned as a whole, or LoRA began with parts of the base's weights) the base is loaded after it. Knows nothing about
training and prints nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from phi3v.adapters import base_weights, holds_base
from phi3v.data.address_guard import shorten
from phi3v.data.reading import Reading
from phi3v.data.rows import Rows
from phi3v.data.schema import Row, RowProblem
from phi3v.data.sources import LoadedData, StreamedData, load_data, load_rows, stream_data
from phi3v.errors import ConfigError
from phi3v.evaluation.answers import Answers, answer_rows
from phi3v.evaluation.keeping import Keeping, own_device, shared
from phi3v.evaluation.metrics import AnswerTemplate, Scores, Share, majority_answer, majority_fields, score_answers
from phi3v.features.opening import open_store
from phi3v.features.store import FeatureStore
from phi3v.features.vision import VisionFeatures, sees_plainly
from phi3v.first_look import row_options, survey_options, survey_rows
from phi3v.loading import LoadedTarget, load_processor, load_target, resolve_device
from phi3v.ranks import Ranks
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.targets import Target, resolve_target, run_of

Progress = Callable[[str, int, int], None]
"""Called with a stage, the rows done and the rows in all."""
See = Callable[[dict[str, Any]], dict[str, Any]] | None
"""Puts kept features in place of an example's pixels."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        target: what was evaluated, as it was named.
        base: name of the base beside it; None when there is none to compare with.
        data: where the rows come from.
        template: the answer template, which fields are named after.
        tuned: scores of the target.
        base_scores: scores of the base; None without one.
        majority_answer: the most frequent expected answer.
        majority: what that answer would score on every row.
        majority_fields: the same for each field by itself.
        problems: rows that were left out, one line each.
        seconds: stage -> how long it took.
        created: when, in UTC.
        predictions: one dict per row, see `prediction_rows`.
    """

    target: str
    base: str | None
    data: str
    template: str | None
    tuned: Scores
    base_scores: Scores | None
    majority_answer: str
    majority: Share
    majority_fields: dict[str, Share]
    problems: list[str]
    seconds: dict[str, float]
    created: str
    predictions: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as plain values for JSON."""
        return {
            "target": self.target,
            "base": self.base,
            "data": self.data,
            "rows": self.tuned.rows,
            "answer_template": self.template,
            "scores": {
                "base": self.base_scores.to_dict() if self.base_scores else None,
                "tuned": self.tuned.to_dict(),
            },
            "majority": {
                "answer": self.majority_answer,
                "share": vars(self.majority),
                "fields": {name: vars(share) for name, share in self.majority_fields.items()},
            },
            "problems": self.problems,
            "seconds": self.seconds,
            "created": self.created,
        }


@dataclass(frozen=True)
class HeldOut:
    """Rows to answer, and how.

    Attributes:
        rows: the rows.
        problems: rows that were left out.
        data: where they come from.
        recipe: whose templates, lengths and batch sizes apply.
    """

    rows: Sequence[Row]
    problems: list[RowProblem]
    data: str
    recipe: Recipe


def evaluate(
    target: str | Path,
    data: str | Path | None = None,
    *,
    against: Literal["base"] | None = "base",
    rows: int | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
    features: FeatureStore | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Answers held-out rows with a target and with its base, and scores both.

    A run's own held-out rows, all that its recipe asks for, are the run's evaluation: predictions.jsonl,
    evaluation.json and report.html are written into it. With `data` or `rows` nothing is written. A run's evaluation
    that was killed goes on where it was, and ends as one that was not. Under torchrun each process takes its share of
    the rows, all return the same, and the first one writes.

    Args:
        target: run, adapter, model folder or hub id.
        data: a recipe file, whose held-out rows are taken, or data read with the templates of the target's run;
            None for the run's own held-out rows.
        against: "base" to answer with the base too, None for the target alone.
        rows: only the first so many rows; None for as many as the recipe says.
        device: "auto", "cpu" or "cuda"; None as the recipe says.
        on_progress: called as rows are answered.
        features: where the features of frozen vision parts are kept if the recipe keeps them (vision.cache), by a
            training for instance; None opens what the recipe names.
        ranks: the processes that share the rows; None for those that torchrun started, `phi3v.ranks.ALONE` for this
            one by itself.

    Raises:
        ConfigError: the target is no run and `data` is no recipe, so nothing says which rows and templates; `against`
            is something else.
        CheckpointError, DataError: the target or the rows cannot be used.
    """
    if against not in ("base", None):
        raise ConfigError(f"against is {against!r}, allowed are 'base' and None (the target alone)")
    place = resolve_target(target)
    if device is not None:
        resolve_device(device)  # what is not there is said before rows are read
    held_out = held_out_rows(place, data, rows)
    began = time.monotonic()
    store = feature_store(held_out.recipe, features)
    own = place.kind == "run" and data is None and rows is None
    run = RunFolder(target)
    with shared(device or held_out.recipe.model.device, ranks) as together:
        keeping = Keeping(run.answers if own else None, together)
        tuned, base = _answer_both(place, held_out, against, device, on_progress or _ignore, store, keeping)
        seconds = {"evaluation": time.monotonic() - began}
        evaluation = build_evaluation(place, held_out, tuned, base, seconds)
        if own:
            together.alone(lambda: write_evaluation(run, evaluation, held_out))
            keeping.done()
    return evaluation


def held_out_rows(place: Target, data: str | Path | None, rows: int | None) -> HeldOut:
    """Finds the rows to answer; see `evaluate` for the arguments.

    Raises:
        ConfigError: nothing says which rows, or there are no held-out rows.
    """
    if data is not None and Path(data).suffix.lower() in (".yaml", ".yml"):
        recipe, own_data = Recipe.load(data), True
    else:
        recipe, own_data = _recipe_of(place), data is None
    options = row_options(recipe)
    reading = Reading.of(**recipe.data.reading_options)
    processor = load_processor(place.name, **recipe.image.processor_options)
    if own_data:
        load: Callable[..., LoadedData | StreamedData] = stream_data if recipe.data.streaming else load_data
        loaded = load(options=options, reading=reading, **recipe.data.load_options)
        if loaded.validation is None:
            raise ConfigError(
                "the recipe holds out no rows (data.validation and data.split are null): name rows with --data"
            )
        found: Sequence[Row] = loaded.validation
        problems, name = loaded.problems, recipe.data.validation or f"{recipe.data.train_name} ({loaded.origin})"
    else:
        found, problems = load_rows(str(data), options=options, reading=reading)
        name = str(data)
    limit = rows if rows is not None else recipe.evaluation.rows
    chosen = found if limit is None else found[:limit]
    looked = survey_rows(chosen, processor, survey_options(recipe, None, decode=True, hashes=False))
    sound = chosen.take(looked.kept) if isinstance(chosen, Rows) else [chosen[place] for place in looked.kept]
    return HeldOut(sound, [*problems, *looked.problems], name, recipe)


def _recipe_of(place: Target) -> Recipe:
    """The recipe of the run that a target is or lies in."""
    if (run := run_of(place.name)) is not None:
        return run.read_recipe()
    raise ConfigError(
        f"{place.name} is no run, so nothing says which rows and templates to use: give a recipe, --data recipe.yaml"
    )


def answer_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `answer_rows` that a recipe holds: batch size, longest answer, largest image."""
    return {
        "batch_size": recipe.evaluation.batch_size,
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "max_pixels": recipe.image.max_pixels,
    }


def _answer_both(
    place: Target,
    held_out: HeldOut,
    against: Literal["base"] | None,
    device: str | None,
    on_progress: Progress,
    store: FeatureStore | None,
    keeping: Keeping,
) -> tuple[Answers, tuple[str, Answers] | None]:
    """Answers of the target, and the base's name and answers where they are wanted and there is a base."""
    recipe = held_out.recipe
    options = recipe.loading_options | {"device": own_device(device or recipe.model.device, keeping.ranks)}
    settings = answer_options(recipe)

    def answers(model: Any, processor: Any, stage: str, see: Any) -> Answers:
        def count(done: int) -> None:
            on_progress(stage, done, len(held_out.rows))

        journal = keeping.journal(stage.partition(" ")[0], model, processor, held_out.rows, settings)
        its = {"see": see, "on_row": count, "journal": journal, "ranks": keeping.ranks}
        return answer_rows(model, processor, held_out.rows, **settings, **its)

    if store is not None:
        store.begin()
    loaded = load_target(place.name, **options)
    see = seeing(loaded.model, store)
    base: tuple[str, Answers] | None = None
    if against == "base" and holds_base(loaded.model):
        with base_weights(loaded.model):
            base = loaded.base_name, answers(loaded.model, loaded.processor, "base answers", see)
    tuned = answers(loaded.model, loaded.processor, "tuned answers", see)
    if against == "base" and base is None and place.kind in ("run", "adapter"):
        processor = loaded.processor
        del loaded, see  # two whole models need not fit into memory
        gc.collect()
        source = _load_base_beside(place, options)
        base = source.base_name, answers(source.model, processor, "base answers", seeing(source.model, store))
    return tuned, base


def _load_base_beside(place: Target, options: dict[str, Any]) -> LoadedTarget:
    """The base of a run or an adapter whose tuned model does not hold it, see `adapters.holds_base`."""
    if place.adapter is not None:
        return load_target(place.name, base_only=True, **options)
    model = _recipe_of(place).model
    return load_target(model.name, revision=model.revision, **options)


def feature_store(recipe: Recipe, given: FeatureStore | None) -> FeatureStore | None:
    """Where features are kept: what is given, else what the recipe names; None where it keeps none."""
    if recipe.vision.cache is None:
        return None
    return given or open_store(recipe.vision.cache, recipe.vision.cache_gb, recipe.vision.cache_folder)


def seeing(model: Any, store: FeatureStore | None) -> See:
    """Puts kept features in place of an example's pixels; None where features cannot be kept."""
    if store is None or not sees_plainly(model):
        return None
    return VisionFeatures(model, store).complete


def build_evaluation(
    place: Target, held_out: HeldOut, tuned: Answers, base: tuple[str, Answers] | None, seconds: dict[str, float]
) -> Evaluation:
    """Scores of answers that are there; the arguments as `evaluate` makes them."""
    recipe = held_out.recipe
    expected = [row.answer for row in held_out.rows]
    template = AnswerTemplate(recipe.data.answer)
    numeric = recipe.evaluation.numeric_fields

    def scores(answers: Answers) -> Scores:
        return score_answers(expected, answers.texts, template, numeric, answers.loss)

    answer, share = majority_answer(expected)
    return Evaluation(
        target=place.name,
        base=base[0] if base else None,
        data=held_out.data,
        template=recipe.data.answer,
        tuned=scores(tuned),
        base_scores=scores(base[1]) if base else None,
        majority_answer=answer,
        majority=share,
        majority_fields=majority_fields(expected, template) if template.separable else {},
        problems=[str(problem) for problem in held_out.problems],
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        predictions=prediction_rows(held_out.rows, tuned.texts, base[1].texts if base else None, template),
    )


def prediction_rows(
    rows: Sequence[Row], tuned: Sequence[str], base: Sequence[str] | None, template: AnswerTemplate
) -> list[dict[str, Any]]:
    """One dict per row for predictions.jsonl.

    Example: {"row": 3, "source": "shop.csv", "images": ["a.jpg"], "question": "What is it?", "expected": "Product:
    Scarf", "base": "a red square", "tuned": "Product: Scarf", "right": true, "fields": {"title": {"expected": "Scarf",
    "base": null, "tuned": "Scarf"}}}; `fields` is {} where the template cannot be read backwards, `base` is null
    without a base.
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
                "question": row.question,
                **texts,
                "right": tuned[position].strip() == row.answer.strip(),
                "fields": fields if template.separable else {},
            }
        )
    return found


def write_evaluation(run: RunFolder, evaluation: Evaluation, held_out: HeldOut) -> None:
    """Writes predictions.jsonl, evaluation.json and report.html of a run."""
    from phi3v.evaluation.report_run import write_report

    run.write_predictions(evaluation.predictions)
    run.write_evaluation(evaluation.to_dict())
    write_report(run, held_out.rows)


def _ignore(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
