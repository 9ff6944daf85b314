"""Which files of a folder are its data, of which split, and which are not read: found inside the folder, nowhere else.

In comes a folder, or a pattern of files; out come the files of each split, all of one kind, and what is left over, each
with its reason. What a folder says about itself, a dataset card with its `data_files` or a script, is not obeyed. Links
to folders are not followed; a data file that is a link counts where it leads, which must be inside the folder unless
the caller allows more. Opens no file but, where photos are the data, those whose name says nothing, for their first
bytes.

A split is told by a folder's name, else by a file's, as `datasets` does it: test/a.csv, my-test.csv and
data/test-00000-of-00001.parquet are of the split `test`; where no name tells, all files are `train`. Of photos only a
folder whose whole name is that of a split tells one: train-station/ is a class, and steam-train.png a photo.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath

from phi3v.data.images import begins_as_image
from phi3v.data.not_read import NotRead
from phi3v.errors import DataError

KINDS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Ending -> what kind of data it holds."""

_SHARD = ".tar"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_IMAGES = {f".{ending}": "images" for ending in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")}
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json")
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_WAYS_OUT = {
    **dict.fromkeys(
        (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), "unpack it, and name the file or folder in it"
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "export its rows as CSV (UTF-8), and name that file"),
}
"""Ending -> what to do about a file that is not read."""
_SHARDED = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*")
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPAN = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_NO_SPLIT = "its name tells no split, and the names of others do"
_NO_IMAGE = "by its content no JPEG, PNG, WebP, GIF, BMP or TIFF"
_NO_ROW = "no row that can be used names it"
_NO_DATA_NO_ROW = f"no data by its ending, and {_NO_ROW}"
_MOST_NAMES = 100_000  # of a pattern: {0..999999999} is a slip


@dataclass(frozen=True)
class FolderFiles:
    """The data of a folder.

    Attributes:
        kind: "shards", "metadata" (of photos), "csv", "tsv", "json", "parquet" or "images".
        splits: split -> its files, in the order of their names.
        labels: of photos, split -> the class of each file by its folder, None for one that lies in none; else empty.
        not_read: the others.
    """

    kind: str
    splits: dict[str, list[Path]]
    labels: dict[str, list[str | None]] = field(default_factory=dict, compare=False)
    not_read: tuple[NotRead, ...] = field(default=(), compare=False)


def find_files(folder: Path, *, confined: bool = True) -> FolderFiles:
    """The data files of a folder: shards, else metadata of photos, else of several kinds the one with the most files,
    images only where there is no other. Shards and metadata count where every data file lies beside or below one.

    Example: train.csv, val.csv, README.md and photos/a.jpg -> FolderFiles("csv", {"train": [.../train.csv],
    "validation": [.../val.csv]}) with README.md and photos/a.jpg not read, unless rows name them.
    Raises: DataError when there are none, as many of one kind as of another, or one that leads out of the folder; a
            photo that is not there, leads out or is no file is a problem of its row, unless all are.
    """
    found, passed = _walk(folder)
    kind = _kind(folder, found)
    files = [path for path in found if _is_of(path, kind, folder, confined=confined)]
    if not files:
        wrong = f"it doesn't contain any data files ({', '.join(KINDS)}, .tar, or images)"
        other = next((f"; of {path.name}: {way_out}" for path in found if (way_out := way_out_of(path))), "")
        raise DataError(f"data set {folder} cannot be read: {wrong}{other}")
    tellers = [_of_whole_folder] if kind == "images" else [_of_shard, _of_folder, _of_name]
    splits = _splits({path.relative_to(folder).as_posix(): path for path in files}, tellers)
    labels = {split: [_label(path.relative_to(folder)) for path in paths] for split, paths in splits.items()}
    chosen, read = set(files), {path for paths in splits.values() for path in paths}
    others = [_not_read(path, kind, chosen=path in chosen) for path in found if path not in read]
    real = _real(sorted(read), folder, confined=confined, each_a_row=kind == "images")
    if kind != "metadata":  # of these the place counts, not where a link leads
        splits = {split: [real[path] for path in paths] for split, paths in splits.items()}
    return FolderFiles(kind, splits, labels if kind == "images" else {}, (*passed, *others))


def _real(files: Sequence[Path], folder: Path, *, confined: bool, each_a_row: bool) -> dict[Path, Path]:
    """Where each file is, links followed. Raises: DataError for one that must not be read.

    With `each_a_row` such a file, a photo, keeps its name and is the problem of its row, unless all are such files.
    """
    real: dict[Path, Path] = {}
    wrong: list[DataError] = []
    for path in files:
        try:
            real[path] = contained(path, folder, confined=confined)
        except DataError as error:
            if not each_a_row:
                raise
            real[path] = path.absolute()  # rows count paths from the folder
            wrong.append(error)
    if wrong and len(wrong) == len(files):
        raise wrong[0]
    return real


def way_out_of(path: Path) -> str | None:
    """What to do about a file of another kind, by its ending: "photos.tar.gz" -> "unpack it, ..."; None for others."""
    return _WAYS_OUT.get(path.suffix.lower())


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
        raise DataError(f"data file {path} is no regular file: put the file itself there, or take it out")
    return real


def as_typed(name: str, folder: Path) -> str:
    """The name of a file below a folder, as the user named the folder: "/home/ann/set/a.csv", "set" -> "set/a.csv"."""
    real = folder.resolve()
    return str(folder / Path(name).relative_to(real)) if Path(name).is_relative_to(real) else name


def not_there(path: Path) -> str:
    """Why nothing was found at a path, or by a pattern."""
    if not path.exists() and (others := matching(str(path))):
        return f"names files that end in none of {', '.join(KINDS)}, .tar: {others[0]} for instance"
    if path.is_absolute():
        return "does not exist"
    return f"does not exist (looked in {Path.cwd()}): relative paths count from the folder in which phi3v is started"


def matching(pattern: str) -> list[Path]:
    """The files of a pattern: of {000..002} and {a,b} each that it names, of *, ? and [...] those that are there.

    Example: "{000..001}.tar" -> [000.tar, 001.tar]; "shards/*.tar" -> all that there are, sorted; "a.csv" -> [].
    Raises: DataError for a file of {} that is not there, or a pattern of more than 100,000 names.
    """
    names = list(islice(_unfolded(pattern), _MOST_NAMES + 1))
    if len(names) > _MOST_NAMES:
        raise DataError(f"data set {pattern} names more than {_MOST_NAMES:,} files: mend what stands in braces")
    found: list[Path] = []
    for name in names:
        files = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob(name, recursive=True)))
        if not files and names != [pattern]:
            raise DataError(f"data file {name}, which {pattern} names, does not exist (looked in {Path.cwd()})")
        found += files
    return found


def _unfolded(pattern: str) -> Iterator[str]:
    """A pattern once for each of its braces' names: "a{1,2}b" -> "a1b", "a2b"; "{08..10}" -> "08", "09", "10"."""
    place = _BRACES.search(pattern)
    if place is None:
        yield pattern
        return
    names: Iterator[str] | list[str] = place[1].split(",") if "," in place[1] else [place[0]]
    if span := _SPAN.fullmatch(place[1]):
        width = len(span[1]) if span[1].startswith("0") else 0
        names = (f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1))
    for name in names:
        yield from (pattern[: place.start()] + name + rest for rest in _unfolded(pattern[place.end() :]))


def _walk(folder: Path) -> tuple[list[Path], list[NotRead]]:
    """All files below a folder that may hold data, sorted, and what is passed over: hidden things, links to folders."""
    found: list[Path] = []
    passed: list[NotRead] = []
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            path, end = Path(place, name), "/" if name in folders else ""
            if name.startswith((".", "__")):
                passed.append(NotRead(f"{path}{end}", "hidden: its name begins with . or __", by_rows=True))
            elif end and path.is_symlink():
                passed.append(NotRead(f"{path}/", "a link to a folder, which is not followed", by_rows=True))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith((".", "__")) and name not in _NO_DATA:
                found.append(Path(place, name))
    return found, passed


def _kind(folder: Path, found: Sequence[Path]) -> str:
    """What the data of a folder are. Raises: DataError for as many of one kind as of another."""
    data = [path for path in found if path.suffix.lower() in KINDS]
    shards = [path.parent for path in found if path.suffix.lower() == _SHARD]
    photos = sum(path.suffix.lower() in _IMAGES for path in found)
    homes = set(shards)
    if folder in homes or (homes and all(path.parent in homes for path in data) and len(shards) >= photos):
        return "shards"
    homes = {path.parent for path in data if path.name in _METADATA}
    if homes and not any(homes.isdisjoint(path.parents) for path in data):
        return "metadata"
    kinds = Counter(KINDS[path.suffix.lower()] for path in data).most_common()
    if len(kinds) > 1 and kinds[0][1] == kinds[1][1]:
        raise DataError(f"data set {folder} holds {kinds[0][0]} and {kinds[1][0]} files: name the file that is meant")
    return kinds[0][0] if kinds else "images"


def _is_of(path: Path, kind: str, folder: Path, *, confined: bool) -> bool:
    """Whether a file is of the kind that is read; a photo of an unknown ending by its content."""
    ending = path.suffix.lower()
    if kind == "metadata":
        return path.name in _METADATA
    known = {**KINDS, **_IMAGES, _SHARD: "shards"}.get(ending)
    if known is not None or kind != "images":
        return known == kind
    try:
        with open(contained(path, folder, confined=confined), "rb") as file:
            return begins_as_image(file.read(16))
    except (DataError, OSError):
        return False


def _not_read(path: Path, kind: str, *, chosen: bool) -> NotRead:
    """Why a file is not read where files of a kind are."""
    ending = path.suffix.lower()
    if chosen:
        return NotRead(str(path), _NO_SPLIT)
    if ending in KINDS or ending == _SHARD or kind == "shards":
        what = {"shards": ".tar", "images": "image"}.get(kind, kind)
        return NotRead(str(path), f"{what} files are read here: name it itself to read it")
    if kind == "images":
        return NotRead(str(path), _NO_IMAGE)
    return NotRead(str(path), _NO_ROW if ending in _IMAGES else _NO_DATA_NO_ROW, by_rows=True)


def _splits(files: dict[str, Path], tellers: Sequence[Callable[[str], str | None]]) -> dict[str, list[Path]]:
    """Files by split; those whose names tell none are left out where others do.

    Example: {"test/a.csv": ..., "b.csv": ...} -> {"test": [test/a.csv]}; {"b.csv": ...} -> {"train": [b.csv]}.
    """
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


def _of_whole_folder(name: str) -> str | None:
    """ "test/train-station/a.jpg" -> "test", "train-station/a.jpg" -> None."""
    return next((split for part in PurePosixPath(name).parts[:-1] if (split := _called(part)) is not None), None)


def _label(photo: PurePath) -> str | None:
    """The class of a photo by its folder: train/cat/a.jpg, cat/train/a.jpg -> "cat"; train/a.jpg, a.jpg -> None."""
    classes = [part for part in photo.parts[:-1] if _called(part) is None]
    return classes[-1] if classes else None


def _called(part: str) -> str | None:
    """The split that a whole name is: "val" -> "validation", "my-val" -> None."""
    return next((split for split, words in _KEYWORDS.items() if part in words.split("|")), None)


def _of_name(name: str) -> str | None:
    """ "photos/train-2.csv" -> "train"."""
    return _named(PurePosixPath(name).stem)


def _named(part: str) -> str | None:
    """The split that one name holds as a word of its own: "my-val.2" -> "validation", "trained" -> None."""
    for split, words in _KEYWORDS.items():
        if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", part):
            return split
    return None
