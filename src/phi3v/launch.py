"""Which of several processes this one is, as torchrun and `accelerate launch` say it in the environment.

In comes the environment, out come numbers. Knows no torch, so that what prints can ask before anything is imported.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One process among those of a training.

    Attributes:
        rank: its number among all.
        local_rank: its number on its machine, which is that of its GPU.
        count: how many there are.
    Example: the second of two on each of two machines may be `Launch(rank=3, local_rank=1, count=4)`.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> "Launch":
        """What the environment says; one process where no launcher says anything."""
        given = os.environ if environment is None else environment
        rank, local, count = (given.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if not (rank.isdigit() and count.isdigit() and int(count) > 1):
            return cls()
        return cls(int(rank), int(local) if local.isdigit() else 0, int(count))
