"""Which files of a folder are its data, and of which split: found here, inside the folder, and nowhere else.

In comes a folder; out come the files of each split, all of one kind. What a folder says about itself, a dataset card
with its `data_files` or a script, is not obeyed. Links to folders are not followed; a data file that is a link counts
where it leads, which must be inside the folder unless the caller allows more. Opens no file.

A split is told by a folder's name, else by a file's, as `datasets` does it: test/a.csv, my-test.csv and
data/test-00000-of-00001.parquet are of the split `test`; where no name tells, all files are `train`.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phi3v.errors import DataError

KINDS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Ending -> what kind of data it holds."""

_IMAGES = {f".{ending}": "images" for ending in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")}
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json")
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SHARDED = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*")


@dataclass(frozen=True)
class FolderFiles:
    """The data of a folder.

    Attributes:
        kind: "csv", "tsv", "json", "parquet" or "images".
        splits: split -> its files, in the order of their names.
    """

    kind: str
    splits: dict[str, list[Path]]


def find_files(folder: Path, *, confined: bool = True) -> FolderFiles:
    """The data files of a folder; of several kinds the one with the most files, images only where there is no other.

    Example: train.csv, val.csv, README.md and photos/a.jpg -> FolderFiles("csv", {"train": [.../train.csv],
    "validation": [.../val.csv]}).
    Raises: DataError when there are none, as many of one kind as of another, or one that leads out of the folder; a
            photo that is not there is a problem of its row, unless no photo is.
    """
    found = list(_walk(folder))
    kinds = Counter(KINDS[path.suffix.lower()] for path in found if path.suffix.lower() in KINDS).most_common()
    if not kinds and not any(path.suffix.lower() in _IMAGES for path in found):
        raise DataError(
            f"data set {folder} cannot be read: it doesn't contain any data files ({', '.join(KINDS)}, .tar, or images)"
        )
    if len(kinds) > 1 and kinds[0][1] == kinds[1][1]:
        raise DataError(f"data set {folder} holds {kinds[0][0]} and {kinds[1][0]} files: name the file that is meant")
    kind = kinds[0][0] if kinds else "images"
    files = [path for path in found if (KINDS | _IMAGES).get(path.suffix.lower()) == kind]
    splits = _splits({path.relative_to(folder).as_posix(): path for path in files})
    inside = {
        split: [
            path if kind == "images" and not path.exists() else contained(path, folder, confined=confined)
            for path in paths
        ]
        for split, paths in splits.items()
    }
    if not any(path.exists() for paths in inside.values() for path in paths):
        contained(files[0], folder, confined=confined)
    return FolderFiles(kind, inside)


def contained(path: Path, folder: Path, *, confined: bool = True) -> Path:
    """The file itself, links followed. Raises: DataError when it is none, or lies outside the folder and must not."""
    try:
        real = Path(os.path.realpath(path))
        regular = stat.S_ISREG(os.stat(real).st_mode)
    except OSError as error:
        raise DataError(f"data file {path} cannot be reached: {error.strerror}") from error
    if confined and not real.is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"data file {path} is a link that leads outside {folder}: copy the file there, name it itself, or allow it "
            "with data.allow_outside_root: true"
        )
    if not regular:
        raise DataError(f"data file {path} is no regular file")
    return real


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder that may hold data, sorted, whatever lies in hidden folders left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith((".", "__")) and name not in _NO_DATA:
                yield Path(place, name)


def _splits(files: dict[str, Path]) -> dict[str, list[Path]]:
    """Files by split; those whose names tell none are left out where others do.

    Example: {"test/a.csv": ..., "b.csv": ...} -> {"test": [test/a.csv]}; {"b.csv": ...} -> {"train": [b.csv]}.
    """
    tellers: list[Callable[[str], str | None]] = [_of_shard, _of_folder, _of_name]
    for teller in tellers:
        told = {name: split for name in files if (split := teller(name)) is not None}
        if told:
            order = list(dict.fromkeys([*(split for split in _KEYWORDS if split in told.values()), *told.values()]))
            return {split: [files[name] for name, its in told.items() if its == split] for split in order}
    return {"train": list(files.values())}


def _of_shard(name: str) -> str | None:
    """ "data/train_sft-00000-of-00002.parquet" -> "train_sft"."""
    found = _SHARDED.fullmatch(name)
    return found[1] if found else None


def _of_folder(name: str) -> str | None:
    """ "my_test/a.csv" -> "test"."""
    return next((split for part in PurePosixPath(name).parts[:-1] if (split := _named(part)) is not None), None)


def _of_name(name: str) -> str | None:
    """ "photos/train-2.csv" -> "train"."""
    return _named(PurePosixPath(name).stem)


def _named(part: str) -> str | None:
    """The split that one name holds as a word of its own: "my-val.2" -> "validation", "trained" -> None."""
    for split, words in _KEYWORDS.items():
        if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", part):
            return split
    return None
