"""Where workers come from: a process that has imported everything, and forks a worker whenever one is asked for.

Imports are most of a worker's start (some 8 s of one core). They are made once: whenever a worker dies, and however
soon after the last one, the next costs the loading of the model alone. The nursery never touches model or GPU (CUDA
does not outlive a fork) and runs no sum (neither do OpenMP's threads). Elsewhere than on Linux, where forks
may not use the system's own libraries, each worker is a process that imports for itself.
"""

import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import warnings
from typing import IO

from phi3v.serve.families import adopt_orphans, wait_for_all

_FORKS = sys.platform == "linux"
_PATIENCE = 2.0
"""Seconds that a nursery has to end its worker before both are killed: it alone can wait for it."""


class Nursery:
    """The server's end: begins workers, one at a time, and ends them."""

    def __init__(self, module: str = "phi3v.serve.worker") -> None:
        """Nothing is started.

        Args:
            module: whose `main` a worker runs, with what it serves on its standard input and output.
        """
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def worker(self) -> tuple[IO[bytes], IO[bytes]]:
        """Begins a worker; where there was one it is killed. Returns: pipes to it and from it, which end with it."""
        if not _FORKS:
            self.stop()
            command = [sys.executable, "-m", self._module]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            return self._process.stdin, self._process.stdout
        if self._process is None or self._process.poll() is not None:
            self._begin()
        assert self._socket is not None
        source, to_worker = os.pipe()
        from_worker, drain = os.pipe()
        try:
            with contextlib.suppress(OSError):  # the nursery died at this moment: the pipes end, as a dead worker's do
                socket.send_fds(self._socket, [b"w"], [source, drain])
        finally:
            os.close(source)
            os.close(drain)
        return os.fdopen(to_worker, "wb"), os.fdopen(from_worker, "rb")

    def stop(self) -> None:
        """Kills what is there, and waits for it: the nursery for its worker, as long as it answers."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            if _FORKS:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it still imports, or is stopped
                    self._process.wait(_PATIENCE)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if _FORKS:
                    os.killpg(self._process.pid, signal.SIGKILL)  # the worker too, which is of its session
                else:
                    self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _begin(self) -> None:
        """Starts the nursery, in a session of its own: Ctrl-C in a terminal is the server's business."""
        self.stop()
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "phi3v.serve.nursery", self._module]
            # PyTorch counts GPUs by NVML then, not by CUDA, which a fork would find broken.
            environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True, env=environment
            )


def main() -> None:
    """The nursery itself: standard input is a socket, through which the two pipes of each worker come.

    It ends when the server does. One worker lives at a time: the one before is waited for, and what that had started,
    so that their memory is free.
    """
    run = importlib.import_module(sys.argv[1]).main
    adopt_orphans()
    gc.freeze()  # what was imported stays shared with the workers
    asked = socket.socket(fileno=os.dup(0))
    worker = 0
    while True:
        _, pipes, _, _ = socket.recv_fds(asked, 1, 2)
        if worker:
            os.kill(worker, signal.SIGKILL)
            wait_for_all()
        if not pipes:
            return
        with warnings.catch_warnings():  # Python 3.12 warns of idle threads of numpy and torch, which hold no locks
            warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
            worker = os.fork()
        if worker == 0:
            asked.close()
            for standard, pipe in enumerate(pipes):
                os.dup2(pipe, standard)
            for pipe in pipes:
                os.close(pipe)
            run()
            return
        for pipe in pipes:
            os.close(pipe)


if __name__ == "__main__":
    main()
