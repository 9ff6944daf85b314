"""Where features are kept, and how many: the contract of all stores, and the one in memory.

In come names (digests of pixels and weights, see `vision`) and features `[image tokens, hidden]`; out come the same
features, bit for bit, or None. A store never holds more than its bound. What a run holds is not taken from it; what
earlier ones left goes first, the oldest first. Knows nothing of images, models or rows.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch


class FeatureStore(ABC):
    """Features by name, up to a bound.

    Attributes:
        limit_bytes: the bound.
        trouble: why something cannot be kept although there is room, None while all is well.
        ended: whether nothing more can be kept for that.
        seen: image file, canvas and way of seeing -> name of its features, for runs that are given the same store: they
            open no image again, see `training.feature_cache`. Stays in this process.
    """

    kind: Literal["memory", "disk"]

    def __init__(self, limit_bytes: int) -> None:
        """An empty hand: nothing is held."""
        self.limit_bytes = limit_bytes
        self.trouble: str | None = None
        self.ended = False
        self.seen: dict[tuple[str, tuple[int, int], str], str] = {}
        self._held: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """What the entries take that are held."""
        return sum(self._held.values())

    def begin(self) -> None:
        """A new run: nothing is held any more, everything may be taken away for what this run keeps."""
        self._held.clear()
        self.trouble, self.ended = None, False

    def fits(self, size: int) -> bool:
        """Whether so many bytes of features can be kept beside what is held.

        Example: with a bound of 100 bytes, 70 held and 20 left by an earlier run, 30 fit and 31 do not.
        """
        return not self.ended and self.held_bytes + size <= self.limit_bytes

    @abstractmethod
    def hold(self, name: str) -> bool:
        """Whether good features of this name are there; if so they are held from now on."""

    @abstractmethod
    def get(self, name: str) -> torch.Tensor | None:
        """The features, not to be changed; None when they are not there."""

    @abstractmethod
    def put(self, name: str, features: torch.Tensor) -> bool:
        """Keeps and holds features where they fit, and says whether they are there now."""


class FeatureMemory(FeatureStore):
    """Features in the memory of this process, for all runs that are given the same store.

    Example: `store = FeatureMemory(4 * 10**9)`, then `train(recipe, features=store)` for each trial.
    """

    kind = "memory"

    def __init__(self, limit_bytes: int) -> None:
        """An empty store."""
        super().__init__(limit_bytes)
        self._features: dict[str, torch.Tensor] = {}  # the one that was used last stands last
        self._bytes = 0

    def hold(self, name: str) -> bool:
        """See `FeatureStore`."""
        features = self._features.pop(name, None)
        if features is None:
            return False
        self._features[name] = features
        self._held[name] = features.nbytes
        return True

    def get(self, name: str) -> torch.Tensor | None:
        """See `FeatureStore`."""
        return self._features.get(name)

    def put(self, name: str, features: torch.Tensor) -> bool:
        """See `FeatureStore`."""
        if self.hold(name):
            return True
        if not self.fits(features.nbytes):
            return False
        for old in [old for old in self._features if old not in self._held]:
            if self._bytes + features.nbytes <= self.limit_bytes:
                break
            self._bytes -= self._features.pop(old).nbytes
        self._features[name] = features
        self._held[name] = features.nbytes
        self._bytes += features.nbytes
        return True
