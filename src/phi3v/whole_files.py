"""Files and folders put in place whole: a reader, or a crash, finds the old content or the new one.

What is written goes beside its place, is seen onto the disk, and is moved by one rename.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    """
    fresh, old = path.with_name(f".{path.name}.new.tmp"), path.with_name(f".{path.name}.old.tmp")
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
