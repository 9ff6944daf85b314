"""A process that has everything imported and forks the command line for each call, so that a run starts in no time.

Reads lines of JSON, the arguments of `phi3v` and a file for what it says, and answers with the process; then the exit
code when it has ended. `Server` is the other side.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES", "")
"""GPUs that the runs see: none, unless said."""


def serve() -> None:
    """Answers until standard input ends."""
    import resource

    from phi3v.cli import main

    if not DEVICES:  # what libraries do as they are imported keeps forks from a GPU: each run imports them by itself
        import phi3v.training.train

        assert phi3v.training.train
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if not child:
            log = os.open(call["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            if call["file_limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (call["file_limit"], call["file_limit"]))
            sys.argv = ["phi3v", *call["arguments"]]
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except KeyboardInterrupt:  # before the command line was ready for it, or behind its end
                code = 130
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(128 - code if code < 0 else code, flush=True)  # as shells say it: 137 for SIGKILL


class Running:
    """One call of the command line."""

    def __init__(self, server: "Server", process: int) -> None:
        self.server, self.process, self.began = server, process, time.monotonic()

    def send(self, number: int) -> None:
        """Sends a signal, where the call has not ended meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)

    def ends(self) -> int:
        """The exit code, when it has ended."""
        code = int(self.server.process.stdout.readline())
        self.seconds = time.monotonic() - self.began
        return code


class Server:
    """Starts runs; a context manager."""

    def __enter__(self) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": DEVICES}
        self.process: Any = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def start(self, *arguments: str, log: Path, file_limit: int = 0) -> Running:
        """Starts the command line in a process of its own."""
        call = {"arguments": arguments, "log": str(log), "file_limit": file_limit}
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        return Running(self, int(self.process.stdout.readline()))

    def run(self, *arguments: str, log: Path, file_limit: int = 0) -> tuple[int, float]:
        """Exit code and seconds of a call."""
        running = self.start(*arguments, log=log, file_limit=file_limit)
        return running.ends(), running.seconds


if __name__ == "__main__":
    serve()
