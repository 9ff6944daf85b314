"""What lies in a data folder and is not read: files, folders and splits, each with its reason.

Photos that lie beside a data file are read when a row names them. In come what a folder has beside its data, and rows;
out comes what no row named.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from phi3v.data.schema import ImageRef


@dataclass(frozen=True, slots=True)
class NotRead:
    """A file, a folder, a member of a shard or a split that is not read, and why.

    Attributes:
        file: its name for people; of a folder with / at its end.
        reason: half a sentence.
        by_rows: whether a row may still name it, as photos beside a data file are named.
        files: how many it stands for.
    """

    file: str
    reason: str
    by_rows: bool = False
    files: int = 1


class NamedFiles:
    """Which of the files and folders beside the data rows name.

    Example: beside the data lie a.jpg, b.jpg and the linked folder more/, and rows name a.jpg and more/c.jpg: `names`
    are a.jpg and more/.
    """

    def __init__(self, beside: Sequence[NotRead]) -> None:
        """Keep what rows may name."""
        places = {os.path.abspath(one.file): one.file for one in beside if one.by_rows}
        self._files = {place: name for place, name in places.items() if not name.endswith("/")}
        self._folders = {f"{place}{os.sep}": name for place, name in places.items() if name.endswith("/")}
        self.names: set[str] = set()

    def note(self, images: Iterable[ImageRef]) -> None:
        """Marks what the images of a row lie in."""
        if not self._files and not self._folders:
            return
        for image in images:
            if image.path is None or image.data is not None or image.url is not None:
                continue
            place = os.path.abspath(os.path.join(image.root or "", image.path))
            if place in self._files:
                self.names.add(self._files[place])
            self.names.update(name for folder, name in self._folders.items() if place.startswith(folder))


def partitions(files: Iterable[Path], folder: Path) -> list[NotRead]:
    """The columns that names of folders hold, as `country=US/part-0.parquet` holds `country`: none of them is read."""
    below = [file for file in files if file.is_relative_to(folder)]
    names = [name for file in below for name in file.relative_to(folder).parts[:-1]]
    columns = dict.fromkeys(name.partition("=")[0] for name in names if "=" in name)
    reason = "a column that names of folders hold: write it into the files"
    return [NotRead(f"{folder}/{column}=...", reason) for column in columns]


def unnamed(found: Iterable[Iterable[NotRead]], names: Collection[str]) -> list[NotRead]:
    """What is not read of any of some sets, each once, without what rows name."""
    return [one for one in dict.fromkeys(chain.from_iterable(found)) if one.file not in names]
