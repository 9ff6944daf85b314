"""One process that writes into a folder, or one file, at a time: a lock that the system takes back from a process that
is gone.

The lock is held on `run.lock`, which says who holds it for what and stays where it is. A process that dies, however,
holds it no more, so the next one takes it over; a process that was forked from its holder does not hold it.
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

    A process must not take a lock that it holds by another `RunLock`: giving back either would give back both.
    """

    def __init__(
        self, folder: str | Path, name: str = LOCK_FILE, *, doing: str = "trained", what: str | None = None
    ) -> None:
        """Name the lock; nothing is taken.

        Args:
            folder: it has to be there when the lock is taken.
            name: the file.
            doing: what is being done with the folder while this lock is held, for others to read.
            what: what others are told is in use; None for the folder.
        """
        self.file = Path(folder) / name
        self.doing, self.what = doing, what or str(folder)
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
                held = _how_held(handle, self.doing)
                handle.close()
                raise ConfigError(
                    f"{self.what} is being {held}: wait for it, end it, or give another output"
                ) from error
            handle.close()  # ENOLCK, ENOTSUP: a network's file system without locks
            return
        handle.truncate(0)
        told = {"process": os.getpid(), "machine": platform.node(), "doing": self.doing}
        handle.write(json.dumps(told) + "\n")
        handle.flush()
        self._handle = handle

    def give_back(self) -> None:
        """Gives the lock back, where it is held."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _how_held(handle: Any, doing: str) -> str:
    """What is done by whom, in words: "trained by process 12 on mill"."""
    try:
        handle.seek(0)
        told = json.loads(handle.read())
        return f"{told.get('doing', doing)} by process {told['process']} on {told['machine']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{doing} by another process"
