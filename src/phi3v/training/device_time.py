"""How long a device was busy: the kernels that torch's profiler saw between two moments.

In comes nothing but the device's own record; out come seconds. On a machine without a GPU there is no such record, and
the answer is None. Knows nothing of models or of the Trainer.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from phi3v.errors import ConfigError
from phi3v.whole_files import refuse_foreign


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of what intervals cover together.

    Example: (0, 4), (2, 5) and (8, 9) cover 6.
    """
    total, reached = 0, None
    for begin, end in sorted(intervals):
        if reached is None or begin > reached:
            total += end - begin
            reached = end
        elif end > reached:
            total += end - reached
            reached = end
    return total


def check_trace(file: Path) -> None:
    """Refuses a place where no trace can be written, before anything is watched; leaves nothing there.

    Raises: ConfigError when it is a folder or a device (torch renames its file to the name given, so /dev/null would be
        gone), a file that is no trace, or its folder is not there or closed to us.
    """
    there = file.exists()
    if there and not file.is_file():
        raise ConfigError(f"trace {file} is a folder or a device: name a file")
    refuse_foreign("--trace", file, '"schemaVersion"', "trace of phi3v profile")
    try:
        file.open("ab").close()
    except OSError as error:
        raise ConfigError(
            f"trace {file} cannot be written ({error.strerror}): name a file in a folder that is there"
        ) from error
    if not there:
        file.unlink()


class DeviceWatch:
    """Watches kernels from `start` to `stop`.

    Attributes:
        busy_seconds: time in which at least one kernel or copy ran; None without a GPU, or where it told of none.
        seconds: time between the two.
    """

    def __init__(self, device: torch.device, *, traced: bool = False) -> None:
        """Watches kernels of a device of type cuda; what the host does is seen where a trace is wanted."""
        activity = torch.profiler.ProfilerActivity
        self.device = device
        self.busy_seconds: float | None = None
        self.seconds = 0.0
        kinds = [activity.CPU] if traced else []
        kinds += [activity.CUDA] if device.type == "cuda" else []
        self._profiler = torch.profiler.profile(activities=kinds) if kinds else None

    def start(self) -> None:
        """Begins, when all that was asked of the device before is done."""
        self._wait()
        if self._profiler is not None:
            # Kineto tells the screen where it begins and ends, at a level above its errors; it reads this once.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profiler.start()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Ends, when the device has done what it was asked."""
        self._wait()
        self.seconds = time.perf_counter() - self._began
        if self._profiler is None:
            return
        self._profiler.stop()
        if self.device.type == "cuda":
            recorded: Any = self._profiler.profiler
            events = recorded.kineto_results.events()
            kernels = [
                (event.start_ns(), event.start_ns() + event.duration_ns())
                for event in events
                if event.device_type() == torch.autograd.DeviceType.CUDA
            ]
            self.busy_seconds = covered(kernels) / 1e9 if kernels else None

    def write_trace(self, file: Path) -> None:
        """Writes what was seen as a file for Perfetto.

        Raises: ConfigError when it is not there afterwards; torch itself tells that to the screen alone.
        """
        assert self._profiler is not None, "nothing was watched"
        missing = f"trace {file} was not written: name a file in a folder that is there and has room"
        try:
            # A folder of its own, with the file's own name: its ending tells torch whether to compress.
            with tempfile.TemporaryDirectory(prefix=".trace_", dir=file.parent) as folder:
                fresh = Path(folder) / file.name
                self._profiler.export_chrome_trace(str(fresh))
                os.replace(fresh, file)
        except OSError as error:
            raise ConfigError(f"{missing} ({error.strerror})") from error

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
