"""What Linux does with a process whose parent dies: two switches of prctl(2), which Python's library does not have."""

import contextlib
import ctypes
import os
import signal

_PDEATHSIG, _CHILD_SUBREAPER = 1, 36


def end_with_parent(parent: int) -> None:
    """This process is killed when its parent is, whatever it is at.

    The kernel looks at the thread that forked: it must be one that lives as long as its process, such as the main one.

    Args:
        parent: its process id, asked before the fork; where it is gone by now, this process ends at once.
    """
    ctypes.CDLL(None).prctl(_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Grandchildren whose parent dies become children of this process.

    Otherwise they go to process 1, which in a container is often one that waits for nobody: each would stay a zombie.
    """
    ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait_for_all() -> None:
    """Waits until this process has no child any more."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
