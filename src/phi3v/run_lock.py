"""One run in one folder at a time: a lock that the system takes back from a process that is gone.

The lock is held on `run.lock`, which says who holds it and stays where it is. A process that dies, however, holds it no
more, so the next one takes it over; a process that was forked from its holder does not hold it.
"""

import errno
import json
import os
import platform
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError

LOCK_FILE = "run.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """The lock of a run's folder; `take` and `give_back` may be called more than once.

    Example: `lock = RunLock("runs/shop"); lock.take()` while process 12 trains there raises "runs/shop is being trained
    by process 12 on this machine: ...".
    """

    def __init__(self, folder: str | Path, name: str = LOCK_FILE) -> None:
        """Name the folder, which has to be there when the lock is taken, and the file."""
        self.file = Path(folder) / name
        self._handle: Any = None

    @property
    def held(self) -> bool:
        """Whether the lock is held; after `take` it is not where the file system has no locks."""
        return self._handle is not None

    def take(self) -> None:
        """Takes the lock. Raises: ConfigError when another process holds it.

        Where the system or the file system has no locks nothing is held.
        """
        if self._handle is not None or os.name != "posix":
            return
        import fcntl

        try:
            handle = open(self.file, "a+", encoding="utf-8")  # noqa: SIM115 -- open as long as the lock is held
        except OSError:
            return  # nothing can be written here, by no other process either
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                holder = _holder(handle)
                handle.close()
                raise ConfigError(
                    f"{self.file.parent} is being trained by {holder}: wait for it, end it, or give another output"
                ) from error
            handle.close()  # ENOLCK, ENOTSUP: a network's file system without locks
            return
        handle.truncate(0)
        handle.write(json.dumps({"process": os.getpid(), "machine": platform.node()}) + "\n")
        handle.flush()
        self._handle = handle

    def give_back(self) -> None:
        """Gives the lock back, where it is held."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _holder(handle: Any) -> str:
    """Who holds the lock, in words."""
    try:
        handle.seek(0)
        told = json.loads(handle.read())
        return f"process {told['process']} on {told['machine']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
