"""From the names of data sets to rows: training and validation rows, and the problems of what is left out.

In come sources and options named as in the recipe's section `data`; out come `Rows`. Sets are opened by `opening`,
images behind web addresses downloaded once by `fetch`, records read by `rows`. Rows count from 0 as their source does,
those of several files in each file.

Validation rows: `validation` where it is given; else the sets' own `validation`, `valid`, `val`, `dev` or `test`, when
each set has one; else rows split off `train`.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.data.address_guard import AllowedHosts
from phi3v.data.cells import Cells
from phi3v.data.columns import RowOptions
from phi3v.data.conversations import record_map
from phi3v.data.fetch import fetch_images
from phi3v.data.judging import describe_problems, refusal, shared_image_problem
from phi3v.data.kept_keys import KeptKeys
from phi3v.data.mixing import SetUse, mix, set_uses
from phi3v.data.not_read import NotRead, unnamed
from phi3v.data.opening import VALIDATION_NAMES, narrowed, open_set
from phi3v.data.photo_tables import PhotosTable
from phi3v.data.reading import Reading
from phi3v.data.rows import FirstLook, RecordSet, Rows, look_again, read_rows
from phi3v.data.schema import Row, RowProblem
from phi3v.data.set_choice import SetChoice, choices_of, weights_of
from phi3v.data.split import split_rows
from phi3v.data.streaming import RowStream, interleaved
from phi3v.data.tables import OpenedTable
from phi3v.errors import DataError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedData:
    """What a recipe's section `data` names.

    Attributes:
        train: rows to train on; with weights as often as an epoch has them.
        validation: rows held out; None when there are none.
        problems: the rows of both that were left out.
        origin: where the validation rows come from: "validation" (given, or the set's own), "test" or another own
            split, "split" (held out of train), or "none".
        rows_in: rows read, of all sets. Without weights and max_rows it is the number of training rows, validation
            rows and problems together.
        not_cached: web addresses of images that are still to be downloaded, each once.
        refusal: why a set is refused, with `Reading.refuse` False; else None.
        sets: what an epoch holds of each set of training rows.
        not_read: what lies beside the files that were read, and splits that nobody asked for.
    """

    train: Rows
    validation: Rows | None
    problems: list[RowProblem]
    origin: str
    rows_in: int = 0
    not_cached: list[str] = field(default_factory=list)
    refusal: str | None = None
    sets: list[SetUse] = field(default_factory=list)
    not_read: list[NotRead] = field(default_factory=list)


def load_data(
    train: str | Sequence[Mapping[str, Any]],
    *,
    options: RowOptions,
    validation: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    validation_split: float | None = 0.1,
    split_seed: int = 0,
    max_rows: int | None = None,
    reading: Reading | None = None,
) -> LoadedData:
    """Training and validation rows.

    Args:
        train: folder, file, pattern of shards or hub id; or several as mappings {"source": ...} with, as they need it,
            a "weight", "revision", "subset" and any field of RowOptions, which then hold for that set.
        options: shape, columns, templates and limits, where a set has none of its own.
        validation: the same as a source of `train` for validation rows; None to look for a split of `train`'s own.
        revision: of the hub data sets.
        subset: configuration of the hub data sets.
        validation_split: number of rows (int) or share (float) to hold out of train when there are no other validation
            rows; None to hold out none. `split.split_rows` says which.
        split_seed: another seed holds out other rows, and repeats others where weights do.
        max_rows: train on the first so many rows only; with weights on so many, divided as they say.
        reading: downloads, and how many rows may be left out.
    Raises: DataError in one line.
    """
    how = reading or Reading()
    wanted = choices_of(train, options, revision, subset)
    weights = weights_of(wanted)
    parts, held, origin = _open_sets(wanted, validation, how)
    splitting = not held and validation_split is not None
    looks = _look([*parts, *held], how, with_keys=splitting)
    rows = _joined(looks[: len(parts)])
    held_out = _joined(looks[len(parts) :]) if held else None
    shared: list[RowProblem] = []
    if splitting and not rows:
        raise DataError(_none_usable(looks))
    if splitting and validation_split is not None:
        keys = KeptKeys(key for look in looks for key in look.keys)
        split = split_rows(keys, validation_split, split_seed)
        shared = [shared_image_problem(row.source, row.index) for row in rows.take(split.left_out)]
        rows, held_out, origin = rows.take(split.train), rows.take(split.validation), "split"
    numbers = rows.set_numbers
    epoch: Sequence[int] = range(len(rows))[:max_rows]
    if weights is not None:
        epoch = mix(numbers, len(parts), weights, split_seed, max_rows)
    return LoadedData(
        train=rows.take(epoch),
        validation=held_out,
        problems=[*(problem for look in looks for problem in look.problems), *shared],
        origin=origin,
        rows_in=sum(len(part.table) for part in [*parts, *held]),
        not_cached=list(dict.fromkeys(url for look in looks for url in look.not_cached)),
        refusal=next((line for look in looks if (line := _set_refusal(look, how)) is not None), None),
        sets=set_uses([part.map.source for part in parts], numbers, epoch),
        not_read=unnamed([part.not_read for part in [*parts, *held]], {name for look in looks for name in look.named}),
    )


@dataclass(frozen=True)
class StreamedData:
    """What a recipe's section `data` names, for streaming.

    Attributes:
        train: rows to train on, without an end.
        validation: rows held out; None when there are none.
        problems: the rows left out so far: those of the validation set, and those before the last row held out.
        origin: "validation" (given), "split" (the first rows), or "none".
        not_read: what lies beside the files that are read, photos left out, which rows to come may name.
    """

    train: RowStream
    validation: Sequence[Row] | None
    problems: list[RowProblem]
    origin: str
    not_read: list[NotRead] = field(default_factory=list)


def stream_data(
    train: str | Sequence[Mapping[str, Any]],
    *,
    options: RowOptions,
    validation: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    validation_split: float | None = None,
    split_seed: int = 0,
    max_rows: int | None = None,
    reading: Reading | None = None,
) -> StreamedData:
    """Training rows as they come, and validation rows in memory.

    Args:
        train: as in `load_data`; every set of several needs a weight, which says how often its rows come.
        options: as in `load_data`.
        validation: a set that is read whole.
        revision: of the hub data sets.
        subset: configuration of the hub data sets.
        validation_split: where no `validation` is given, so many of the first rows are held out; None for none.
        split_seed: of the order.
        max_rows: refused: a stream is stopped by steps.
        reading: downloads, and how many rows may be left out.
    Raises: DataError in one line.
    """
    how = reading or Reading()
    wanted = choices_of(train, options, revision, subset)
    weights = weights_of(wanted) or [1.0]
    if len(weights) < len(wanted):
        raise DataError("data.train: with data.streaming each of several sets needs a weight")
    if max_rows is not None:
        raise DataError("data.max_rows is for sets that are read whole: with data.streaming set training.max_steps")
    opened = _training_sets(wanted, how, streaming=True)
    parts = [_with_others(*one, choice.source) for one, choice in zip(opened, wanted, strict=True)]
    not_read = unnamed([[one for one in part.not_read if not one.by_rows] for part in parts], set())
    stream = RowStream(
        parts,
        weights,
        seed=split_seed,
        limits=how.limits,
        download=how.download,
        max_skipped=how.max_skipped,
        on_problem=how.on_problem,
    )
    problems: list[RowProblem] = []
    if validation is not None:
        look = _look_at_validation(replace(wanted[0], source=validation), how)
        return StreamedData(stream.without(look.rows), look.rows, look.problems, "validation", not_read)
    if validation_split is None:
        return StreamedData(stream, None, problems, "none", not_read)
    passes = stream.passes(lambda _, problem: problems.append(problem))
    first = list(islice(interleaved(passes, weights), int(validation_split)))
    if len(first) < int(validation_split):
        raise DataError(f"data.split.validation asks for {validation_split} rows, and the sets have fewer: lower it")
    rows = [row for _, row in first]
    known = ((number, row.source, row.index) for number, row in first)
    return StreamedData(stream.without(rows, known), rows, problems, "split", not_read)


def load_rows(
    source: str,
    *,
    options: RowOptions,
    revision: str | None = None,
    subset: str | None = None,
    reading: Reading | None = None,
) -> tuple[Rows, list[RowProblem]]:
    """All rows of one set: of its only split, else of its own validation or test split.

    Args:
        source: folder, file, pattern of shards or hub id.
        options: shape, columns, templates and limits.
        revision: of a hub data set.
        subset: configuration of a hub data set.
        reading: downloads, and how many rows may be left out.
    Raises: DataError in one line.
    """
    look = _look_at_validation(SetChoice(source, options, None, revision, subset), reading or Reading())
    return look.rows, look.problems


def _open_sets(
    wanted: Sequence[SetChoice], validation: str | None, how: Reading
) -> tuple[list[RecordSet], list[RecordSet], str]:
    """The sets to train on, those of validation rows, and where the latter come from.

    There are none of the latter when rows have to be split off, or are not wanted.
    """
    opened = _training_sets(wanted, how)
    names = [next((split for split in VALIDATION_NAMES if split in others), "") for _, others in opened]
    if validation is not None or not all(names):
        names = []
    held: list[RecordSet] = []
    for (_, others), choice, own in zip(opened, wanted, names, strict=False):
        held.append(_records(others.pop(own), f"{choice.source} ({own})", choice, how))
    if validation is not None:
        held = [_validation_records(replace(wanted[0], source=validation), how)]
    read = {file.resolve() for records in held for file in records.files}
    parts = [_with_others(*one, choice.source, read) for one, choice in zip(opened, wanted, strict=True)]
    return parts, held, "validation" if validation is not None else names[0] if names else "none"


def _with_others(
    part: RecordSet, others: Mapping[str, OpenedTable], source: str, read: Collection[Path] = ()
) -> RecordSet:
    """A set whose other splits are among what is not read, unless their files are."""
    reason = "a split that is neither trained on nor held out: name it in data.train or data.validation"
    names = [name for name, its in others.items() if not its.files or its.files[0].resolve() not in read]
    return replace(part, not_read=(*part.not_read, *(NotRead(f"{source}:{name}", reason) for name in names)))


def _training_sets(
    wanted: Sequence[SetChoice], how: Reading, *, streaming: bool = False
) -> list[tuple[RecordSet, dict[str, OpenedTable]]]:
    """For each set the records to train on, and its other splits."""
    found = []
    for choice in wanted:
        tables = _open(choice, streaming=streaming)
        table = tables.pop(_train_name(tables, choice.source))
        found.append((_records(table, choice.source, choice, how), tables))
    return found


def _open(choice: SetChoice, *, streaming: bool = False) -> dict[str, OpenedTable]:
    """The splits of a set; its data files may lie where its images may."""
    confined = not choice.options.allow_outside_root
    return open_set(choice.source, choice.revision, choice.subset, streaming=streaming, confined=confined)


def _validation_records(choice: SetChoice, how: Reading) -> RecordSet:
    """The only split of a set, else its own validation or test split."""
    tables = _open(choice)
    names = [name for name in VALIDATION_NAMES if name in tables] if len(tables) > 1 else list(tables)
    if not names:
        raise DataError(
            f"{choice.source} has the splits {', '.join(tables)} and none for validation; name a single file, or one "
            f"split: {choice.source}:{next(iter(tables))}"
        )
    return _records(tables[names[0]], choice.source, choice, how)


def _look_at_validation(choice: SetChoice, how: Reading) -> FirstLook:
    """The first look at the validation rows of a set."""
    return _look([_validation_records(choice, how)], how, with_keys=False)[0]


def _train_name(tables: Mapping[str, OpenedTable], source: str) -> str:
    """The split to train on: `train`, or the only one."""
    if "train" in tables or len(tables) == 1:
        return "train" if "train" in tables else next(iter(tables))
    raise DataError(
        f"{source} has the splits {', '.join(tables)} and no train; name one: {source}:{next(iter(tables))}"
    )


def _records(opened: OpenedTable, source: str, choice: SetChoice, how: Reading) -> RecordSet:
    """A split with the map that makes rows of it. Raises: DataError for columns that are not there."""
    options = choice.options
    if not options.answered and options.images is not None and isinstance(opened.table, PhotosTable):
        options = replace(options, images="image")  # photos alone are asked as the images of a table are
    cells = Cells(
        images=options.images,
        root=opened.root if options.image_root is None else options.image_root,
        confined=not options.allow_outside_root,
        within=opened.within if options.image_root is None else None,
        labels=opened.labels,
        short_floats=opened.short_floats,
        cache=how.cache,
        failures=how.failures,
        allowed=AllowedHosts.parse(how.limits.allow_hosts),
    )
    columns = record_map(opened.table.column_names, options, source, cells)
    if (unread := next((name for name in columns.columns if name in opened.unread), None)) is not None:
        raise DataError(f"data set {source} cannot be read: {opened.unread[unread]}")
    try:
        columns.check(opened.table.column_names)
    except DataError as error:
        if hint := getattr(opened.table, "column_hint", ""):
            raise DataError(f"{error}; {hint}") from None
        raise
    table, parts = narrowed(opened.table, columns.columns), opened.parts
    if options.image_root is not None:
        parts = tuple(replace(part, root=None) for part in parts)
    return RecordSet(
        table, columns, choice.source, options.max_pixels, opened.files, parts=parts, not_read=opened.not_read
    )


def _look(parts: Sequence[RecordSet], how: Reading, *, with_keys: bool) -> list[FirstLook]:
    """The first look at some sets, after the download of their images.

    Raises: DataError when too many rows of a set are left out.
    """
    looks = [read_rows(part, with_keys=with_keys) for part in parts]
    missing = list(dict.fromkeys(url for look in looks for url in look.not_cached))
    if missing and how.cache is not None and how.download:
        summary = fetch_images(missing, how.cache, how.limits, on_progress=how.on_fetch)
        looks = [look_again(look, summary.failures) for look in looks]
    elif missing:
        looks = [replace(look, records=look.records.waiting_for_downloads()) for look in looks]
    for look in looks:
        if how.refuse and (line := _set_refusal(look, how)) is not None:
            raise DataError(line)
        if look.problems:
            source, total = look.records.map.source, len(look.records.table)
            _logger.warning("%s", describe_problems(look.problems, total, source))
    return looks


def _set_refusal(look: FirstLook, how: Reading) -> str | None:
    """Why one set is refused, by itself; None when it is not."""
    source, total = look.records.map.source, len(look.records.table)
    return refusal(look.problems, total, source, max_skipped=how.max_skipped, on_problem=how.on_problem)


def _none_usable(looks: Sequence[FirstLook]) -> str:
    """Why no row of any set can be used, so that there is none to hold out or to train on."""
    told = (describe_problems(look.problems, len(look.records.table), look.records.map.source) for look in looks)
    return f"{'; '.join(told)}; no row is left to train on: mend the data"


def _joined(looks: Sequence[FirstLook]) -> Rows:
    """The rows of several sets, one after the other."""
    rows = looks[0].rows
    for look in looks[1:]:
        rows = rows + look.rows
    return rows
