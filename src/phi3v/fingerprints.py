"""Short names for what answers and trainings depend on: rows and weights.

In come rows or tensors, out comes a text that is another one where anything changed. Decides nothing.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from phi3v.data.images import resolve_path
from phi3v.data.schema import ImagePart, ImageRef, Row
from phi3v.errors import ImageError


def name_rows(rows: Iterable[Row], beside: Sequence[Any] = (), *, stamps: bool = False) -> str:
    """A name for rows in their order: their texts, the names and addresses of their images, and what is given beside
    them, their lengths in tokens for instance.

    With `stamps` the size and the time of each image's file belong to it too.
    """
    digest = hashlib.sha256(repr(list(beside)).encode())
    for row in rows:
        facts = (*_facts(row), tuple(_stamp(image) for image in row.images)) if stamps else _facts(row)
        digest.update(repr(facts).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:32]


def name_photos(rows: Iterable[Row]) -> str:
    """A name for what the first look saw of the photos' files, in the order of the rows; none of them is read again."""
    photos = hashlib.sha256()
    for row in rows:
        photos.update(repr([one.fingerprint for one in row.images]).encode())
    return photos.hexdigest()[:32]


def _stamp(image: ImageRef) -> tuple[Any, ...]:
    """Size and time of an image's file; () where it has none."""
    try:
        found = None if image.data is not None or image.path is None else resolve_path(image).stat()
    except (ImageError, OSError):
        found = None
    return () if found is None else (found.st_size, found.st_mtime_ns)


def _facts(row: Row) -> tuple[Any, ...]:
    """What a sample is made of, where it lies aside: a set may be moved."""
    turns = tuple(
        (turn.role, tuple(part.index if isinstance(part, ImagePart) else part.text for part in turn.parts))
        for turn in row.messages
    )
    images = tuple(
        (str(one.path).rpartition("/")[2], one.url, hashlib.sha256(one.data).hexdigest() if one.data else None)
        for one in row.images
    )
    return turns, images


@torch.no_grad()
def name_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A name for weights in their order: a sum over the bits of each tensor, which any changed value changes.

    Two passes of additions on the device where they are, milliseconds on a GPU; digests of files would read them again.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = weight.detach().contiguous().view(-1).view(torch.uint8)
        whole = bits.numel() // 4 * 4
        words = bits[:whole].view(torch.int32)
        sums = [part.sum(dtype=torch.int64) for part in (words, words[::2], bits[whole:])]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {torch.stack(sums).tolist()}".encode())
    return digest.hexdigest()[:32]
