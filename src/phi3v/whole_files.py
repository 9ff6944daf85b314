"""Files and folders put in place whole: a reader, or a crash, finds the old content or the new one.

What is written goes beside its place, is seen onto the disk, and is moved by one rename. `refuse_foreign` is
asked before where a person named the place: a file that is not ours stays.
"""

import gzip
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError

_BEGINNING = 4096  # bytes in which a file of ours has its mark


_FILLING = ".new.tmp"
"""Ends the name of a folder that is being filled."""
_HELD = ".unfinished"
"""Ends the name of a file that is held back until its folder is in place."""


def is_unfinished(path: Path) -> bool:
    """Whether a folder is, or lies in, what a crash left of `replace_folder`: ".shop.new.tmp/merged" -> True."""
    left = (place for place in (path, *path.parents) if place.name.startswith(".") and place.name.endswith(_FILLING))
    return any(left) or any(path.glob(f"*{_HELD}"))


def held_back(file: Path) -> Path:
    """Where `replace_folder`'s `save` writes a file without which nothing loads what it fills.

    Example: "config.json" -> "config.json.unfinished", which has its own name again once the folder is in place.
    """
    return file.with_name(file.name + _HELD)


def own_name(name: str) -> str:
    """The name that a file will have: "config.json.unfinished" -> "config.json"."""
    return name.removesuffix(_HELD)


def refuse_foreign(option: str, file: Path, mark: str, kind: str) -> None:
    """Refuses to write over anything but a file of ours, which holds `mark` in its first 4 KiB (unpacked, of gzip).

    So neither a recipe nor a data set is lost to a slip. Example: refuse_foreign("--out", Path("shop.yaml"), "<meta>",
    "page of phi3v compare") -> ConfigError("--out shop.yaml is there and is no page of phi3v compare: name ...").
    Raises: ConfigError.
    """
    if not file.exists():
        return
    try:
        begin = _beginning(file) if file.is_file() else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{option} {file} is there and cannot be read ({error}): name another file") from error
    if mark.encode() not in begin:
        raise ConfigError(f"{option} {file} is there and is no {kind}: name another file, or remove it")


def _beginning(file: Path) -> bytes:
    """The first bytes of a file, unpacked where gzip packed it."""
    with open(file, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(file) if packed else open(file, "rb") as content:
        return content.read(_BEGINNING)


def replace_file(path: Path, content: str | bytes) -> None:
    """Puts `content` at `path` so that a reader, or a crash, finds the old or the new content whole."""
    data = content.encode() if isinstance(content, str) else content
    fill_file(path, lambda temporary: temporary.write_bytes(data))


def fill_file(path: Path, save: Callable[[Path], Any]) -> None:
    """Lets `save` write a file beside `path`, then puts it in place of `path`, as `replace_file` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_folder(path: Path, save: Callable[[Path], Any]) -> None:
    """Lets `save` fill a folder beside `path`, then puts it in place of `path`.

    After a crash `path` is the old folder, or the new one, or (between two renames) absent with the old one beside it
    as `.<name>.old.tmp`, which the next call puts back before it begins. Of a `save` that fails nothing stays.
    What `save` has `held_back` gets its name last, so that a crash leaves no other folder that loads beside `path`.
    """
    fresh, old = path.with_name(f".{path.name}{_FILLING}"), path.with_name(f".{path.name}.old.tmp")
    if old.exists() and not path.exists():
        os.replace(old, path)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        save(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for file in fresh.rglob("*"):
        if file.is_file():
            sync_file(file)
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    sync_folder(path.parent)
    for file in path.glob(f"*{_HELD}"):
        os.replace(file, file.with_name(own_name(file.name)))
    sync_folder(path)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Sees what was written into a file onto the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Sees a rename inside `path` onto the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
