"""Worker processes of a sweep on this machine: each is the command line's own `phi3v sweep` with one worker.

They share nothing but the sweep's folder and storage, as processes on other machines would. They run in sessions of
their own, so that Ctrl-C in a terminal reaches them once, through the process that started them.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from phi3v.errors import TrainingError
from phi3v.machine import usable_cores
from phi3v.sweep.folder import SweepFolder


class Workers:
    """A context in which workers run; leaving it early stops them, each behind its last whole step."""

    def __init__(self, folder: SweepFolder, count: int, overrides: list[str]) -> None:
        """Name the sweep's folder and how many work on it."""
        self.folder, self.count, self.overrides = folder, count, overrides
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Self:
        for number in range(self.count):
            log = self.folder.path / f"worker-{number + 1}.log"
            command = [sys.executable, "-m", "phi3v", "sweep", str(self.folder.recipe), *self.overrides]
            with open(log, "wb") as said:
                process = subprocess.Popen(
                    [*command, "sweep.workers=1"],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **_share_of_machine(number, self.count)},
                    start_new_session=True,
                )
            self._running.append((process, log))
        return self

    def __exit__(self, *error: Any) -> None:
        for process, _ in self._running:
            if process.poll() is None:
                process.terminate()
        for process, _ in self._running:
            process.wait()

    def alive(self) -> bool:
        """Whether a worker still works. Raises: TrainingError with the last line of one that failed."""
        for process, log in self._running:
            if process.poll():
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
                raise TrainingError(f"a worker of the sweep ended: {last.removeprefix('phi3v: ')} (see {log})")
        return any(process.poll() is None for process, _ in self._running)


def _share_of_machine(number: int, count: int) -> dict[str, str]:
    """Environment of a worker: its GPU, in turn, and its share of the threads, where nothing is said of either.

    Example: the third of four workers on a machine of 8 cores and 2 GPUs has OMP_NUM_THREADS 2, CUDA_VISIBLE_DEVICES 0.
    """
    import torch

    share = {}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, usable_cores() // count))
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = named or [str(device) for device in range(torch.cuda.device_count())]
    if devices:
        share["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    return share
