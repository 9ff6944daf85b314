"""Ask a model about rows it was not trained on, and score what it says: beside its base, or beside another target.

In comes a TARGET (run, adapter, model folder, hub id) and, for anything but a run, the rows; out comes an `Evaluation`.
The model is loaded once, and its base answers with the adapter off. Where the tuned model does not hold its base (it
was tuned as a whole, or LoRA began with parts of the base's weights) the base is loaded after it, and so is another
target. Knows nothing about training and prints nothing.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from phi3v.adapters import base_weights, holds_base
from phi3v.data.judging import refusal
from phi3v.data.reading import Reading
from phi3v.data.rows import Rows
from phi3v.data.schema import Row
from phi3v.data.sources import LoadedData, StreamedData, load_data, load_rows, stream_data
from phi3v.errors import ConfigError, DataError
from phi3v.evaluation.answers import Answers, answer_rows
from phi3v.evaluation.check_answers import KEPT_ROWS
from phi3v.evaluation.checks import Asked, plan_checks, run_checks
from phi3v.evaluation.keeping import Keeping, locked, own_device, shared
from phi3v.evaluation.result import Beside, Evaluation, HeldOut, build_evaluation, scoring_of
from phi3v.evaluation.sources import fingerprints
from phi3v.evaluation.written import open_folder, refuse_another, refuse_other_weights, write_evaluation
from phi3v.features.opening import open_store
from phi3v.features.store import FeatureStore
from phi3v.features.vision import VisionFeatures, sees_plainly
from phi3v.first_look import row_options, survey_options, survey_rows
from phi3v.loading import LoadedTarget, load_config, load_processor, load_target, resolve_device
from phi3v.plain_json import to_json
from phi3v.ranks import Ranks
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.run_lock import RunLock
from phi3v.targets import Target, resolve_target, run_of

Progress = Callable[[str, int, int], None]
"""Called with a stage, the rows done and the rows in all."""
See = Callable[[dict[str, Any]], dict[str, Any]] | None
"""Puts kept features in place of an example's pixels."""
_OF_TRAINING = ("training", "lora", "sweep", "output")
"""Sections that change nothing about rows or answers."""
KEPT_TEMPLATES = (
    'data.prompt="{question}"',
    'data.answer="{answer}"',
    "data.images=image",
    "data.format=auto",
    "data.system=null",
    "data.image_root=null",
    "evaluation.metrics=null",
    "evaluation.numeric_fields=null",
)
"""How rows of `evaluation.keep` are read and scored: as they are."""


def evaluate(
    target: str | Path,
    data: str | Path | None = None,
    *,
    against: str | Path | None = "base",
    metrics: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    rows: int | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
    features: FeatureStore | None = None,
    ranks: Ranks | None = None,
    overrides: Sequence[str] = (),
    lock: bool = True,
) -> Evaluation:
    """Answers held-out rows with a target and with what stands beside it, and scores both.

    A run's own held-out rows, all that its recipe asks for, are the run's evaluation: predictions.jsonl,
    evaluation.json and report.html are written into it. With `data`, `rows` or another target they are written into
    `out`, and where there is none nothing is. What is written was kept meanwhile: an evaluation that was killed goes on
    where it was, and ends as one that was not. Of two that would write into one folder at once the second is refused.
    Under torchrun each process takes its share of the rows, all return the same, and the first one writes.

    Args:
        target: run, adapter, model folder or hub id.
        data: a recipe file, whose held-out rows are taken, or data read with the templates of the target's run;
            None for the run's own held-out rows.
        against: "base" to answer with the base too, None or "none" for the target alone, or another target, which
            answers the same rows in the same way.
        metrics: names of metrics; None for those of the recipe, or where it names none those of the answers' kind.
        checks: names of checks, see `checks.ALL`; None for those of the recipe, or where it names none the usual ones.
        rows: only the first so many rows; None for as many as the recipe says.
        out: a folder for what is found, new, empty or with an earlier start of the same; None for the run's own.
        device: "auto", "cpu" or "cuda"; None as the recipe says.
        on_progress: called as rows are answered.
        features: where the features of frozen vision parts are kept if the recipe keeps them (vision.cache), by a
            training for instance; None opens what the recipe names.
        ranks: the processes that share the rows; None for those that torchrun started, `phi3v.ranks.ALONE` for this
            one by itself.
        overrides: `key=value` for the recipe that says how rows are read and answered, "data.format=conversations" for
            instance; what is found is the run's own only where there is none.
        lock: whether the folder is locked while it is written into; False where the caller holds its lock.

    Raises:
        ConfigError: the target is no run and `data` is no recipe, so nothing says which rows and templates; a name that
            is no metric; `out` holds something else or other weights' answers, or another process writes there.
        CheckpointError, DataError: a target or the rows cannot be used.
        MissingPackageError: a named metric's package is not installed.
    """
    place = resolve_target(target)
    other = _resolve_other(against)
    if device is not None:
        resolve_device(device)  # what is not there is said before rows are read
    folder = RunFolder(target) if out is None else open_folder(out)
    held_out = held_out_rows(place, data, rows, overrides)
    scoring = scoring_of(held_out, metrics)
    plan = plan_checks(held_out, checks, lambda: kept_rows(place, held_out.recipe))
    began = time.monotonic()
    store = feature_store(held_out.recipe, features)
    own = place.kind == "run" and data is None and rows is None and not overrides and not isinstance(other, Target)
    kept = own or out is not None
    what = None if out is None else f"--out {out}"
    lone = RunLock(folder.path, doing="evaluated", what=what) if kept and lock else None
    with shared(device or held_out.recipe.model.device, ranks) as together, locked(lone, together):
        check = None if out is None else partial(refuse_other_weights, folder, place, other)
        compared = ("tuned", "other") if isinstance(other, Target) else ()
        keeping = Keeping(folder.answers if kept else None, together, check, compared)
        named = other.name if isinstance(other, Target) else other
        asked_for: dict[str, Any] = {"against": named, "metrics": scoring.metrics, "checks": plan.names}
        asked_for |= {} if rows is None else {"rows": rows}
        settings = together.told(lambda: _settings(held_out, asked_for, keeping.name(held_out.rows)))
        if out is not None:
            together.alone(lambda: refuse_another(folder, place, other, held_out, settings))
        asked = _Asking(held_out, plan.asked(held_out), on_progress or _ignore, keeping)
        with keeping.said():
            tuned, beside = _answer_both(place, asked, other, device, store)
        seconds = {"evaluation": time.monotonic() - began}
        evaluation = build_evaluation(place.name, held_out, scoring, tuned, beside, seconds)
        how = plan, held_out, scoring, tuned, beside, evaluation, asked.more
        found = together.told(lambda: run_checks(*how, lambda: training_rows(place, held_out)))
        weights = together.told(lambda: dict(keeping.weights))
        known = {"settings": settings, "weights": weights, "memory_gib": keeping.memory_gib()}
        evaluation = replace(evaluation, checks=found, **known)
        run = folder if own and out is None else None
        evaluation = replace(evaluation, fingerprints=fingerprints(run, evaluation, held_out))
        if kept:
            together.alone(lambda: write_evaluation(folder, evaluation, held_out))
            keeping.done()
    return evaluation


def held_out_rows(place: Target, data: str | Path | None, rows: int | None, overrides: Sequence[str] = ()) -> HeldOut:
    """Finds the rows to answer; see `evaluate` for the arguments.

    Raises:
        ConfigError: nothing says which rows, or there are no held-out rows.
    """
    if data is not None and Path(data).suffix.lower() in (".yaml", ".yml"):
        recipe, own_data = Recipe.load(data), True
    else:
        recipe, own_data = _recipe_of(place), data is None
    recipe = answering(recipe, overrides)
    options, train = row_options(recipe), None
    reading = Reading.of(**recipe.data.reading_options)
    if own_data:
        load: Callable[..., LoadedData | StreamedData] = stream_data if recipe.data.streaming else load_data
        loaded = load(options=options, reading=reading, **recipe.data.load_options)
        if loaded.validation is None:
            raise ConfigError(
                "the recipe holds out no rows (data.validation and data.split are null): name rows with --data"
            )
        found: Sequence[Row] = loaded.validation
        train = loaded.train if data is None and isinstance(loaded, LoadedData) else None
        problems, name = loaded.problems, recipe.data.validation or f"{recipe.data.train_name} ({loaded.origin})"
    else:
        found, problems = load_rows(str(data), options=options, reading=reading)
        name = str(data)
    limit = rows if rows is not None else recipe.evaluation.rows
    return _sound(place, HeldOut(found if limit is None else found[:limit], problems, name, recipe, train))


def answering(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with other values. Raises: ConfigError, also for keys that say nothing about answers."""
    for word in overrides:
        key = word.partition("=")[0].strip()
        if key.partition(".")[0] in _OF_TRAINING:
            raise ConfigError(f"{key} changes nothing about rows or answers: leave it out")
    return recipe.with_overrides(overrides) if overrides else recipe


def _settings(held_out: HeldOut, asked_for: Mapping[str, Any], rows: str) -> dict[str, Any]:
    """What figures depend on besides the target: values of the recipe, those of `evaluate` among them, and the rows.

    Example: {"image.num_crops": 4, ..., "evaluation.rows": 100, ..., "rows": "9f2c..."}.
    """
    values = held_out.recipe.flat() | {f"evaluation.{name}": value for name, value in asked_for.items()}
    for key in [key for key in values if key.partition(".")[0] in (*_OF_TRAINING, "report")]:
        del values[key]
    del values["model.device"]
    return {**json.loads(to_json(values)), "rows": rows}


def _sound(place: Target, held_out: HeldOut) -> HeldOut:
    """Those of some rows that can be answered."""
    recipe, rows = held_out.recipe, held_out.rows
    processor = load_processor(place.name, **recipe.image.processor_options)
    looked = survey_rows(rows, processor, survey_options(recipe, None, decode=True, hashes=False))
    sound = rows.take(looked.kept) if isinstance(rows, Rows) else [rows[number] for number in looked.kept]
    return replace(held_out, rows=sound, problems=[*held_out.problems, *looked.problems])


def kept_rows(place: Target, recipe: Recipe) -> HeldOut:
    """The rows of `evaluation.keep`, at most 200: those that a recipe holds out, or those of a data set as they are.

    Raises: ConfigError, DataError as `held_out_rows` does; of 19 prompts none may be left out by the usual 5 %, so the
        line says which share lets these pass.
    """
    keep = recipe.evaluation.keep
    assert keep is not None
    if Path(keep).suffix.lower() in (".yaml", ".yml"):
        return held_out_rows(place, keep, KEPT_ROWS)
    own = recipe.with_overrides(KEPT_TEMPLATES)
    reading = Reading.of(**own.data.reading_options, refuse=False)
    found, problems = load_rows(keep, options=row_options(own), reading=reading)
    most, on_problem, total = reading.max_skipped, reading.on_problem, len(found) + len(problems)
    if (line := refusal(problems, total, keep, max_skipped=most, on_problem=on_problem)) is not None:
        share = math.ceil(100 * len(problems) / max(total, 1)) / 100
        more = f", or allow more here (data.max_skipped={share:g})" if found and on_problem == "skip" else ""
        raise DataError(f"evaluation.keep: {line}; or take such rows out of it{more}")
    return _sound(place, HeldOut(found[:KEPT_ROWS], problems, keep, own))


def training_rows(place: Target, held_out: HeldOut) -> Sequence[Row] | str:
    """What a target was trained on, or why there is nothing to look at."""
    if held_out.train is not None:
        return held_out.train
    if (run := run_of(place.name)) is None:
        return f"{place.name} is no run, so nothing says what it was trained on"
    data, options = run.read_recipe().data, row_options(run.read_recipe())
    if data.streaming:
        return "the training rows are a stream (data.streaming), which is not gone through again"
    try:
        return load_data(options=options, reading=Reading.of(**data.reading_options), **data.load_options).train
    except DataError as error:
        return f"the training rows cannot be read: {error}"


def _resolve_other(against: str | Path | None) -> Literal["base"] | Target | None:
    """What `evaluate` takes as `against`; what is wrong with a target's small files is said before rows are read."""
    if against in (None, "base", "none"):
        return "base" if against == "base" else None
    place = resolve_target(against)
    load_config(place.base, revision=place.revision)
    return place


def _recipe_of(place: Target) -> Recipe:
    """The recipe of the run that a target is or lies in."""
    if (run := run_of(place.name)) is not None:
        return run.recipe_for(place.name)
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


@dataclass
class _Asking:
    """What every side is asked: the evaluated rows, and for checks others.

    Attributes:
        held_out: the evaluated rows.
        beside: rows of checks.
        on_progress: called as rows are answered.
        keeping: where answers are kept meanwhile.
        more: the answers to rows of checks so far, by side and check.
    """

    held_out: HeldOut
    beside: Sequence[Asked]
    on_progress: Progress
    keeping: Keeping
    more: dict[tuple[str, str], Answers] = field(default_factory=dict)

    @property
    def needs_base(self) -> bool:
        """Whether a check asks the base."""
        return any(one.both for one in self.beside)

    def answers(self, model: Any, processor: Any, side: str, see: See) -> Answers:
        """What a side answers to the evaluated rows; its answers to others are kept in `more`."""
        rows = self.held_out.rows
        self.checks(model, processor, side, see)
        return self._ask(model, processor, rows, rows, (side, f"{side} answers"), see)

    def checks(self, model: Any, processor: Any, side: str, see: See) -> None:
        """Has a side answer the rows of checks."""
        for one in self.beside:
            if side == "tuned" or (side == "base" and one.both):
                names = f"{side}-{one.check}", f"{one.stage}, {side}"
                its = see if one.both else None  # features of grey images are not worth keeping
                self.more[side, one.check] = self._ask(model, processor, one.rows, one.taken_from, names, its)

    def _ask(
        self, model: Any, processor: Any, rows: Sequence[Row], named: Sequence[Row], names: tuple[str, str], see: See
    ) -> Answers:
        settings, (file, stage) = answer_options(self.held_out.recipe), names

        def count(done: int) -> None:
            self.on_progress(stage, done, len(rows))

        journal = self.keeping.journal(file, model, processor, named, settings)
        its: dict[str, Any] = {"see": see, "on_row": count, "journal": journal, "ranks": self.keeping.ranks}
        return answer_rows(model, processor, rows, **settings, **its)


def _answer_both(
    place: Target,
    asking: _Asking,
    against: Literal["base"] | Target | None,
    device: str | None,
    store: FeatureStore | None,
) -> tuple[Answers, Beside | None]:
    """Answers of the target, and of the other target, or of the base where it is wanted and there is one."""
    recipe = asking.held_out.recipe
    options = recipe.loading_options | {"device": own_device(device or recipe.model.device, asking.keeping.ranks)}
    if store is not None:
        store.begin()
    loaded = load_target(place.name, **options)
    see = seeing(loaded.model, store)
    base: Beside | None = None
    if holds_base(loaded.model) and (against == "base" or asking.needs_base):
        with base_weights(loaded.model):
            if against == "base":
                said = asking.answers(loaded.model, loaded.processor, "base", see)
                base = Beside(loaded.base_name, "base", said)
            else:
                asking.checks(loaded.model, loaded.processor, "base", see)
    tuned = asking.answers(loaded.model, loaded.processor, "tuned", see)
    if isinstance(against, Target) or (against == "base" and base is None and place.kind in ("run", "adapter")):
        processor = loaded.processor
        del loaded, see  # two whole models need not fit into memory
        gc.collect()
        if isinstance(against, Target):
            source = load_target(against.name, **options)
            said = asking.answers(source.model, source.processor, "other", seeing(source.model, store))
            return tuned, Beside(against.name, "target", said)
        source = _load_base_beside(place, options)
        said = asking.answers(source.model, processor, "base", seeing(source.model, store))
        base = Beside(source.base_name, "base", said)
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


def _ignore(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
