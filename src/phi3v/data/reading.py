"""How sets are read, beside how their records become rows: downloads, and how many rows may be left out.

In come plain values as a recipe holds them; out comes a `Reading`, which `sources` takes. Opens nothing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3v.data.download import FetchLimits
from phi3v.data.image_cache import FetchFailure, ImageCache


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How sets are read, beside how their records become rows.

    Attributes:
        cache: where downloaded images lie; None refuses images behind web addresses.
        limits: of the downloads.
        download: False downloads nothing: what is not cached is listed, and is no problem.
        max_skipped: share of a set's rows that may be left out; 1.0 allows all.
        on_problem: "stop" allows none.
        refuse: False reads on where a set is refused, and says why in `LoadedData.refusal`.
        failures: web address -> why it could not be downloaded just now.
        on_fetch: told of the downloads' progress, (done, total).
    """

    cache: ImageCache | None = None
    limits: FetchLimits = field(default_factory=FetchLimits)
    download: bool = True
    max_skipped: float = 0.05
    on_problem: Literal["skip", "stop"] = "skip"
    refuse: bool = True
    failures: Mapping[str, FetchFailure] = field(default_factory=dict)
    on_fetch: Callable[[int, int], None] | None = None

    @classmethod
    def of(cls, *, image_cache: str | None = None, allow_hosts: Sequence[str] = (), **more: Any) -> "Reading":
        """From plain values as a recipe holds them.

        Args:
            image_cache: folder of the cache; None for phi3v/images in the user's cache folder.
            allow_hosts: hosts that may be private.
            more: the other attributes.
        """
        cache = ImageCache((Path(image_cache) if image_cache is not None else default_cache_folder()).absolute())
        return cls(cache=cache, limits=FetchLimits(allow_hosts=tuple(allow_hosts)), **more)


def default_cache_folder() -> Path:
    """Where downloaded images go when nobody says: $XDG_CACHE_HOME/phi3v/images, else ~/.cache/phi3v/images."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3v" / "images"
