"""From what a recipe says to a store of features."""

from pathlib import Path
from typing import Literal

from phi3v.features.files import FeatureFolder
from phi3v.features.store import FeatureMemory, FeatureStore


def open_store(kind: Literal["memory", "disk"], gigabytes: float, folder: str | Path | None = None) -> FeatureStore:
    """A store as a recipe's section `vision` names it.

    Args:
        kind: memory or disk.
        gigabytes: the bound in 10^9 bytes.
        folder: of a store on disk; None for phi3v/features in the user's cache folder.
    """
    limit_bytes = int(gigabytes * 10**9)
    return FeatureMemory(limit_bytes) if kind == "memory" else FeatureFolder(limit_bytes, folder)
