"""From a recipe to rows that can be used: the look that training and the commands of `phi3v data` share.

In comes a recipe, and a processor where tokens are counted; out come the rows of its section `data`, each one measured
before a step is taken (`data.survey`), so that none that is too long or cannot be cut into crops reaches a model. Loads
no weights and writes nothing.
"""

import contextlib
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Self

from phi3v.data.columns import RowOptions
from phi3v.data.fact_table import FactTable
from phi3v.data.image_cache import FetchFailure
from phi3v.data.judging import StreamTally, counted, describe_problems, refusal, unused_set
from phi3v.data.mixing import SetUse
from phi3v.data.not_read import NotRead
from phi3v.data.reading import Reading
from phi3v.data.rows import Rows
from phi3v.data.schema import Row, RowProblem
from phi3v.data.sources import LoadedData, StreamedData, load_data, stream_data
from phi3v.data.streaming import interleaved
from phi3v.data.survey import RowFacts, SurveyOptions, survey, too_long_problem
from phi3v.errors import ConfigError, DataError, NoUsableRowError
from phi3v.recipe import Recipe

HELD_OUT = "looking at the held-out rows"
"""The stage of validation rows."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, the rows done and the rows in all."""


@dataclass(frozen=True)
class Surveyed:
    """Rows that were looked at closely.

    Attributes:
        kept: positions of the rows that can be used.
        facts: what is known of each row, too long ones among them; every row once however often it is repeated.
        problems: the rows that cannot be used, every row once.
        lengths: tokens of each kept row, and the limit for one that is made to fit it.
    """

    kept: list[int]
    facts: Sequence[RowFacts]
    problems: list[RowProblem]
    lengths: list[int]


@dataclass(frozen=True)
class MeasuredData(LoadedData):
    """Rows whose lengths are known.

    Attributes:
        lengths: tokens of each training row, see `Surveyed`.
    """

    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RowUse:
    """How many rows a run uses, and why others are left out.

    Example: "2736 rows to train on, 304 held out; 12 left out (8 url_gone, 4 missing_value)" are
    RowUse(train=2736, held_out=304, left_out=12, reasons={"url_gone": 8, "missing_value": 4}, samples_per_step=16).
    `not_drawn` are good rows that no epoch has, because of weights or `data.max_rows`.
    """

    train: int
    held_out: int
    left_out: int
    reasons: dict[str, int]
    samples_per_step: int
    not_drawn: int = 0

    @classmethod
    def of(cls, data: LoadedData, samples_per_step: int) -> Self:
        """The counts of loaded data."""
        reasons = dict(Counter(problem.reason_code for problem in data.problems).most_common())
        counts = (len(data.train), len(data.validation or []), len(data.problems))
        return cls(*counts, reasons, samples_per_step, sum(one.left_out for one in data.sets))

    @property
    def repeated(self) -> int:
        """How many rows an epoch takes once more, to make its last step whole: 92 of 8 rows in a step of 100."""
        return -self.train % self.samples_per_step


def row_options(recipe: Recipe) -> RowOptions:
    """How the records of a recipe become rows."""
    return RowOptions(**recipe.data.row_options, max_pixels=recipe.image.max_pixels)


def open_data(
    recipe: Recipe,
    *,
    download: bool = True,
    refuse: bool = True,
    failures: Mapping[str, FetchFailure] | None = None,
    on_progress: Progress | None = None,
) -> LoadedData:
    """The rows that a recipe names, by the headers of their images.

    Args:
        recipe: whose section `data`.
        download: False downloads no image: addresses that are not cached are listed.
        refuse: False takes a set however many of its rows cannot be used, and says so in `LoadedData.refusal`.
        failures: web address -> why it could not be downloaded just now.
        on_progress: called as images are downloaded.
    Raises: DataError for a set that cannot be read, or when more rows cannot be used than the recipe allows;
        ConfigError for a recipe that streams.
    """
    if recipe.data.streaming:
        raise ConfigError("data.streaming reads rows as they come, and here all are looked at: set it to false")
    options = row_options(recipe)
    on_fetch = None if on_progress is None else lambda done, total: on_progress("downloading images", done, total)
    how: dict[str, Any] = {"download": download, "refuse": refuse, "failures": failures or {}, "on_fetch": on_fetch}
    reading = Reading.of(**recipe.data.reading_options, **how)
    return load_data(options=options, reading=reading, **recipe.data.load_options)


STREAM_SAMPLE = 1000
"""Records of a stream that are looked at: the first ones, in the order of the sets, rows and problems together."""

_ASKED_FIRST = 100
"""Rows of a stream that may turn out to be too long or too narrow before the first good one."""


@dataclass(frozen=True)
class FoundRows:
    """Rows to look at, none of which has been refused yet; the attributes are those of `LoadedData`.

    Attributes:
        sampled: whether these are the first rows of a stream, and not all.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    problems: list[RowProblem]
    origin: str
    rows_in: int
    not_cached: list[str]
    refusal: str | None = None
    sampled: bool = False
    sets: Sequence[SetUse] = ()
    not_read: Sequence[NotRead] = ()


def find_rows(
    recipe: Recipe,
    *,
    download: bool,
    failures: Mapping[str, FetchFailure] | None = None,
    on_progress: Progress | None = None,
) -> FoundRows:
    """The rows of a recipe, however many of them cannot be used; of a stream the first `STREAM_SAMPLE` records, one
    pass at most.

    Args:
        recipe: whose section `data`.
        download: whether images are downloaded.
        failures: web address -> why it could not be downloaded just now.
        on_progress: called as images are downloaded.
    Raises: DataError for a set that cannot be read at all.
    """
    if not recipe.data.streaming:
        data = open_data(recipe, download=download, refuse=False, failures=failures, on_progress=on_progress)
        return FoundRows(
            data.train,
            data.validation or [],
            data.problems,
            data.origin,
            data.rows_in,
            data.not_cached,
            data.refusal,
            sets=data.sets,
            not_read=data.not_read,
        )
    how = recipe.data.reading_options | {"max_skipped": 1.0, "on_problem": "skip"}
    options = row_options(recipe)
    reading = Reading.of(**how, download=download, refuse=False, failures=failures or {})
    try:
        stream = stream_data(options=options, reading=reading, **recipe.data.load_options)
    except NoUsableRowError:  # none to hold out either: the problems are told by what follows
        stream = stream_data(options=options, reading=reading, **recipe.data.load_options | {"validation_split": None})
    held_from = Counter(number for number, *_ in stream.train.held_out)
    looks = [StreamTally(one.map.source, seen=held_from[place]) for place, one in enumerate(stream.train.sets)]
    rows, problems = list[Row](), list[RowProblem]()

    def note(number: int, problem: RowProblem) -> None:
        problems.append(problem)
        looks[number].seen += 1
        looks[number].note(problem)
        if _looked_at(looks) >= STREAM_SAMPLE:
            raise _SampleTaken

    passes = [_rows_alone(rows) for rows in stream.train.passes(note)]
    with contextlib.suppress(_SampleTaken):
        for number, row in interleaved(passes, stream.train.weights):
            looks[number].seen += 1
            looks[number].usable += 1
            rows.append(row)
            if _looked_at(looks) >= STREAM_SAMPLE:
                break
    held_out = stream.validation or []
    absent = [image.url for row in [*rows, *held_out] for image in row.images if image.path is None]
    not_cached = list(dict.fromkeys(url for url in absent if url is not None))
    limits = (recipe.data.max_skipped, recipe.data.on_problem)
    refused = next((str(error) for look in looks if (error := look.refusal(*limits)) is not None), None)
    if refused is None and _looked_at(looks) < STREAM_SAMPLE:  # all sets were read to their end
        refused = next((line for look in looks if (line := _unused(recipe, look, len(looks) == 1))), None)
    if stream.origin == "validation":  # of a split the same problems come by once more
        total, name = len(held_out) + len(stream.problems), str(recipe.data.validation)
        held_back = refusal(stream.problems, total, name, max_skipped=limits[0], on_problem=limits[1])
        problems, refused = [*stream.problems, *problems], held_back or refused
    total = len(rows) + len(held_out) + len(problems)
    found = FoundRows(rows, held_out, problems, stream.origin, total, not_cached, refused, sampled=True)
    return replace(found, not_read=stream.not_read)


def _looked_at(looks: Iterable[StreamTally]) -> int:
    """Records of a stream that count as looked at: neither held out, nor left out for a held-out image."""
    return sum(look.usable + look.faults for look in looks)


def _unused(recipe: Recipe, look: StreamTally, alone: bool) -> str | None:
    """Why a set that was read to its end cannot be trained on; None when it has a row that can."""
    if look.usable:
        return None
    if alone and not (look.faults or look.shared) and (line := _none_left(recipe)) is not None:
        return line
    return look.nothing_left()


def _none_left(recipe: Recipe) -> str | None:
    """Why a stream without problems has no row to train on: all are held out; None where no rows are split off."""
    if recipe.data.split is None or recipe.data.validation is not None:
        return None
    asked = f"data.split.validation asks for {recipe.data.split.validation} rows, and the sets have no more"
    return f"{asked}: no row is left to train on: lower it, or give data.validation"


def _rows_alone(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a set as long as some come: of one that has none the problems have been noted."""
    with contextlib.suppress(NoUsableRowError):
        yield from rows


class _SampleTaken(Exception):
    """So many records of a stream were looked at as are wanted."""


def survey_options(recipe: Recipe, context: int | None, *, decode: bool, hashes: bool) -> SurveyOptions:
    """How closely a recipe's rows are looked at; `context` is the model's longest row, where that plays a part."""
    return SurveyOptions(
        decode=decode,
        hash_images=hashes,
        train_on=recipe.data.train_on,
        max_pixels=recipe.image.max_pixels,
        max_length=None if context is None else recipe.data.longest(context),
        on_too_long=recipe.data.on_too_long,
    )


def survey_rows(
    rows: Sequence[Row],
    processor: Any | None,
    options: SurveyOptions,
    *,
    stage: str = "looking at the rows",
    on_progress: Progress | None = None,
) -> Surveyed:
    """Looks at every row once, even where weights repeat it.

    Example: rows a, b, a of which b is too long -> kept [0, 2], facts of a and b, the problem of b.
    """
    distinct, places = rows.distinct() if isinstance(rows, Rows) else _distinct(rows)
    facts, problems, bad, tokens = FactTable(), [], set(), array("q")
    limit = options.max_length or sys.maxsize
    for number, found in enumerate(survey(distinct, processor, options)):
        tokens.append(0)
        if isinstance(found, RowFacts):
            facts.add(found)
            tokens[number] = min(found.length.total, limit) if found.length is not None else 0
        problem = found if isinstance(found, RowProblem) else too_long_problem(found)
        if problem is not None:
            problems.append(problem)
            bad.add(number)
        if on_progress is not None and number % 64 == 0:
            on_progress(stage, number + 1, len(distinct))
    if on_progress is not None and len(distinct):
        on_progress(stage, len(distinct), len(distinct))
    kept = [position for position, number in enumerate(places) if number not in bad]
    return Surveyed(kept, facts, problems, [tokens[places[position]] for position in kept])


def survey_data(
    data: LoadedData | FoundRows, processor: Any | None, options: SurveyOptions, *, on_progress: Progress | None = None
) -> tuple[Surveyed, Surveyed, list[RowProblem]]:
    """Looks at all rows of a recipe. Returns: training rows, held-out rows, and the problems of the whole, in order."""
    train = survey_rows(data.train, processor, options, on_progress=on_progress)
    held_out = survey_rows(data.validation or [], processor, options, stage=HELD_OUT, on_progress=on_progress)
    problems = [*data.problems, *train.problems, *held_out.problems]
    return train, held_out, sorted(problems, key=lambda problem: (problem.source, problem.row))


def _distinct(rows: Iterable[Row]) -> tuple[list[Row], list[int]]:
    """As `Rows.distinct`, of rows in memory."""
    known: dict[int, int] = {}
    distinct, places = [], []
    for row in rows:
        key = hash((row.source, row.index, row.messages, row.images))
        if key not in known:
            known[key] = len(known)
            distinct.append(row)
        places.append(known[key])
    return distinct, places


def find_refusal(
    recipe: Recipe, data: LoadedData | FoundRows, problems: Sequence[RowProblem], kept: Sequence[int]
) -> str | None:
    """Why a recipe's rows are not trained on, in one line; None when they are. `check` and `train` both ask here.

    Each set is judged by itself, then all rows together, and of each set one row to train on must be left.

    Args:
        recipe: whose limits apply.
        data: what was found; `problems` are all rows that are left out, `kept` positions of those to train on.
    """
    name, limits = recipe.data.train_name, (recipe.data.max_skipped, recipe.data.on_problem)
    counting = counted(problems, streamed=isinstance(data, FoundRows) and data.sampled)
    line = data.refusal or refusal(counting, data.rows_in, name, max_skipped=limits[0], on_problem=limits[1])
    if line is None and not kept:
        line = f"{describe_problems(problems, data.rows_in, name)}; no row is left to train on: mend the data"
    if line is None and isinstance(data.train, Rows):
        line = unused_set(data.sets, {data.train.set_numbers[position] for position in kept}, problems)
    return line


def measured_rows(
    recipe: Recipe, data: LoadedData, processor: Any, context: int, *, on_progress: Progress | None = None
) -> MeasuredData:
    """The rows whose samples the model can take, by headers and text; the others are problems.

    Args:
        recipe: whose limits apply.
        data: what `open_data` found.
        processor: a Phi3VProcessor.
        context: the longest row that the model takes, in tokens.
        on_progress: called as rows are looked at.
    Raises: DataError as `find_refusal` says.
    """
    options = survey_options(recipe, context, decode=False, hashes=False)
    train, held_out, problems = survey_data(data, processor, options, on_progress=on_progress)
    if (line := find_refusal(recipe, data, problems, train.kept)) is not None:
        raise DataError(line)
    validation = None if data.validation is None else data.validation.take(held_out.kept)
    found = replace(data, train=data.train.take(train.kept), validation=validation, problems=problems)
    return MeasuredData(**vars(found), lengths=train.lengths)


def refuse_bad_stream(recipe: Recipe, data: StreamedData, processor: Any, context: int) -> None:
    """Takes rows of each set of a stream until one can be trained on, by header and text: of a sound set that is one.

    Args:
        recipe: whose limits apply.
        data: what `stream_data` found.
        processor: a Phi3VProcessor.
        context: the longest row that the model takes, in tokens.
    Raises: DataError with the reasons when of a set none of 1,000 records is usable, or none of 100 rows fits.
    """
    options = survey_options(recipe, context, decode=False, hashes=False)
    looks = [StreamTally(records.map.source) for records in data.train.sets]

    def note(number: int, problem: RowProblem) -> None:
        looks[number].seen += 1
        looks[number].note(problem)

    stop = recipe.data.on_problem == "stop"
    for number, (look, rows) in enumerate(zip(looks, data.train.passes(note), strict=True)):
        for row in islice(rows, _ASKED_FIRST):
            found = survey_rows([row], processor, options)
            look.usable += len(found.kept)
            look.seen += len(found.kept)
            for problem in found.problems:
                note(number, problem)
            if found.kept or stop:
                break
        if not look.usable or (look.faults and stop):
            error = look.refusal(recipe.data.max_skipped, recipe.data.on_problem)
            raise error or DataError(_unused(recipe, look, len(looks) == 1) or f"{look.source} has no rows")
