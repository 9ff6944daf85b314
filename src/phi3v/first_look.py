"""From a recipe to rows that can be used: the look that training, evaluation and `phi3v data check` share.

In comes a recipe, and a processor where tokens are counted; out come the rows of its section `data`, looked at closely
(`data.survey`): every image is decoded once and every row measured before a step is taken, so that none can stop a run
half way. Loads no model and writes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi3v.data.columns import RowOptions
from phi3v.data.schema import Row, RowProblem
from phi3v.data.sources import MAX_PROBLEM_SHARE, LoadedData, describe_problems, load_data
from phi3v.data.survey import RowFacts, SurveyOptions, survey, too_long
from phi3v.errors import DataError
from phi3v.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with a stage, the rows done and the rows in all."""


@dataclass(frozen=True)
class Surveyed:
    """Rows that were looked at closely.

    Attributes:
        kept: positions of the rows that can be used.
        facts: what is known of each row, too long ones among them; every row once however often it is repeated.
        problems: the rows that cannot be used, every row once.
    """

    kept: list[int]
    facts: list[RowFacts]
    problems: list[RowProblem]


def open_data(recipe: Recipe) -> LoadedData:
    """The rows that a recipe names, by their headers.

    Raises: DataError for a set that cannot be read, or when more rows cannot be used than the recipe allows.
    """
    options = RowOptions(**recipe.data.row_options, max_pixels=recipe.image.max_pixels)
    return load_data(options=options, **recipe.data.load_options)


def survey_options(recipe: Recipe, *, decode: bool = True, hashes: bool = False) -> SurveyOptions:
    """How closely a recipe's rows are looked at."""
    return SurveyOptions(decode=decode, hash_images=hashes, max_pixels=recipe.image.max_pixels)


def survey_rows(
    rows: Sequence[Row],
    processor: Any | None,
    options: SurveyOptions,
    *,
    max_length: int | None = None,
    stage: str = "looking at the rows",
    on_progress: Progress | None = None,
) -> Surveyed:
    """Looks at every row once, even where weights repeat it; more than `max_length` tokens are a problem.

    Example: rows a, b, a of which b is too long -> kept [0, 2], facts of a, the problem of b.
    """
    places: list[int] = []  # for each position a number that equal rows share
    distinct = survey(_first_times(rows, places), processor, options)
    facts, problems, bad = [], [], set()
    for number, found in enumerate(distinct):
        if isinstance(found, RowFacts):
            facts.append(found)
        problem = found if isinstance(found, RowProblem) else too_long(found, max_length)
        if problem is not None:
            problems.append(problem)
            bad.add(number)
        if on_progress is not None and number % 64 == 0:
            on_progress(stage, len(places), len(rows))
    if on_progress is not None and len(rows):
        on_progress(stage, len(rows), len(rows))
    return Surveyed([position for position, number in enumerate(places) if number not in bad], facts, problems)


def _first_times(rows: Iterable[Row], places: list[int]) -> Iterator[Row]:
    """The rows that were not there before; `places` gets the number of the distinct row of each."""
    known: dict[int, int] = {}
    for row in rows:
        key = hash((row.source, row.index, row.messages, row.images))
        if key not in known:
            known[key] = len(known)
            places.append(known[key])
            yield row
        else:
            places.append(known[key])


def usable_rows(
    recipe: Recipe, data: LoadedData, processor: Any, context: int, *, on_progress: Progress | None = None
) -> LoadedData:
    """The rows that become samples; the others are problems.

    Args:
        recipe: whose limits apply.
        data: what `open_data` found.
        processor: a Phi3VProcessor.
        context: the longest row that the model takes, in tokens.
        on_progress: called as rows are looked at.
    Raises: DataError when more rows cannot be used than the recipe allows.
    """
    options, longest = survey_options(recipe), recipe.data.max_length or context
    train = survey_rows(data.train, processor, options, max_length=longest, on_progress=on_progress)
    problems = [*data.problems, *train.problems]
    validation = data.validation
    if validation is not None:
        held_out = survey_rows(
            validation,
            processor,
            options,
            max_length=longest,
            stage="looking at the held-out rows",
            on_progress=on_progress,
        )
        problems += held_out.problems
        validation = validation.take(held_out.kept)
    refuse_too_many(problems, len(data.train) + len(data.validation or []) + len(data.problems), str(recipe.data.train))
    return replace(data, train=data.train.take(train.kept), validation=validation, problems=problems)


def refuse_too_many(problems: Sequence[RowProblem], total: int, source: str) -> None:
    """Raises: DataError when more rows are left out than the recipe allows."""
    if len(problems) > MAX_PROBLEM_SHARE * total:
        raise DataError(
            f"{describe_problems(problems, total, source)}; at most {MAX_PROBLEM_SHARE:.0%} may be left out: mend the "
            "data, or the columns in the recipe"
        )
