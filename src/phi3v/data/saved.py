"""Folders that `save_to_disk` wrote: opened after a look at the paths that stand in them.

state.json names the Arrow files of a split, and dataset_dict.json its splits; both are text that anybody may have
written. So are the offsets in an Arrow file, which say where a text begins and ends, and which no reader compares with
the length of the file: each is looked at before anything is read by it. In comes a folder; out come the tables of its
splits, read from files inside the folder alone.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from phi3v.data.folder import contained
from phi3v.errors import DataError

_MEND = "copy the folder again, or save the set again with save_to_disk"


def open_saved(path: Path, *, confined: bool = True) -> dict[str, datasets.Dataset]:
    """The splits of a saved set.

    Raises: DataError for a file that is named outside its folder, is not there, or is damaged.
    Example: a folder with dataset_dict.json {"splits": ["train", "test"]} -> {"train": ..., "test": ...}.
    """
    names: list[str] | None = None
    if (path / "dataset_dict.json").is_file():
        names = _entries(_read(path / "dataset_dict.json", path, confined), "splits", path)
    folders = {"train": path} if names is None else {name: path / _plain(name, path) for name in names}
    for folder in folders.values():
        state = _read(folder / "state.json", path, confined)
        contained(folder / "dataset_info.json", path, confined=confined)
        for entry in [*_entries(state, "_data_files", folder), *(state.get("_indices_data_files") or [])]:
            name = entry.get("filename") if isinstance(entry, dict) else None
            _check_arrow(contained(folder / _plain(name, folder), path, confined=confined))
    return {name: datasets.Dataset.load_from_disk(str(folder.resolve())) for name, folder in folders.items()}


def _check_arrow(file: Path) -> None:
    """Looks through an Arrow file: offsets, indices and texts of every column; bytes of images are not read.

    Raises: DataError for the first that is wrong: an offset behind the end of the file would be read as text from
    memory that is not the file's, or end the process.
    """
    first = 0
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    _check_column(file, name, column, first)
                batch.validate()
                first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"data set {file} cannot be read: nothing reads from row {first} on ({_words(error)}): {_MEND}"
        ) from error


def _check_column(file: Path, name: str, column: pa.Array, first: int) -> None:
    """Raises: DataError for a column of a batch that does not fit its file."""
    try:
        column.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        place = f"column {name!r}, rows {first} to {first + len(column) - 1}"
        raise DataError(f"data set {file} cannot be read: {place}: {_words(error)}: {_MEND}") from error


def _words(error: BaseException) -> str:
    """An exception as part of a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _read(file: Path, root: Path, confined: bool) -> dict[str, Any]:
    """A JSON file of the folder that holds a mapping."""
    try:
        value = json.loads(contained(file, root, confined=confined).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not JSON: save the set again with save_to_disk") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds no mapping: save the set again with save_to_disk")
    return value


def _entries(value: dict[str, Any], key: str, folder: Path) -> list[Any]:
    """A list in a mapping."""
    found = value.get(key)
    if not isinstance(found, list):
        raise DataError(f"{folder} has no list {key}: save the set again with save_to_disk")
    return found


def _plain(name: Any, folder: Path) -> str:
    """A name that leads nowhere: "data-00000-of-00001.arrow", not "../other.arrow". Raises: DataError."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise DataError(f"{folder} names {str(name)[:80]!r} as one of its files, which is no plain name in that folder")
    return name
