"""From the name of a data set to rows: the only module that uses `datasets`.

In come a folder, a CSV, JSON, JSONL or Parquet file, or a hub id, and options named as in the recipe's section `data`;
out come `Rows` and the problems of the rows that are left out. Formats are left to `datasets`; images stay undecoded.
Rows count from 0 in the order of the source.

Validation rows: `validation` where it is given; else the set's own `validation`, `valid`, `val`, `dev` or `test`; else
rows split off `train`. CSV cells are read as the text in the file: 007 and 19.90 stay, NA is text, only an empty cell
is missing.
"""

import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from phi3v.data.columns import ColumnMap, RowOptions, UnusableRecord, check_images, group_keys
from phi3v.data.faults import find_fault
from phi3v.data.schema import Row, RowProblem
from phi3v.data.split import split_rows
from phi3v.data.templates import Template
from phi3v.errors import DataError

MAX_PROBLEM_SHARE = 0.05
"""A set with a larger share of unusable rows is refused."""

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
_logger = logging.getLogger(__name__)


class Rows(Sequence[Row]):
    """Rows of a set, made from its records when they are asked for: nothing but row numbers is kept in memory.

    `rows[3]` is a Row, `rows[:10]` are Rows. Can be pickled for loader workers.
    """

    def __init__(self, table: datasets.Dataset, columns: ColumnMap, numbers: Sequence[int]) -> None:
        """Name the records.

        Args:
            table: the records, with the columns of `columns` at least.
            columns: how a record becomes a row.
            numbers: the records that are rows here, in their order.
        """
        self._table = table
        self._columns = columns
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    def take(self, positions: Sequence[int]) -> "Rows":
        """The rows at these positions, in that order: rows.take([2, 0])[0] is rows[2]."""
        return Rows(self._table, self._columns, [self._numbers[position] for position in positions])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        """A row, or for a slice the rows in it."""
        if isinstance(index, slice):
            return Rows(self._table, self._columns, self._numbers[index])
        number = self._numbers[index]
        return self._columns.row(self._table[number], number)


@dataclass(frozen=True)
class LoadedData:
    """What a recipe's section `data` names.

    Attributes:
        train: rows to train on.
        validation: rows held out; None when there are none.
        problems: the rows of both that were left out.
        origin: where the validation rows come from: "validation" (given, or the set's own), "test" or another own
            split, "split" (held out of train), or "none".
    """

    train: Rows
    validation: Rows | None
    problems: list[RowProblem]
    origin: str


def load_data(
    train: str,
    *,
    options: RowOptions,
    validation: str | None = None,
    revision: str | None = None,
    validation_split: float | None = 0.1,
    split_seed: int = 0,
    max_rows: int | None = None,
) -> LoadedData:
    """Training and validation rows.

    Args:
        train: folder, CSV, JSON, JSONL or Parquet file, or hub id.
        options: columns, templates and limits, for both.
        validation: the same as `train` for validation rows; None to look for a split of `train`'s own.
        revision: of the hub data sets.
        validation_split: number of rows (int) or share (float) to hold out of train when there are no other validation
            rows; None to hold out none. `split.split_rows` says which.
        split_seed: another seed holds out other rows.
        max_rows: train on the first so many rows only.
    Raises: DataError in one line.
    """
    tables = _open_set(train, revision)
    name = _train_name(tables, train)
    rows, problems = _read(tables[name], train, train, options)
    own = next((split for split in _VALIDATION_NAMES if split in tables and split != name), None)
    if validation is not None:
        held_out, more = load_rows(validation, options=options, revision=revision)
        return LoadedData(rows[:max_rows], held_out, problems + more, "validation")
    if own is not None:
        held_out, more = _read(tables[own], train, f"{train} ({own})", options)
        return LoadedData(rows[:max_rows], held_out, problems + more, own)
    if validation_split is None:
        return LoadedData(rows[:max_rows], None, problems, "none")
    kept, chosen = split_rows([group_keys(row) for row in rows], validation_split, split_seed)
    return LoadedData(rows.take(kept)[:max_rows], rows.take(chosen), problems, "split")


def load_rows(source: str, *, options: RowOptions, revision: str | None = None) -> tuple[Rows, list[RowProblem]]:
    """All rows of one set: of its only split, else of its own validation or test split.

    Args:
        source: folder, CSV, JSON, JSONL or Parquet file, or hub id.
        options: columns, templates and limits.
        revision: of a hub data set.
    Raises: DataError in one line.
    """
    tables = _open_set(source, revision)
    names = [name for name in _VALIDATION_NAMES if name in tables] if len(tables) > 1 else list(tables)
    if not names:
        raise DataError(
            f"{source} has the splits {', '.join(tables)} and none for validation; name a single file instead"
        )
    return _read(tables[names[0]], source, source, options)


def _read(table: datasets.Dataset, location: str, source: str, options: RowOptions) -> tuple[Rows, list[RowProblem]]:
    """Goes through all records once: rows that can be used, problems of those that cannot.

    Args:
        table: the records.
        location: what the user named, for image paths.
        source: what errors and rows call the set.
        options: columns, templates and limits.
    Raises: DataError for a column that is missing, no usable row, or more problems than `MAX_PROBLEM_SHARE`.
    """
    columns = _column_map(table, location, source, options)
    columns.check(table.column_names)
    table = table.select_columns(list(columns.columns))
    if columns.images is not None and (kind := _undecoded(table.features[columns.images])) is not None:
        with _without_progress_bars():
            table = table.cast_column(columns.images, kind)
    usable: list[int] = []
    problems: list[RowProblem] = []
    for number, record in enumerate(_records(table, location)):
        try:
            check_images(columns.row(record, number), options.max_pixels)
            usable.append(number)
        except UnusableRecord as error:
            problems.append(RowProblem(number, error.reason_code, str(error), source))
    if not usable or len(problems) > MAX_PROBLEM_SHARE * len(table):
        raise DataError(describe_problems(problems, len(table), source) + _advice(len(table)))
    if problems:
        _logger.warning("%s", describe_problems(problems, len(table), source))
    return Rows(table, columns, usable), problems


def describe_problems(problems: Sequence[RowProblem], total: int, source: str) -> str:
    """One line: how many rows are left out, why, and the first three.

    Example: "shop.csv: 2 of 40 rows cannot be used (2 missing_value): row 3: column 'title' is empty; row 9: ...".
    """
    if not total:
        return f"{source} has no rows"
    reasons = ", ".join(f"{count} {code}" for code, count in Counter(p.reason_code for p in problems).most_common())
    first = "; ".join(f"row {problem.row}: {problem.message}" for problem in problems[:3])
    return f"{source}: {len(problems)} of {total} rows cannot be used ({reasons}): {first}"


def _advice(total: int) -> str:
    """The way out of too many problems."""
    return (
        f"; at most {MAX_PROBLEM_SHARE:.0%} may be left out: mend the data, or the columns in the recipe"
        if total
        else ""
    )


def _column_map(table: datasets.Dataset, location: str, source: str, options: RowOptions) -> ColumnMap:
    """The options as a column map, with what the types of the columns say."""
    root, features = options.image_root, table.features
    if root is None:
        place = Path(location)
        root = str(place if place.is_dir() else place.parent) if place.exists() else HF_HUB_CACHE
    return ColumnMap(
        source=source,
        images=options.images,
        prompt=Template(options.prompt, "prompt"),
        answer=Template(options.answer, "answer"),
        system=None if options.system is None else Template(options.system, "system"),
        root=root,
        confined=not options.allow_outside_root,
        labels={name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)},
        single_floats=frozenset(
            name for name, kind in features.items() if getattr(kind, "dtype", None) in ("float32", "float16")
        ),
    )


def _undecoded(feature: Any) -> Any:
    """A column type whose images stay files or bytes, also inside lists; None for a type that decodes nothing.

    Example: Image() -> Image(decode=False), List(Image()) -> List(Image(decode=False)), Value("string") -> None.
    """
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List) and (inner := _undecoded(feature.feature)) is not None:
        return datasets.List(inner, length=feature.length)
    return None


def _train_name(tables: dict[str, datasets.Dataset], source: str) -> str:
    """The split to train on: `train`, or the only one."""
    if "train" in tables or len(tables) == 1:
        return "train" if "train" in tables else next(iter(tables))
    raise DataError(f"{source} has the splits {', '.join(tables)} and no train; name a single file instead")


def _open_set(source: str, revision: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a set, through `datasets`. Raises: DataError for whatever `datasets` raises."""
    path = Path(source)
    if revision is not None and path.exists():
        _logger.warning("data.revision %s is ignored: %s is a local file or folder", revision, source)
    try:
        with _without_progress_bars():
            if path.is_file():
                return _open_file(path)
            if path.is_dir():
                return _open_folder(path)
        if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in _BUILDERS:
            raise DataError(
                f"data set {source} does not exist (looked in {Path.cwd()}): relative paths count from the folder in "
                "which phi3v is started"
            )
        return dict(datasets.load_dataset(source, revision=revision))
    except DataError:
        raise
    except Exception as error:  # readers of many formats, each with exceptions of its own
        where = "" if path.exists() else "; it is no file or folder here, and was looked for on the hub"
        raise DataError(f"data set {source} cannot be read: {_fault(path, error)}{where}") from error


def _open_folder(path: Path) -> dict[str, datasets.Dataset]:
    """A folder of images or data files, or one that `save_to_disk` of `datasets` wrote."""
    if (path / "dataset_dict.json").is_file():
        return dict(datasets.DatasetDict.load_from_disk(path))
    if (path / "state.json").is_file():
        return {"train": datasets.Dataset.load_from_disk(path)}
    return dict(datasets.load_dataset(str(path.resolve())))  # a relative "csv" would name a reader instead


def _open_file(path: Path) -> dict[str, datasets.Dataset]:
    """One file as the split `train`."""
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"data file {path} ends in none of {', '.join(_BUILDERS)}; convert it or rename it")
    extra: dict[str, Any] = {}
    if builder == "csv":
        extra = {"sep": "\t" if path.suffix.lower() == ".tsv" else ","}
        header = datasets.load_dataset(builder, data_files=str(path), split="train", nrows=1, **extra)
        texts = datasets.Features({column: datasets.Value("string") for column in header.column_names})
        extra |= {"features": texts, "keep_default_na": False, "na_values": [""]}
    return {"train": datasets.load_dataset(builder, data_files=str(path), split="train", **extra)}


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """No bars of `datasets` for what takes a moment, local files; hub downloads keep theirs."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def _records(table: datasets.Dataset, location: str) -> Iterator[dict[str, Any]]:
    """The records of a table. Raises: DataError for bytes that are no UTF-8, which JSON readers find only here."""
    try:
        yield from table
    except UnicodeDecodeError as error:
        raise DataError(f"data set {location} cannot be read: {_fault(Path(location), error)}") from error


def _fault(path: Path, error: BaseException) -> str:
    """What is wrong: what the lines of the file show, else what the reader said."""
    return (find_fault(path) if path.is_file() else None) or _reason(error)


def _reason(error: BaseException) -> str:
    """The first message in a chain of exceptions that says more than "an error occurred", on one line."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if text.endswith("corresponds to no data!"):
        return "it has no rows"
    if "Error tokenizing data" in text:
        return f"{text.removesuffix('.')}: put quotes around a cell that holds the separator"
    return re.sub(r" in row \d+$", "", text)  # a row of the reader's block, not of the file
