"""Whether a run's checkpoints will fit onto its disk, by what trains; said before the first step.

In come a run and a number of weights, out comes a line or nothing.
"""

import logging
import shutil

from phi3v.run_folder import RunFolder

_BYTES_A_WEIGHT = 12
"""A weight in float32 with the two averages that Adam keeps of its gradient; other optimisers keep less."""
_log = logging.getLogger(__name__)


def warn_of_space(run: RunFolder, trained: int, limit: int | None) -> None:
    """Warns where the run's disk looks too small for its checkpoints.

    One more than `limit` is there while a new one is written, and at the end come the tuned weights.
    Example: 25 million weights and limit 2 need 0.9 GB for three checkpoints and 0.1 GB for the adapter; what is there
    already of a run that goes on is counted.

    Args:
        run: its folder is there.
        trained: weights that train.
        limit: checkpoints that are kept; with None, where all are, the space of two is asked for.
    """
    held = sum(file.stat().st_size for file in run.checkpoints.glob("checkpoint-*/*"))
    needed = trained * (_BYTES_A_WEIGHT * ((limit or 1) + 1) + 4) - held
    free = shutil.disk_usage(run.path).free
    if needed > free:
        _log.warning(
            "checkpoints need about %.1f GB in %s, and %.1f GB are free: free space, set a smaller "
            "training.save_total_limit, or give another output",
            needed / 10**9,
            run.path,
            free / 10**9,
        )
