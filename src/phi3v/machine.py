"""What this process has of the machine: the cores that it may run on, and the most memory that it took."""

import os
import sys


def usable_cores() -> int:
    """Cores that this process may run on; taskset and a container's cpuset give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spare_cores() -> int:
    """Usable cores that torch computes without; negative where its threads are more.

    Example: OMP_NUM_THREADS=1 on two cores: 1.
    """
    import torch

    return usable_cores() - torch.get_num_threads()


def most_memory() -> int:
    """The most bytes that tensors took on the GPU, or that this process took in the machine's memory.

    Both since the process began, so that what it did before counts too.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
