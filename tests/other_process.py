"""A lock that another process holds, for tests of who is refused meanwhile."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from phi3v.run_lock import RunLock


@contextmanager
def holding(lock: RunLock) -> Iterator[int]:
    """A process that holds a lock until it is killed at the end of the context; yields its number."""
    child = os.fork()
    if not child:
        lock.take()
        time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while not lock.file.is_file() or f'"process": {child},' not in lock.file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
