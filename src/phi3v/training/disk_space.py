"""Whether a run's checkpoints will fit onto its disk, by what trains, said before the first step; and full disks.

In come a run and a number of weights, or an error, out comes a line or nothing.
"""

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from phi3v.errors import TrainingError
from phi3v.passthrough import first_line
from phi3v.run_folder import RunFolder

_BYTES_A_WEIGHT = 12
"""A weight in float32 with the two averages that Adam keeps of its gradient; other optimisers keep less."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


def warn_of_space(run: RunFolder, trained: int, limit: int | None, *, best: bool = False) -> None:
    """Warns where the run's disk looks too small for its checkpoints.

    One more than `limit`, or than the newest and the best, is there while a new one is written, and at the end come
    the tuned weights.
    Example: 25 million weights and limit 2 need 0.9 GB for three checkpoints and 0.1 GB for the adapter; what is there
    already of a run that goes on is counted.

    Args:
        run: its folder is there.
        trained: weights that train.
        limit: checkpoints that are kept; with None, where all are, the space of two is asked for.
        best: whether the best one is kept beside the newest.
    """
    held = sum(file.stat().st_size for file in run.checkpoints.glob("checkpoint-*/*"))
    kept = max(limit or 1, 2 if best else 1)
    needed = trained * (_BYTES_A_WEIGHT * (kept + 1) + 4) - held
    free = shutil.disk_usage(run.path).free
    if needed > free:
        _log.warning(
            "checkpoints need about %s in %s, and %s are free: free space, set a smaller "
            "training.save_total_limit, or give another output",
            size_text(needed),
            run.path,
            size_text(free),
        )


@contextlib.contextmanager
def full_disk(folder: Path, then: str = "run the same command again", *, instead: str = "") -> Iterator[None]:
    """Turns an error that says that nothing more fits onto a disk into one line.

    Args:
        folder: what is written in this context lies there.
        then: see `full_line`.
        instead: see `full_line`.
    Raises: TrainingError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise TrainingError(full_line(error, folder, then, instead=instead)) from error


def full_line(error: BaseException, folder: Path, then: str = "", *, instead: str = "") -> str:
    """What is said of a full disk, or of a file that grew beyond the process's limit, which free space does not help.

    Args:
        error: for which `is_full` holds.
        folder: what was written lies there.
        then: what comes next, when that is done.
        instead: what helps as well as free space.
    Example: "the disk of runs/shop is full (No space left on device): free space there; run the same command again".
    """
    if _says(error, errno.EFBIG):
        fault = f"a file in {folder} may not grow any further"
        helps = "raise the limit on the size of files (ulimit -f)"
    else:
        fault, helps = f"the disk of {folder} is full", f"free space there{f', or {instead}' if instead else ''}"
    return f"{fault} ({first_line(error)}): {helps}{f'; {then}' if then else ''}"


def is_full(error: BaseException) -> bool:
    """Whether an error says that no more fits onto a disk, into a quota or a file."""
    return _says(error, *_FULL)


def _says(error: BaseException, *numbers: int) -> bool:
    """Whether an error of the system has one of some numbers."""
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)  # how safetensors, written in Rust, says it


def size_text(count: float) -> str:
    """Bytes as people read them: 4000000000 -> "4.0 GB", 120000 -> "120.0 kB"."""
    name, unit = next(
        one for one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)) if count >= one[1] or one[1] == 10**3
    )
    return f"{count / unit:.1f} {name}"
