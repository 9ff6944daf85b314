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

from phi3v.data.dates import DatedTable, batches_of, date_columns
from phi3v.data.faults import find_fault
from phi3v.data.folder import KINDS, contained, find_files
from phi3v.data.hub_card import checked_commit
from phi3v.data.json_table import JsonTable
from phi3v.data.parquet_faults import ends_fault, other_columns
from phi3v.data.saved import open_saved
from phi3v.data.tar_table import TarTable
from phi3v.data.text_guard import find_text_fault
from phi3v.data.undecoded import ParsedTable, json_columns, undecoded
from phi3v.data.unreached import PhotosTable, is_reached
from phi3v.errors import DataError

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_STREAMED_AT_ONCE = 64
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_logger = logging.getLogger(__name__)


class Table(Protocol):
    """Records by number; iterating gives them in order."""

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class StreamTable:
    """Records that can only be gone through; one pass begins at the beginning."""

    def __init__(self, table: datasets.IterableDataset, column_names: list[str] | None = None) -> None:
        """Keep the records; their first one names the columns where neither types nor the caller do."""
        self._table = table
        self.column_names = list(column_names or table.column_names or next(iter(table), {}))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records in order; in batches, because one by one `datasets` divides them among loader workers."""
        for batch in batches_of(self._table, _STREAMED_AT_ONCE):
            yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))

    def __len__(self) -> int:
        """Not known before the end. Raises: TypeError."""
        raise TypeError("a stream has no length")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises: TypeError."""
        raise TypeError("records of a stream have no numbers to ask for")

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
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
        files: what the records are read from, where these are files of this machine that `datasets` reads.
    """

    table: Table
    root: str
    labels: dict[str, list[str]]
    single_floats: frozenset[str]
    files: tuple[Path, ...] = ()


def open_set(
    source: str,
    revision: str | None = None,
    subset: str | None = None,
    *,
    streaming: bool = False,
    confined: bool = True,
) -> dict[str, OpenedTable]:
    """The splits of a set.

    Args:
        source: a folder, a file, a pattern such as shards/*.tar, or a hub id, with `:SPLIT` behind it for one split.
        revision: of a hub set.
        subset: the configuration of a hub set that has several.
        streaming: True gives tables that can only be gone through, of which nothing is kept on the disk.
        confined: True refuses data files of a folder that are links to somewhere else.
    Example: "owner/name:train_sft" -> {"train": the split train_sft}.
    Raises: DataError for whatever is wrong, in one line.
    """
    path, (name, _, split) = Path(source), source.rpartition(":")
    if (revision or subset) is not None and path.exists():
        _logger.warning("data.revision %s is ignored: %s is a local file or folder", revision or subset, source)
    if name and re.fullmatch(r"[\w.-]+", split) and not path.exists():
        tables = open_set(name, revision, subset, streaming=streaming, confined=confined)
        if split not in tables:
            raise DataError(f"{name} has no split {split}; its splits are {', '.join(tables)}")
        return {"train": tables[split]}
    try:
        with _without_progress_bars():
            if (opened := _open_local(path, streaming, confined)) is not None:
                return opened
        if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in (*KINDS, ".tar"):
            raise DataError(
                f"data set {source} does not exist (looked in {Path.cwd()}): relative paths count from the folder in "
                "which phi3v is started"
            )
        extra = ({"name": subset} if subset else {}) | _streamed(streaming)
        found = datasets.load_dataset(source, **extra, revision=checked_commit(source, revision))
        return {split: _undecoded(table, HF_HUB_CACHE) for split, table in found.items()}
    except DataError:
        raise
    except Exception as error:  # readers of many formats, each with exceptions of its own
        where = ""
        if not path.exists():
            where = "; it is no file or folder here, and was looked for on the hub: check the name and the network"
        told = _fault_of_files([path], error) if path.is_file() else f"{source} {_cannot(error)}"
        text = f"data set {told}{where}"
        if _without_token(str(error)) != str(error):
            raise DataError(text) from None  # what it was raised from would show the token
        raise DataError(text) from error


def _open_local(path: Path, streaming: bool, confined: bool) -> dict[str, OpenedTable] | None:
    """A file, a folder or a pattern of shards; None when nothing is there."""
    if path.is_file():
        return {"train": _open_file(path, streaming)}
    if path.is_dir():
        return _open_folder(path, streaming, confined)
    if path.suffix.lower() == ".tar" and (shards := sorted(Path(name) for name in glob(str(path), recursive=True))):
        return {"train": OpenedTable(TarTable(shards), str(shards[0].parent), {}, frozenset())}
    return None


def _open_folder(path: Path, streaming: bool, confined: bool) -> dict[str, OpenedTable]:
    """A folder of shards, of photos with their metadata, of data files, or one that `save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return {name: _undecoded(table, str(path)) for name, table in open_saved(path, confined=confined).items()}
    if shards := sorted(path.glob("*.tar")):
        shards = [contained(shard, path, confined=confined) for shard in shards]
        return {"train": OpenedTable(TarTable(shards), str(path), {}, frozenset())}
    if (table := _open_metadata(path, streaming, confined)) is not None:
        return {"train": table}
    folders = (folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.is_symlink())
    below = {folder.name: _open_metadata(folder, streaming, confined) for folder in folders}
    splits = {name: table for name, table in below.items() if table is not None}
    if splits and len(splits) == len(below) and set(splits) <= {"train", *VALIDATION_NAMES}:
        return splits
    return _open_files(path, streaming, confined)


def _open_files(path: Path, streaming: bool, confined: bool) -> dict[str, OpenedTable]:
    """The data files of a folder by split; a folder of photos without metadata has the column `label` as well."""
    found = find_files(path, confined=confined)
    if found.kind == "images":
        reached = {name: list(filter(is_reached, files)) for name, files in found.splits.items()}
        listed = datasets.data_files.DataFilesDict({name: _listed(files) for name, files in reached.items()})
        tables = datasets.load_dataset("imagefolder", data_files=listed, **_streamed(streaming))
        opened = {name: _undecoded(table, str(path)) for name, table in tables.items()}
        others = {name: [file for file in files if not is_reached(file)] for name, files in found.splits.items()}
        return {
            name: replace(its, table=PhotosTable(its.table, others[name])) if others[name] else its
            for name, its in opened.items()
        }
    splits = {name: _open_data(files, streaming) for name, files in found.splits.items()}
    return {name: replace(opened, root=str(path)) for name, opened in splits.items()}


def _open_metadata(folder: Path, streaming: bool, confined: bool) -> OpenedTable | None:
    """The photos of a folder by its metadata file, whose `file_name` becomes the column `image`; None without one.

    `file_names` becomes `images`, and `left_file_name` becomes `left`.
    """
    found = [folder / name for name in _METADATA if (folder / name).exists()]
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{folder} has {' and '.join(path.name for path in found)}: keep one of them")
    opened = replace(_open_file(contained(found[0], folder, confined=confined), streaming), root=str(folder))
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
    if path.suffix.lower() == ".tar":
        return OpenedTable(TarTable([path]), str(path.parent), {}, frozenset())
    if path.suffix.lower() not in KINDS:
        raise DataError(f"data file {path} ends in none of {', '.join(KINDS)}, .tar; convert it or rename it")
    return _open_data([path], streaming)


def _open_data(paths: Sequence[Path], streaming: bool) -> OpenedTable:
    """Data files of one kind as one table."""
    first, root = paths[0], str(paths[0].parent)
    builder = KINDS[first.suffix.lower()]
    for path in paths:
        wrong = ends_fault(path) if builder == "parquet" else find_text_fault(path)
        if wrong is not None:
            raise DataError(f"data set {path} cannot be read: {wrong}")
    if builder == "json":
        return OpenedTable(JsonTable(paths), root, {}, frozenset())
    extra = reader_options(first) | _streamed(streaming)
    reader = "csv" if builder == "tsv" else builder
    try:
        table = datasets.load_dataset(reader, data_files=_listed(paths), split="train", **extra)
        return replace(_undecoded(table, root), files=tuple(paths))
    except DataError:
        raise
    except Exception as error:  # with exceptions of the readers' own; here it is known which files they read
        raise DataError(f"data set {_fault_of_files(paths, error)}") from error


def _listed(paths: Sequence[Path]) -> datasets.data_files.DataFilesList:
    """Files as `datasets` takes them without a pattern: a name with * or [ in it names that file alone."""
    stats = [path.stat() for path in paths]
    known = [(str(stat.st_mtime_ns), str(stat.st_size)) for stat in stats]
    return datasets.data_files.DataFilesList([str(path.resolve()) for path in paths], known)


def _streamed(streaming: bool) -> dict[str, Any]:
    """What `datasets` is told for streaming."""
    return {"streaming": True} if streaming else {}


def reader_options(path: Path) -> dict[str, Any]:
    """What `datasets` has to be told to read the cells of a CSV file as text."""
    if KINDS.get(path.suffix.lower()) not in ("csv", "tsv"):
        return {}
    extra: dict[str, Any] = {"sep": "\t" if path.suffix.lower() == ".tsv" else ","}
    header = datasets.load_dataset("csv", data_files=_listed([path]), split="train", nrows=1, **extra)
    texts = datasets.Features({column: datasets.Value("string") for column in header.column_names})
    return extra | {"features": texts, "keep_default_na": False, "na_values": [""]}


def _undecoded(table: Any, root: str) -> OpenedTable:
    """A table whose images stay files or bytes, with what the types of its columns say."""
    with _without_progress_bars():
        table = undecoded(table)
    features = table.features or {}
    labels = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    floats = (name for name, kind in features.items() if getattr(kind, "dtype", None) in ("float32", "float16"))
    opened = StreamTable(table) if isinstance(table, datasets.IterableDataset) else table
    if opened is table and date_columns(features):
        opened = DatedTable(table)
    if parsed := json_columns(features):
        opened = ParsedTable(opened, parsed)
    return OpenedTable(opened, root, labels, frozenset(floats))


_NARROWED = datasets.Dataset | StreamTable | ParsedTable | DatedTable


def narrowed(table: Table, columns: Sequence[str]) -> Table:
    """The table with these columns alone, where that spares reading the others."""
    return table.select_columns(list(columns)) if isinstance(table, _NARROWED) else table


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


def records_of(table: Table, location: str, files: Sequence[Path] = ()) -> Iterator[dict[str, Any]]:
    """The records of a table.

    Args:
        table: the table.
        location: what the user named.
        files: what it is read from, where that is known.
    Raises: DataError for what readers find only here, such as bytes that are no UTF-8.
    """
    try:
        yield from table
    except DataError:
        raise
    except Exception as error:  # readers of many formats, each with exceptions of its own
        path = Path(location)
        told = _fault_of_files(files or [path], error) if files or path.is_file() else f"{path} {_cannot(error)}"
        raise DataError(f"data set {told}") from error


def _fault_of_files(paths: Sequence[Path], error: BaseException) -> str:
    """Which of some files cannot be read, and why: "a.csv cannot be read: line 3 is not UTF-8 text: ..."."""
    for path in paths:
        if (found := find_fault(path)) is not None:
            return f"{path} cannot be read: {found}"
    if paths[0].suffix.lower() == ".parquet" and (other := other_columns(paths)) is not None:
        return f"{other[0]} cannot be read: {other[1]}"
    return f"{paths[0]} {_cannot(error)}"


def _cannot(error: BaseException) -> str:
    """What a reader says, without the user's token."""
    return f"cannot be read: {_without_token(_reason(error))}"


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
        return "it has no rows: write at least one line under the names of the columns"
    if text.startswith("No columns to parse"):
        return "it is empty: write a line with the names of the columns, and a line for each row"
    if isinstance(error, StopIteration):
        return "it is empty"
    if re.search("corrupt|magic bytes|thrift|deserialize", text, re.IGNORECASE):
        return f"{text.removesuffix('.')}: the file is damaged, copy or save it again"
    if "Error tokenizing data" in text:
        return f"{text.removesuffix('.')}: put quotes around a cell that holds the separator"
    if text.startswith("Couldn't reach"):
        return re.sub(r" \(\w+\)$", "", text)  # the class of an exception, which says nothing more
    return re.sub(r" in row \d+$", "", text)  # a row of the reader's block, not of the file
