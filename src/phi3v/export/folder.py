"""The folder of an export: new or empty, on a disk with room, there whole or not at all, with a digest for each file.

In comes a place and what fills it. Knows nothing about formats.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from phi3v.digests import DIGESTS, folder_digests
from phi3v.errors import CheckpointError, ConfigError, Phi3VError
from phi3v.passthrough import first_line
from phi3v.targets import read_json
from phi3v.whole_files import is_unfinished, replace_folder

_MARGIN = 64 * 2**20
"""Bytes for tokenizer, card and small files."""


def refuse_used(out: Path) -> None:
    """Raises: ConfigError where `out` is a file, holds something, or lies where nothing can be written."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder that is new or empty")
    if is_unfinished(out.absolute()):
        raise ConfigError(f"--out {out} was never completed, whatever wrote it was killed: remove it, or name another")
    if out.exists() and (found := sorted(entry.name for entry in out.iterdir())):
        raise ConfigError(f"--out {out} holds {found[0]}: name a folder that is new or empty")
    above = _existing(out.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "cannot be written to" if above.is_dir() else "is a file"
        raise ConfigError(f"--out {out} cannot be made ({above} {why}): name another folder")


def check_space(folder: Path, needed: int) -> None:
    """Raises: ConfigError where the disk of `folder`, which need not be there yet, has less room than is needed."""
    free = shutil.disk_usage(_existing(folder.absolute())).free
    if needed + _MARGIN > free:
        place = next(above for above in folder.absolute().parents if not is_unfinished(above))
        raise ConfigError(
            f"the export needs {(needed + _MARGIN) / 10**9:.2f} GB, and {free / 10**9:.2f} GB are free in {place}: "
            "free space, or name a folder on another disk"
        )


def fill_whole(out: Path, fill: Callable[[Path], Any]) -> None:
    """Lets `fill` write into a folder beside `out` and puts it there when complete; of a failure nothing stays."""
    try:
        replace_folder(Path(os.path.abspath(out)), fill)  # "." has no name
    except (OSError, SafetensorError) as error:
        if isinstance(error, Phi3VError):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "the disk is full" if full else first_line(error)
        raise CheckpointError(f"the export to {out} failed ({reason}): free space, or name another folder") from error


def check_digests(folder: Path) -> None:
    """Reads an export through and compares each file with digests.json.

    What the hub's own tools add to a copy (.git, .gitattributes, .cache) is passed over.

    Raises: CheckpointError that names the first file which is missing, changed, or was not exported.
    """
    noted, found = read_json(folder / DIGESTS).get("sha256"), folder_digests(folder)
    if not isinstance(noted, dict):
        raise CheckpointError(f"{folder / DIGESTS} has no mapping sha256: export again")
    for name in sorted(noted.keys() | found.keys()):
        if noted.get(name) != found.get(name):
            what = "missing" if name not in found else "changed" if name in noted else "no file of the export"
            raise CheckpointError(f"{folder / name} is {what}: copy the export again")


def _existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
