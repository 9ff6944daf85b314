"""Files that are being written: a folder of one's own in tmp/, and one step to a place where others read.

For caches that many processes fill at once. A file comes to its place complete: written in tmp/, synced, renamed. A
process that is killed leaves files in tmp/ alone, and the next one removes them: a folder there is alive while its lock
is held, which ends with its process however that ends. Knows nothing of what is in the files.
"""

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STALE_SECONDS = 24 * 3600.0
"""How long a folder in tmp/ was not touched that is removed although its lock says nothing: another machine's, because
file systems keep some locks to one machine, or any on a file system without locks."""
_LOCK = "lock"
_MOST_TRIES = 1000  # each is lost only where another process removes the folder in the same moment


class Scratch:
    """A new folder in tmp/, to be closed; making it, and closing it, removes what killed processes left there.

    Args:
        temporary: tmp/ itself, on the file system that the files are for; not there while nobody writes.
    Raises: OSError when there can be no such folder.
    """

    def __init__(self, temporary: Path) -> None:
        """Make the folder."""
        self._temporary = temporary
        _remove_abandoned(temporary)
        self.folder, self._lock = _own_folder(temporary)

    def file(self) -> Path:
        """The name of a file to write into."""
        return self.folder / uuid.uuid4().hex

    def close(self) -> None:
        """Remove the folder with what is in it."""
        _remove(self.folder)
        os.close(self._lock)
        _remove_abandoned(self._temporary)


def move(file: Path, place: Path) -> None:
    """A file to its place, in one step."""
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, place)


def file_size(path: Path) -> int | None:
    """Size of a regular file; None when there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


@contextmanager
def alone(lock_file: Path) -> Iterator[int]:
    """Waits until no other process is inside with the same file, and yields it open, for reading and writing.

    Where the file system, or Windows, has no locks of this kind it does not wait.
    Raises: OSError when the file cannot be opened.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(lock_file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        _locked(lock, wait=True)
        yield lock
    finally:
        os.close(lock)  # and with it the lock


def _own_folder(temporary: Path) -> tuple[Path, int]:
    """A new folder in tmp/, and the open lock that shows that its process lives.

    The lock ends with the process, however it ends. Another process may remove the folder in the moment between its
    making and its locking; then a new one is made. Raises: OSError when there can be none.
    """
    temporary.parent.mkdir(parents=True, exist_ok=True)  # below /proc the system says "not found" for "cannot be made"
    for _ in range(_MOST_TRIES):
        own = temporary / f"{_machine()}-{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):  # tmp/ or the folder was removed by another process
            own.mkdir(parents=True)
            lock = os.open(own / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
            if _locked(lock) is not False and (own / _LOCK).exists():
                return own, lock
            os.close(lock)
    raise OSError(f"a new folder in {temporary} was gone {_MOST_TRIES} times")


def _machine() -> str:
    """What this machine's folders in tmp/ begin with."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _locked(lock: int, *, wait: bool = False) -> bool | None:
    """Takes a lock; False when another holds it, None when the file system, or Windows, has no locks of this kind."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return None
    return True


def _remove_abandoned(temporary: Path) -> None:
    """Removes the folders in tmp/ whose process is gone, then tmp/ when it is empty."""
    try:
        names = os.listdir(temporary)
    except FileNotFoundError:
        return
    for name in names:
        with suppress(OSError):  # another process does the same
            _remove_if_abandoned(temporary / name)
    with suppress(OSError):
        temporary.rmdir()


def _remove_if_abandoned(own: Path) -> None:
    """Removes a folder in tmp/ whose lock is free; where locks say nothing, one that nobody touched for a day."""
    old = time.time() - own.stat().st_mtime > _STALE_SECONDS
    try:
        lock = os.open(own / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        if old:
            _remove(own)
        own.rmdir()  # of a process that was killed before it had a lock; fails where there are files
        return
    try:
        taken = _locked(lock)
        if (taken and own.name.startswith(_machine())) or (taken is not False and old):
            _remove(own)
    finally:
        os.close(lock)


def _remove(own: Path) -> None:
    """Removes a folder in tmp/, the lock last: killed in between, what is left is still seen as abandoned."""
    with suppress(OSError):
        for file in sorted(own.iterdir(), key=lambda file: file.name == _LOCK):
            file.unlink()
        own.rmdir()
