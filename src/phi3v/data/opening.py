"""From the name of a data set to tables of records, one for each of its splits; formats are left to `datasets`.

In come a folder, a file, a pattern of .tar shards, or a hub id; out come tables (anything with `column_names`, a length
and records by number) with the folder that their image paths count from. Read without `datasets`: local JSON
(`json_table`), whose texts and numbers stay as they are written, and local shards (`tar_table`). Knows nothing about
rows.

CSV cells are read as the text in the file: 007 and 19.90 stay, NA is text, only an empty cell is missing. The user's
token for private hub sets is `datasets`' business; it is taken out of every error.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import datasets
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE

from phi3v.data.faults import find_fault
from phi3v.data.json_table import JsonTable
from phi3v.data.tar_table import TarTable
from phi3v.errors import DataError

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_STREAMED_AT_ONCE = 64
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_logger = logging.getLogger(__name__)


class Table(Protocol):
    """Records by number; iterating gives them in order."""

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class StreamTable:
    """Records that can only be gone through; one pass begins at the beginning."""

    def __init__(self, table: datasets.IterableDataset, column_names: list[str] | None = None) -> None:
        """Keep the records; their first one names the columns where neither types nor the caller do."""
        self._table = table
        self.column_names = list(column_names or table.column_names or next(iter(table), {}))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records in order; in batches, because one by one `datasets` divides them among loader workers."""
        for batch in self._table.iter(_STREAMED_AT_ONCE):
            yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))

    def __len__(self) -> int:
        """Not known before the end. Raises: TypeError."""
        raise TypeError("a stream has no length")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises: TypeError."""
        raise TypeError("records of a stream have no numbers to ask for")

    def select_columns(self, columns: list[str]) -> "StreamTable":
        """The same records with these columns alone, where the types of all columns are known."""
        return StreamTable(self._table.select_columns(columns), columns) if self._table.features else self

    def rename_columns(self, names: dict[str, str]) -> "StreamTable":
        """The same records with other column names."""
        columns = [names.get(name, name) for name in self.column_names]
        return StreamTable(self._table.rename_columns(names), columns)


@dataclass(frozen=True)
class OpenedTable:
    """One split of a set.

    Attributes:
        table: its records, images undecoded.
        root: folder that image paths count from.
        labels: column -> names of its numbers, for columns of class labels.
        single_floats: columns of 32-bit floats.
    """

    table: Table
    root: str
    labels: dict[str, list[str]]
    single_floats: frozenset[str]


def open_set(
    source: str, revision: str | None = None, subset: str | None = None, *, streaming: bool = False
) -> dict[str, OpenedTable]:
    """The splits of a set.

    Args:
        source: a folder, a file, a pattern such as shards/*.tar, or a hub id, with `:SPLIT` behind it for one split.
        revision: of a hub set.
        subset: the configuration of a hub set that has several.
        streaming: True gives tables that can only be gone through, of which nothing is kept on the disk.
    Example: "owner/name:train_sft" -> {"train": the split train_sft}.
    Raises: DataError for whatever is wrong, in one line.
    """
    path, (name, _, split) = Path(source), source.rpartition(":")
    if (revision or subset) is not None and path.exists():
        _logger.warning("data.revision %s is ignored: %s is a local file or folder", revision or subset, source)
    if name and re.fullmatch(r"[\w.-]+", split) and not path.exists():
        tables = open_set(name, revision, subset, streaming=streaming)
        if split not in tables:
            raise DataError(f"{name} has no split {split}; its splits are {', '.join(tables)}")
        return {"train": tables[split]}
    try:
        with _without_progress_bars():
            if (opened := _open_local(path, streaming)) is not None:
                return opened
        if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in (*_BUILDERS, ".tar"):
            raise DataError(
                f"data set {source} does not exist (looked in {Path.cwd()}): relative paths count from the folder in "
                "which phi3v is started"
            )
        extra = ({"name": subset} if subset else {}) | _streamed(streaming)
        found = datasets.load_dataset(source, **extra, revision=revision)
        return {split: _undecoded(table, HF_HUB_CACHE) for split, table in found.items()}
    except DataError:
        raise
    except Exception as error:  # readers of many formats, each with exceptions of its own
        where = "" if path.exists() else "; it is no file or folder here, and was looked for on the hub"
        text = f"data set {source} cannot be read: {fault(path, error)}{where}"
        if _without_token(str(error)) != str(error):
            raise DataError(text) from None  # what it was raised from would show the token
        raise DataError(text) from error


def _open_local(path: Path, streaming: bool) -> dict[str, OpenedTable] | None:
    """A file, a folder or a pattern of shards; None when nothing is there."""
    if path.is_file():
        return {"train": _open_file(path, streaming)}
    if path.is_dir():
        return _open_folder(path, streaming)
    if path.suffix.lower() == ".tar" and (shards := sorted(Path(name) for name in glob(str(path), recursive=True))):
        return {"train": OpenedTable(TarTable(shards), str(shards[0].parent), {}, frozenset())}
    return None


def _open_folder(path: Path, streaming: bool) -> dict[str, OpenedTable]:
    """A folder of shards, of photos with their metadata, of data files, or one that `save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file():
        return _all_undecoded(datasets.DatasetDict.load_from_disk(path), path)
    if (path / "state.json").is_file():
        return _all_undecoded({"train": datasets.Dataset.load_from_disk(path)}, path)
    if shards := sorted(path.glob("*.tar")):
        return {"train": OpenedTable(TarTable(shards), str(path), {}, frozenset())}
    if (table := _open_metadata(path, streaming)) is not None:
        return {"train": table}
    below = {folder.name: _open_metadata(folder, streaming) for folder in sorted(path.iterdir()) if folder.is_dir()}
    splits = {name: table for name, table in below.items() if table is not None}
    if splits and len(splits) == len(below) and set(splits) <= {"train", *VALIDATION_NAMES}:
        return splits
    # a relative "csv" would name a reader instead
    files = datasets.load_dataset_builder(str(path.resolve())).config.data_files or {}
    if files and all(Path(file).suffix.lower() in (".json", ".jsonl") for found in files.values() for file in found):
        return {
            str(split): OpenedTable(JsonTable(*map(Path, found)), str(path), {}, frozenset())
            for split, found in files.items()
        }
    return _all_undecoded(datasets.load_dataset(str(path.resolve()), **_streamed(streaming)), path)


def _open_metadata(folder: Path, streaming: bool) -> OpenedTable | None:
    """The photos of a folder by its metadata file, whose `file_name` becomes the column `image`; None without one.

    `file_names` becomes `images`, and `left_file_name` becomes `left`.
    """
    found = [folder / name for name in _METADATA if (folder / name).is_file()]
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{folder} has {' and '.join(path.name for path in found)}: keep one of them")
    opened = _open_file(found[0], streaming)
    names = {column: _photo_column(column) for column in opened.table.column_names}
    renamed = {old: new for old, new in names.items() if old != new}
    if not renamed:
        raise DataError(f"{found[0]} has no column file_name, which names the photo of a row")
    return replace(opened, table=opened.table.rename_columns(renamed))  # type: ignore[attr-defined]


def _photo_column(column: str) -> str:
    """The image column that a column of file names becomes: "file_name" -> "image", "left_file_name" -> "left"."""
    if column.endswith("file_names"):
        return column[: -len("_file_names")] or "images"
    return (column[: -len("_file_name")] or "image") if column.endswith("file_name") else column


def _open_file(path: Path, streaming: bool) -> OpenedTable:
    """One file."""
    builder = _BUILDERS.get(path.suffix.lower())
    if path.suffix.lower() == ".tar":
        return OpenedTable(TarTable([path]), str(path.parent), {}, frozenset())
    if builder is None:
        raise DataError(f"data file {path} ends in none of {', '.join(_BUILDERS)}, .tar; convert it or rename it")
    if builder == "json":
        return OpenedTable(JsonTable(path), str(path.parent), {}, frozenset())
    extra = reader_options(path) | _streamed(streaming)
    table = datasets.load_dataset(builder, data_files=str(path), split="train", **extra)
    return _undecoded(table, str(path.parent))


def _streamed(streaming: bool) -> dict[str, Any]:
    """What `datasets` is told for streaming."""
    return {"streaming": True} if streaming else {}


def reader_options(path: Path) -> dict[str, Any]:
    """What `datasets` has to be told to read the cells of a CSV file as text."""
    if _BUILDERS.get(path.suffix.lower()) != "csv":
        return {}
    extra: dict[str, Any] = {"sep": "\t" if path.suffix.lower() == ".tsv" else ","}
    header = datasets.load_dataset("csv", data_files=str(path), split="train", nrows=1, **extra)
    texts = datasets.Features({column: datasets.Value("string") for column in header.column_names})
    return extra | {"features": texts, "keep_default_na": False, "na_values": [""]}


def _all_undecoded(tables: dict[str, datasets.Dataset], path: Path) -> dict[str, OpenedTable]:
    """The splits of a folder."""
    return {name: _undecoded(table, str(path)) for name, table in tables.items()}


def _undecoded(table: Any, root: str) -> OpenedTable:
    """A table whose images stay files or bytes, with what the types of its columns say."""
    features = table.features or {}
    for column, feature in features.items():
        if (kind := undecoded_feature(feature)) is not None:
            with _without_progress_bars():
                table = table.cast_column(column, kind)
    labels = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    floats = (name for name, kind in features.items() if getattr(kind, "dtype", None) in ("float32", "float16"))
    opened = StreamTable(table) if isinstance(table, datasets.IterableDataset) else table
    return OpenedTable(opened, root, labels, frozenset(floats))


def undecoded_feature(feature: Any) -> Any:
    """A column type whose images stay files or bytes, also inside lists; None for a type that decodes nothing.

    Example: Image() -> Image(decode=False), List(Image()) -> List(Image(decode=False)), Value("string") -> None.
    """
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List) and (inner := undecoded_feature(feature.feature)) is not None:
        return datasets.List(inner, length=feature.length)
    return None


def narrowed(table: Table, columns: Sequence[str]) -> Table:
    """The table with these columns alone, where that spares reading the others."""
    return table.select_columns(list(columns)) if isinstance(table, datasets.Dataset | StreamTable) else table


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


def records_of(table: Table, location: str) -> Iterator[dict[str, Any]]:
    """The records of a table. Raises: DataError for what readers find only here, such as bytes that are no UTF-8."""
    try:
        yield from table
    except DataError:
        raise
    except Exception as error:  # readers of many formats, each with exceptions of its own
        raise DataError(f"data set {location} cannot be read: {fault(Path(location), error)}") from error


def fault(path: Path, error: BaseException) -> str:
    """What is wrong: what the lines of the file show, else what the reader said, without the user's token."""
    return (find_fault(path) if path.is_file() else None) or _without_token(_reason(error))


def _without_token(text: str) -> str:
    """A text in which the token for private hub sets is blotted out."""
    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "***") if token else text)


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
