"""Answers for images that nobody has labelled: a TARGET, rows, and a file of answers.

In come a TARGET, rows that need no answers, and the name of a file; out come the file and a `Prediction`. Questions are
those of the target's run, or a prompt that is given. A row that cannot be answered ends nothing: it is in the file with
its reason. Killed and started again it ends as undisturbed. Scores nothing and prints nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi3v.data.address_guard import shorten
from phi3v.data.columns import RowOptions
from phi3v.data.judging import describe_problems
from phi3v.data.reading import Reading
from phi3v.data.rows import Rows
from phi3v.data.schema import Row, RowProblem
from phi3v.data.sources import LoadedData, StreamedData, load_data, load_rows, stream_data
from phi3v.errors import ConfigError, DataError
from phi3v.evaluation.answer_files import TableRow, check_out, journal_of, lock_of, made_of, write_table
from phi3v.evaluation.answers import Answers, answer_rows
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.journal import Journal
from phi3v.evaluation.keeping import depends_on, locked, own_device, shared
from phi3v.evaluation.run import Progress, answer_options, answering, feature_store, seeing
from phi3v.features.store import FeatureStore
from phi3v.fingerprints import name_rows
from phi3v.first_look import row_options
from phi3v.loading import LoadedTarget, load_target, resolve_device
from phi3v.ranks import Ranks
from phi3v.recipe import Recipe
from phi3v.targets import Target, resolve_target, run_of

OWN = ("source", "row", "image", "images", "question", "answer", "reason_code", "problem")
"""Columns of the file that are not the rows' own."""


@dataclass(frozen=True)
class Prediction:
    """What a prediction did.

    Attributes:
        status: "answered", or "finished" where the file was there already.
        target: what answered, as it was named.
        data: where the rows come from.
        out: the file.
        rows: rows in the file.
        answered: rows with an answer.
        well_formed: answers that have the form of the run's answer template; None where it has no fields.
        problems: the rows without, one line each.
        columns: of the file.
        seconds: how long the answers took.
    """

    status: str
    target: str
    data: str
    out: Path
    rows: int
    answered: int
    well_formed: int | None
    problems: list[str]
    columns: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "out": str(self.out)}


@dataclass(frozen=True)
class Questions:
    """Rows to answer, those that cannot be, and how.

    Attributes:
        rows: the rows.
        problems: rows that cannot be used.
        data: where they come from.
        recipe: whose lengths and batch sizes apply.
        template: what answers are read backwards with.
        several_images: whether a row has more than one.
    """

    rows: Sequence[Row]
    problems: list[RowProblem]
    data: str
    recipe: Recipe
    template: AnswerTemplate
    several_images: bool = False


def predict(
    target: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    prompt: str | None = None,
    rows: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    device: str | None = None,
    max_pixels: int | None = None,
    on_progress: Progress | None = None,
    features: FeatureStore | None = None,
    ranks: Ranks | None = None,
    overrides: Sequence[str] = (),
) -> Prediction:
    """Answers rows without labels, and writes the answers into a file.

    The file has a row for each one of the data, in its order: `source` and `row` (its number there, from 0), the
    columns that the question's templates name, `image` (or `images`, where a row has several), `answer`, a column for
    each field of the run's answer template, and `reason_code` and `problem`, which say why a row has no answer. The
    same call again goes on where an earlier one was killed, or says that the file is finished. Under torchrun each
    process takes its share of the rows, and the first one writes.

    Args:
        target: run, adapter, model folder or hub id.
        data: folder of photos, file, pattern of shards or hub id; or a recipe, whose held-out rows are asked.
        out: the file, .parquet, .csv or .jsonl.
        prompt: template of the question, "What is shown in this image?" for instance; None for that of the run, which
            a target that is no run does not have.
        rows: only the first so many rows; None for all.
        batch_size: rows that are answered at once; None as the recipe says.
        max_new_tokens: tokens of an answer at most; None as the recipe says.
        device: "auto", "cpu" or "cuda"; None as the recipe says.
        max_pixels: larger images are refused; None as the recipe says, which is 20 million where there is none.
        on_progress: called as rows are answered.
        features: as in `evaluate`.
        ranks: as in `evaluate`.
        overrides: as in `evaluate`.

    Raises:
        ConfigError: nothing says what to ask, the file is something else, or another process is writing it.
        CheckpointError, DataError: the target or the rows cannot be used.
    """
    out, place = Path(out), resolve_target(target)
    check_out(out)
    if device is not None:
        resolve_device(device)
    asked = find_questions(place, str(data), prompt, rows, max_pixels, overrides)
    settings = answer_options(asked.recipe)
    settings |= {"batch_size": batch_size} if batch_size else {}
    settings |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    where = device or asked.recipe.model.device
    with shared(where, ranks) as together, locked(lock_of(out), together):
        loaded = load_target(target, **asked.recipe.loading_options | {"device": own_device(where, together)})
        named = name_rows(asked.rows, [str(one) for one in asked.problems], stamps=True)
        how = {**settings, "template": asked.template.template}
        made = depends_on(loaded.model, loaded.processor, named, how)
        if together.told(lambda: _is_there(out, made)):
            found = together.told(lambda: made_of(out))
            return _prediction("finished", place, asked, out, found["told"], 0.0)
        journal = None
        with together.together():
            journal = Journal(journal_of(out), made) if together.first else None
        began = time.monotonic()
        answers = _answers(
            loaded, asked, settings, feature_store(asked.recipe, features), journal, on_progress, together
        )
        seconds = time.monotonic() - began
        told = {"answered": len(answers.texts) - len(answers.problems), "problems": _lines(asked, answers)}
        told |= {"well_formed": _well_formed(asked.template, answers), "columns": list(columns_of(asked))}
        together.alone(lambda: write_table(out, columns_of(asked), table_rows(asked, answers), {**made, "told": told}))
        if journal is not None:
            journal.remove()
    return _prediction("answered", place, asked, out, told, seconds)


def _answers(
    loaded: LoadedTarget,
    asked: Questions,
    settings: Mapping[str, Any],
    store: FeatureStore | None,
    journal: Journal | None,
    on_progress: Progress | None,
    ranks: Ranks,
) -> Answers:
    """The answers to all questions."""

    def count(done: int) -> None:
        if on_progress is not None:
            on_progress("answers", done, len(asked.rows))

    if store is not None:
        store.begin()
    see = seeing(loaded.model, store)
    its: dict[str, Any] = {"see": see, "on_row": count, "expected": False, "journal": journal, "ranks": ranks}
    return answer_rows(loaded.model, loaded.processor, asked.rows, **settings, **its)


def find_questions(
    place: Target,
    data: str,
    prompt: str | None,
    limit: int | None,
    max_pixels: int | None = None,
    overrides: Sequence[str] = (),
) -> Questions:
    """Finds the rows to answer; see `predict` for the arguments.

    Raises: DataError when there is none; ConfigError for a recipe that holds out no rows.
    """
    run = run_of(place.name)
    if Path(data).suffix.lower() in (".yaml", ".yml"):
        recipe = answering(Recipe.load(data), overrides)
        source, name = recipe.data.validation, recipe.data.validation or f"{recipe.data.train_name} (held out)"
    else:
        plain = {"model": {"name": place.base, "revision": place.revision}, "data": data}
        recipe = answering(Recipe.from_dict(plain) if run is None else run.recipe_for(place.name), overrides)
        source, name = data, data
    if max_pixels is not None:
        recipe = recipe.with_overrides([f"image.max_pixels={max_pixels}"])
    options = replace(row_options(recipe), answered=False)
    if prompt is not None:
        options = replace(options, prompt=prompt, format="columns")
    reading = Reading.of(**recipe.data.reading_options | {"max_skipped": 1.0, "on_problem": "skip"})
    rows: Sequence[Row]
    problems: list[RowProblem] = []
    try:
        if source is not None:
            rows, problems = load_rows(source, options=options, reading=reading)
        else:
            rows = held_out_questions(recipe, options, reading)
    except DataError as error:
        if prompt is None and run is None and str(error).startswith("data.prompt"):
            raise DataError(f"{error}; or say what to ask with --prompt") from error
        raise
    return _first(Questions(rows, problems, name, recipe, AnswerTemplate(recipe.data.answer)), limit)


def held_out_questions(recipe: Recipe, options: RowOptions, reading: Reading) -> Sequence[Row]:
    """The rows that a recipe splits off its training rows, as questions. Raises: ConfigError for none."""
    load: Callable[..., LoadedData | StreamedData] = stream_data if recipe.data.streaming else load_data
    found = load(options=options, reading=reading, **recipe.data.load_options).validation
    if found is None:
        raise ConfigError("the recipe holds out no rows (data.validation and data.split are null): name a file of rows")
    return found


def _first(asked: Questions, limit: int | None) -> Questions:
    """The questions in the order of the data, the first so many rows, those with problems counted.

    Raises: DataError when no row can be asked.
    """
    looked = [(row.source, row.index, len(row.images)) for row in asked.rows]
    order = _source_order(asked)
    keys = [(order[source], row) for source, row, _ in looked]
    wrong = sorted(asked.problems, key=lambda problem: (order[problem.source], problem.row))
    last = sorted([*keys, *((order[one.source], one.row) for one in wrong)])[:limit][-1:]
    kept = [at for at in sorted(range(len(keys)), key=keys.__getitem__) if [keys[at]] <= last]
    rows: Sequence[Row] = [asked.rows[at] for at in kept] if not isinstance(asked.rows, Rows) else asked.rows.take(kept)
    problems = [one for one in wrong if [(order[one.source], one.row)] <= last]
    if not rows:
        raise DataError(f"{describe_problems(problems, len(problems), asked.data)}; so there is nothing to answer")
    return replace(asked, rows=rows, problems=problems, several_images=any(looked[at][2] > 1 for at in kept))


def _source_order(asked: Questions) -> dict[str, int]:
    """Places of the files in the data: a.csv, of which no row can be asked, and b.csv -> {"a.csv": 0, "b.csv": 1}."""
    sources = asked.rows.sources if isinstance(asked.rows, Rows) else [row.source for row in asked.rows]
    named = dict.fromkeys([*sources, *(problem.source for problem in asked.problems)])
    return {source: number for number, source in enumerate(named)}


def columns_of(asked: Questions) -> dict[str, type]:
    """The columns of the file, with the types of their values.

    Example: prompt "What does {brand} show?", answer "{title} for {price}" -> source, row, brand, image, question,
    answer, title, price, reason_code, problem. A name that is taken gets a prefix: a field `brand` of the answer is
    `answer.brand`.
    """
    own = [name for name in OWN if name != ("image" if asked.several_images else "images")]
    data, fields = _own_names(asked)
    kinds: dict[str, type] = {"row": int, "images": list}
    order = [*own[:2], *data, *own[2:-2], *fields, *own[-2:]]
    return {name: kinds.get(name, str) for name in order}


def _own_names(asked: Questions) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the file of the rows' columns and of the answer's fields -> their names there."""
    data = {f"data.{name}" if name in OWN else name: name for name in asked.rows[0].fields}
    fields = asked.template.fields if _has_fields(asked.template) else ()
    taken = {*OWN, *data}
    return data, {f"answer.{name}" if name in taken else name: name for name in fields}


def _has_fields(template: AnswerTemplate) -> bool:
    """Whether there is more in an answer than one field: "{title}, {price}" -> True, "{answer}" -> False."""
    return template.separable and template.template != f"{{{template.fields[0]}}}"


def table_rows(asked: Questions, answers: Answers) -> Iterator[TableRow]:
    """The rows of the file, those with problems at their places.

    Example: {"source": "shop.csv", "row": 3, "image": "a.jpg", "question": "What is it?", "answer": "Scarf for 470",
    "title": "Scarf", "price": "470", "reason_code": None, "problem": None}; of a row that cannot be asked source, row,
    reason_code and problem, and the images that it names.
    """
    order = _source_order(asked)
    waiting = deque(asked.problems)
    columns = columns_of(asked)
    data, fields = _own_names(asked)
    for at, row in enumerate(asked.rows):
        while waiting and (order[waiting[0].source], waiting[0].row) < (order[row.source], row.index):
            yield _problem_row(asked, waiting.popleft())
        images = [shorten(image.url) if image.url else image.path for image in row.images]
        found: TableRow = dict.fromkeys(columns) | {"source": row.source, "row": row.index, "question": row.question}
        found |= _of_images(columns, images)
        found |= {name: row.fields.get(column) for name, column in data.items()}
        if at in answers.problems:
            found |= {"reason_code": answers.reasons.get(at), "problem": _reason(row, answers.problems[at])}
        else:
            found |= {"answer": answers.texts[at]}
        parsed = asked.template.parse(answers.texts[at]) if fields and at not in answers.problems else None
        yield found | ({name: parsed[field] for name, field in fields.items()} if parsed else {})
    yield from (_problem_row(asked, one) for one in waiting)


def _problem_row(asked: Questions, problem: RowProblem) -> TableRow:
    """A row that nobody could ask about, with the images that it names."""
    told = {"source": problem.source, "row": problem.row}
    told |= {"reason_code": problem.reason_code, "problem": problem.message}
    named = asked.rows.images_named(problem.source, problem.row) if isinstance(asked.rows, Rows) else []
    columns = columns_of(asked)
    return dict.fromkeys(columns) | told | _of_images(columns, named)


def _of_images(columns: Mapping[str, type], images: Sequence[str | None]) -> TableRow:
    """The images of a row in the columns that are there; what has no name is nothing, or in a list an empty text."""
    if "images" in columns:
        return {"images": [image or "" for image in images]}
    return {"image": images[0] if images else None}


def _reason(row: Row, problem: str) -> str:
    """A problem without the row's name in front."""
    return problem.removeprefix(f"{row.source}, row {row.index}: ")


def _lines(asked: Questions, answers: Answers) -> list[str]:
    """All rows without an answer, one line each, those that were found while answering last."""
    found = [(asked.rows[at], problem) for at, problem in sorted(answers.problems.items())]
    told = [f"{row.source}, row {row.index}: {_reason(row, problem)}" for row, problem in found]
    return [*map(str, asked.problems), *told]


def _well_formed(template: AnswerTemplate, answers: Answers) -> int | None:
    """Answers that the template can be read out of; None where it has no fields."""
    if not _has_fields(template):
        return None
    return sum(template.parse(text) is not None for at, text in enumerate(answers.texts) if at not in answers.problems)


def _is_there(out: Path, made: Mapping[str, Any]) -> bool:
    """Whether the file was made of the same before. Raises: ConfigError where it was made of something else."""
    found = made_of(out)
    if found is None:
        return False
    if changed := [name for name in made if found.get(name) != made[name]]:
        raise ConfigError(
            f"--out {out} holds answers of other {' and '.join(changed)}: name another file, or remove it"
        )
    return True


def _prediction(
    status: str, place: Target, asked: Questions, out: Path, told: Mapping[str, Any], seconds: float
) -> Prediction:
    """What is told of a file that is there."""
    total = len(asked.rows) + len(asked.problems)
    return Prediction(status, place.name, asked.data, out, total, seconds=seconds, **told)
