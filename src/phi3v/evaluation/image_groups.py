"""Which rows are about the same images: rows in, a number for each out. Opens no file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from hashlib import sha256

import numpy as np

from phi3v.data.schema import ImageRef, Row
from phi3v.evaluation.row_scores import Groups


def image_groups(rows: Iterable[Row]) -> Groups:
    """A number for each row, from 0, the same one where rows have the same images, in any order and no others.

    Rows without an image have a number of their own each. Images are the same by address, by content where they are
    embedded, else by file name; two files with the same picture are two images.

    Example: rows with a.jpg, b.jpg, a.jpg, none, none, (a.jpg, b.jpg) -> [0, 1, 0, 2, 3, 4].
    """
    seen: dict[frozenset[str] | int, int] = {}
    keys = (frozenset(map(_identity, row.images)) or place for place, row in enumerate(rows))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def count_groups(rows: Sequence[Row], groups: Groups) -> dict[str, int]:
    """How many rows have images, and how many different ones: 3 rows about 2 photos and 1 about none -> {"rows": 3,
    "different": 2}."""
    some = [group for row, group in zip(rows, groups.tolist(), strict=True) if row.images]
    return {"rows": len(some), "different": len(set(some))}


def _identity(image: ImageRef) -> str:
    """What tells an image from others."""
    if image.url is not None:
        return image.url
    if image.data is not None:
        return sha256(image.data).hexdigest()
    return os.path.normpath(os.path.join(image.root or "", image.path or ""))
