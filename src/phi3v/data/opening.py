"""From the name of a data set to tables of records, one for each of its splits; formats are left to `datasets`.

In come a folder, a file, a pattern of files, or a hub id; out come tables (anything with `column_names`, a length
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
from dataclasses import replace
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import get_token

from phi3v.data.address_guard import shorten
from phi3v.data.dates import DatedTable, date_columns
from phi3v.data.faults import find_fault
from phi3v.data.folder import KINDS, as_typed, contained, find_files, matching, not_there, way_out_of
from phi3v.data.hub_card import cached_places, checked_commit
from phi3v.data.json_table import JsonTable
from phi3v.data.misfits import columns_of, find_misfit
from phi3v.data.not_read import NotRead, partitions
from phi3v.data.parquet_faults import count_records, ends_fault
from phi3v.data.photo_tables import JoinedTables, PhotosTable, photo_column
from phi3v.data.saved import open_saved
from phi3v.data.tables import FilePart, OpenedTable, StreamTable, Table
from phi3v.data.tar_table import TarTable
from phi3v.data.text_guard import binary_kind, count_rows, find_text_fault, header_names
from phi3v.data.undecoded import ParsedTable, json_columns, undecoded
from phi3v.errors import DataError
from phi3v.hub_faults import hub_fault

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_logger = logging.getLogger(__name__)


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
        source: a folder, a file, a pattern such as shards/{000..123}.tar, or a hub id, with `:SPLIT` behind it for one
            split.
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
    if re.match(r"[a-z][a-z0-9+.-]+:/", source, re.IGNORECASE) and not path.exists():
        raise DataError(
            f"data set {shorten(source)} is an address, and rows are read from this machine or the hub: download it "
            "and name the file, or name a hub set as owner/name"
        )
    where = ""
    try:
        with _without_progress_bars():
            if (opened := _open_local(path, streaming, confined)) is not None:
                return opened
        if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in (*KINDS, ".tar"):
            raise DataError(f"data set {source} {not_there(path)}")
        where = "; it is no file or folder here, and was looked for on the hub: check the name and the network"
        extra = ({"name": subset} if subset else {}) | _streamed(streaming)
        commit = checked_commit(source, revision)
        found = datasets.load_dataset(source, **extra, revision=commit)
        root, within = cached_places(source, commit)
        return {split: replace(_undecoded(table, root), within=within) for split, table in found.items()}
    except DataError:
        raise
    except Exception as error:  # readers of many formats, each with exceptions of its own
        if where and (line := hub_fault(error, source)) is not None:
            raise DataError(line) from None  # what it was raised from may show the token
        told = _fault_of_files([path], error) if path.is_file() else f"{source} {_cannot(error)}"
        text = f"data set {told}{where}"
        if _without_token(str(error)) != str(error):
            raise DataError(text) from None  # what it was raised from would show the token
        raise DataError(text) from error


def _open_local(path: Path, streaming: bool, confined: bool) -> dict[str, OpenedTable] | None:
    """A file, a folder or a pattern of files; None when nothing is there."""
    if path.is_dir():
        return _open_folder(path, streaming, confined)
    known = path.suffix.lower() in (*KINDS, ".tar")
    files = [path] if path.exists() else matching(str(path)) if known else []
    for file in files:  # before anything opens it: a FIFO is waited for, and a device has no end
        contained(file, file.parent, confined=False)
    if files in ([], [path]):
        return {"train": _open_file(path, streaming)} if files else None
    if path.suffix.lower() == ".tar":
        return {"train": _open_shards(files)}
    return {"train": _by_folder(_open_data(files, streaming), files)}


def _by_folder(opened: OpenedTable, files: Sequence[Path]) -> OpenedTable:
    """The files of a pattern, each of which names images from its own folder on: a/rows.csv a.jpg in a, not in b.

    Raises: DataError where they lie in several folders and it is not known which records come from which.
    """
    if len({file.parent for file in files}) == 1:
        return opened
    if len({file.parent for file in opened.files or files}) > 1 and not opened.parts:
        told = "it is not known which rows come from which file, and image paths count from the file's folder"
        raise DataError(f"data set {files[0]} and {files[-1]}: {told}: name each folder's files as a set of its own")
    parts = tuple(replace(part, root=str(Path(part.name).parent)) for part in opened.parts)
    return replace(opened, root=str((opened.files or files)[0].parent), parts=parts)


def _open_folder(path: Path, streaming: bool, confined: bool) -> dict[str, OpenedTable]:
    """A folder of shards, of photos with their metadata, of data files, or one that `save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return {name: _undecoded(table, str(path)) for name, table in open_saved(path, confined=confined).items()}
    found = find_files(path, confined=confined)
    opened: dict[str, OpenedTable] = {}
    labelled = any(label is not None for labels in found.labels.values() for label in labels)
    for name, files in found.splits.items():
        if found.kind == "shards":
            table = _open_shards(files)
        elif found.kind == "metadata":
            table = _open_metadata(files, path, streaming, confined)
        elif found.kind == "images":
            table = OpenedTable(PhotosTable(files, found.labels[name] if labelled else None), str(path), {}, {})
        else:
            table = _open_data(files, streaming)
            table = replace(table, not_read=(*table.not_read, *partitions(files, path.resolve())))
        parts = tuple(replace(part, name=as_typed(part.name, path)) for part in table.parts)
        inner = tuple(replace(one, file=as_typed(one.file, path)) for one in table.not_read)
        root = table.root if found.kind == "metadata" else str(path)
        opened[name] = replace(table, root=root, parts=parts, not_read=(*found.not_read, *inner))
    return opened


def _open_shards(files: Sequence[Path]) -> OpenedTable:
    """Shards as one table. Raises: DataError for one that is packed, whatever its name says."""
    for path in files:
        if (packed := binary_kind(path)) is not None:
            raise DataError(f"data set {path} cannot be read: it is {packed}, and no tar: unpack it first")
    table = TarTable(files)
    parts = _parts(files, table.counts)
    return OpenedTable(table, str(files[0].parent), {}, {}, parts=parts, not_read=tuple(table.not_read))


def _parts(files: Sequence[Path], counts: Sequence[int]) -> tuple[FilePart, ...]:
    """The records by file; none where one file has all."""
    return tuple(map(FilePart, map(str, files), counts)) if len(files) > 1 else ()


def _open_metadata(files: Sequence[Path], folder: Path, streaming: bool, confined: bool) -> OpenedTable:
    """The photos of a folder by its metadata files, each of which names photos from its own place on.

    The column `file_name` becomes `image`, `file_names` becomes `images`, and `left_file_name` becomes `left`.
    Raises: DataError for a file in which two columns would become one, `file_name` and `image` for instance.
    """
    opened: list[OpenedTable] = []
    images: set[str] = set()
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following is not None and following.parent == file.parent:
            raise DataError(f"{file.parent} has {file.name} and {following.name}: keep one of them")
        its = _open_file(contained(file, folder, confined=confined), streaming)
        names = {column: photo_column(column) for column in its.table.column_names}
        renamed = {old: new for old, new in names.items() if old != new}
        if not renamed:
            raise DataError(f"{file} has no column file_name, which names the photo of a row")
        both = next((pair for pair in combinations(names, 2) if names[pair[0]] == names[pair[1]]), None)
        if both is not None:
            told = f"{file} has the columns {both[0]} and {both[1]}, and both give the column {names[both[0]]}"
            raise DataError(f"{told}: rename or drop one of them")
        images |= set(renamed.values())
        opened.append(replace(its, table=its.table.rename_columns(renamed), root=str(file.parent)))  # type: ignore[attr-defined]
    if len(opened) == 1:
        return opened[0]
    places = [file.parent.relative_to(folder).as_posix() for file in files]
    table = JoinedTables([its.table for its in opened], places, images)
    floats = {name: kind for its in opened for name, kind in its.short_floats.items()}
    counts = [_count(its.table, file) for its, file in zip(opened, files, strict=True)]
    not_read = tuple(chain.from_iterable(its.not_read for its in opened))
    return OpenedTable(table, str(folder), {}, floats, tuple(files), _parts(files, counts), not_read)


def _count(table: Table, file: Path) -> int:
    """How many records of a table come from a file, of a stream too."""
    if KINDS[file.suffix.lower()] == "json":
        return len(table)
    return count_records(file) if file.suffix.lower() == ".parquet" else count_rows(file)


def _open_file(path: Path, streaming: bool) -> OpenedTable:
    """One file."""
    if path.suffix.lower() == ".tar":
        return _open_shards([path])
    if path.suffix.lower() not in KINDS:
        way_out = way_out_of(path) or "convert it or rename it"
        raise DataError(f"data file {path} ends in none of {', '.join(KINDS)}, .tar; {way_out}")
    return _open_data([path], streaming)


def _open_data(paths: Sequence[Path], streaming: bool) -> OpenedTable:
    """Data files of one kind as one table."""
    first, root = paths[0], str(paths[0].parent)
    builder = KINDS[first.suffix.lower()]
    if other := next((path for path in paths if KINDS.get(path.suffix.lower()) != builder), None):
        raise DataError(f"data set {first} and {other} are of two kinds: name files of one")
    for path in paths:
        wrong = ends_fault(path) if builder == "parquet" else find_text_fault(path)
        if wrong is not None:
            raise DataError(f"data set {path} cannot be read: {wrong}")
    if builder == "json":
        records = JsonTable(paths)
        return OpenedTable(records, root, {}, {}, tuple(paths), _parts(paths, records.counts))
    try:
        empty = [path for path in paths if builder == "parquet" and not count_records(path)]
        if empty == list(paths):
            raise DataError(f"data set {first} cannot be read: it has no rows")
        paths = [path for path in paths if path not in empty]
        if builder == "parquet":
            extra, unread = columns_of(paths)
            extra |= _streamed(streaming)
            table = datasets.load_dataset(builder, data_files=_listed(paths), split="train", **extra)
            odd = tuple(NotRead(str(first), why) for why in unread.values())
            opened = replace(_undecoded(table, root), unread=unread, not_read=odd)
        else:
            opened = _open_csv(paths, streaming)
        counts = [_count(opened.table, path) for path in paths] if len(paths) > 1 else []
        known = streaming or sum(counts) == len(opened.table)
        not_read = (*opened.not_read, *(NotRead(str(path), "it has no rows") for path in empty))
        return replace(opened, files=tuple(paths), parts=_parts(paths, counts) if known else (), not_read=not_read)
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


def _open_csv(paths: Sequence[Path], streaming: bool) -> OpenedTable:
    """CSV or TSV files as one table with the columns of all, cells as text; a column without a name is not read."""
    nameless: list[NotRead] = []
    named: list[tuple[Path, list[str]]] = []
    for path in paths:
        header = header_names(path)
        places = [place for place, name in enumerate(header, start=1) if not name.strip()]
        if len(places) == len(header):
            raise DataError(
                f"data set {path} cannot be read: none of its columns has a name: write names into the first line"
            )
        nameless += [NotRead(f"{path}, column {place}", "a column without a name") for place in places]
        named.append((path, [name for name in header if name.strip()]))
    if len({frozenset(columns) for _, columns in named}) > 1:  # a file without rows would be refused by itself
        named = [one for one in named if count_rows(one[0])] or named[:1]
    root, tables = str(paths[0].parent), []
    for _, alike in groupby(named, lambda one: frozenset(one[1])):
        files, headers = zip(*alike, strict=True)
        options = _csv_options(files[0], headers[0]) | _streamed(streaming)
        tables.append(datasets.load_dataset("csv", data_files=_listed(files), split="train", **options))
    opened = [_undecoded(table, root) for table in tables]
    if len(opened) == 1:
        return replace(opened[0], not_read=tuple(nameless))
    joined = JoinedTables([one.table for one in opened], [root] * len(opened), images=())
    return OpenedTable(joined, root, {}, {}, not_read=tuple(nameless))


def _csv_options(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    """What `datasets` has to be told to read the cells of these columns of a CSV file as text."""
    texts = datasets.Features({name: datasets.Value("string") for name in columns})
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    return {"sep": separator, "features": texts, "usecols": columns, "keep_default_na": False, "na_values": [""]}


def _undecoded(table: Any, root: str) -> OpenedTable:
    """A table whose images stay files or bytes, with what the types of its columns say."""
    with _without_progress_bars():
        table = undecoded(table)
    features = table.features or {}
    labels = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    dtypes = {name: getattr(kind, "dtype", None) for name, kind in features.items()}
    floats = {name: dtype for name, dtype in dtypes.items() if dtype in ("float32", "float16")}
    opened = StreamTable(table) if isinstance(table, datasets.IterableDataset) else table
    if opened is table and date_columns(features):
        opened = DatedTable(table)
    if parsed := json_columns(features):
        opened = ParsedTable(opened, parsed)
    return OpenedTable(opened, root, labels, floats)


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
    if (other := find_misfit(paths)) is not None:
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
