"""Pictures that are the same to the eye: re-encoded, resized, renamed copies. Rows in, pairs of pictures out.

Two steps, since hashes of 64 bits take simple pictures for each other. A difference hash (dHash: is a cell of a grey
9x8 picture brighter than its left neighbour?) finds candidates, and 32x32 pixels in colour decide. Candidates are then
opened again and compared up close, tile by tile, so that a form filled in otherwise is another picture. Where one of
two pictures is black and white and the other is not, both are compared in grey. A copy that was cropped, turned,
mirrored or made brighter by a tenth is not found. Knows nothing of recipes or scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from phi3v.data.images import MAX_PIXELS, open_image
from phi3v.data.schema import ImageRef, Row
from phi3v.errors import ImageError

NEAR_BITS = 8
"""Bits of two hashes that may differ; a copy of a quarter of the width differs by 7."""
NEAR_LEVELS = 4.5
"""Grey levels by which 32 x 32 pixels may differ on average; a JPEG of quality 20 differs by 3.6, other products of the
demo by 6.4 and more."""
CLOSE_LEVELS = 14.0
"""Grey levels by which the worst tile may differ up close: copies differ by 10.5 at most, a form with other figures
in it by 36, a product with another price by 38 (measured as docs/evaluation.md says)."""
GREY_LEVELS = 2.0
"""Levels by which the channels of a black-and-white picture differ on average at most: JPEG of one gives 0 to 1."""
CANDIDATES = 5
"""Of each asked picture so many known ones are looked at up close, the nearest ones; a picture that many rows have is
one."""
_SIDE, _CLOSE_SIDE, _TILE = 32, 768, 12
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # brightness, as Pillow's "L" and JPEG have it
_BATCH = 256  # asked images whose hashes are compared with all known ones at once


@dataclass(frozen=True)
class Prints:
    """What is kept of pictures: a hash and a small picture of each. Images with the same pixels are one picture.

    Attributes:
        hashes: 64 bits each.
        small: `[pictures, 32, 32, 3]`.
        places: of each picture the rows that have it, with its number in the row.
        unread: images that could not be opened.

    Example: rows with the images (a, b), (a), where a and b are two pictures -> places [[(0, 0), (1, 0)], [(0, 1)]].
    """

    hashes: npt.NDArray[np.uint64]
    small: npt.NDArray[np.uint8]
    places: list[list[tuple[int, int]]]
    unread: int


@dataclass(frozen=True)
class Alike:
    """Two pictures that are the same to the eye: the asked and the known one in their prints, bits that differ."""

    asked: int
    known: int
    bits: int


def difference_hash(image: Image.Image) -> int:
    """The dHash of a picture: 64 bits, row by row; 1 where a cell is brighter than its left neighbour.

    Example: a picture that gets brighter from left to right -> 2**64 - 1; one of a single colour -> 0.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def take_prints(rows: Iterable[Row], *, max_pixels: int = MAX_PIXELS, threads: int = 2) -> Prints:
    """Looks at every image of some rows once; one that cannot be opened is counted and left out."""
    hashes, small, unread = [], [], 0
    places: dict[bytes, list[tuple[int, int]]] = {}
    images = ((place, number, image) for place, row in enumerate(rows) for number, image in enumerate(row.images))
    with ThreadPoolExecutor(threads) as pool:
        for place, number, found in _in_order(pool, images, max_pixels):
            if found is None:
                unread += 1
                continue
            if found[2] not in places:
                hashes.append(found[0])
                small.append(found[1])
            places.setdefault(found[2], []).append((place, number))
    pixels = np.stack(small) if small else np.zeros((0, _SIDE, _SIDE, 3), dtype=np.uint8)
    return Prints(np.array(hashes, dtype=np.uint64), pixels, list(places.values()), unread)


def find_alike(known: Prints, asked: Prints, known_rows: Sequence[Row], rows: Sequence[Row]) -> Iterator[Alike]:
    """The pairs of an asked and a known picture that are the same to the eye, in the order of the asked ones.

    Args:
        known: prints of `known_rows`.
        asked: prints of `rows`.
        known_rows: opened again for candidates.
        rows: opened again for candidates.
    """
    for start in range(0, len(asked.places), _BATCH):
        bits = np.bitwise_count(asked.hashes[start : start + _BATCH, None] ^ known.hashes[None])
        for at, near in enumerate(bits <= NEAR_BITS):
            row, number = asked.places[start + at][0]
            others = np.flatnonzero(near)
            distances = _distances(known.small[others], asked.small[start + at])
            for place in np.argsort(distances, kind="stable")[:CANDIDATES]:
                known_row, known_number = known.places[others[place]][0]
                pair = rows[row].images[number], known_rows[known_row].images[known_number]
                if distances[place] <= NEAR_LEVELS and same_up_close(*pair):
                    yield Alike(start + at, int(others[place]), int(bits[at, others[place]]))


def same_up_close(one: ImageRef, other: ImageRef) -> bool:
    """Whether no tile of two images differs by more than re-encoding and resizing explain, at most 768 pixels wide."""
    try:
        pair = [open_image(image) for image in (one, other)]
    except ImageError:
        return False
    side = max(_TILE, min(_CLOSE_SIDE, *(min(image.size) for image in pair)) // _TILE * _TILE)
    first, second = (_pixels(image, side) for image in pair)
    if is_grey(first) != is_grey(second):
        first, second = (pixels @ _GREY_WEIGHTS[:, None] for pixels in (first, second))
    tiles = np.abs(first - second).mean(-1).reshape(side // _TILE, _TILE, side // _TILE, _TILE).mean((1, 3))
    return float(tiles.max()) <= CLOSE_LEVELS


def _in_order(pool: ThreadPoolExecutor, images: Iterator[tuple[int, int, ImageRef]], max_pixels: int) -> Iterator[Any]:
    """Places with the print of their image, None for one that does not open; a few decoded images are in memory."""
    while group := list(islice(images, 64)):
        prints = pool.map(lambda entry: _print(entry[2], max_pixels), group)
        yield from ((place, number, found) for (place, number, _), found in zip(group, prints, strict=True))


def _print(image: ImageRef, max_pixels: int) -> tuple[int, npt.NDArray[np.uint8], bytes] | None:
    """Hash and small picture of an image, and a digest of its pixels."""
    try:
        opened = open_image(image, max_pixels=max_pixels)
    except ImageError:
        return None
    small = opened.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    digest = blake2b(f"{opened.size}".encode() + opened.tobytes(), digest_size=16).digest()
    return difference_hash(opened), np.asarray(small), digest


def is_grey(pixels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether pictures `[..., height, width, 3]` are black and white: all red -> False, all of one grey -> True."""
    lightest, darkest = pixels.max(-1).astype(np.float32), pixels.min(-1).astype(np.float32)
    return np.asarray((lightest - darkest).mean((-2, -1)) <= GREY_LEVELS)


def _distances(several: npt.NDArray[np.uint8], one: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Mean differences of small pictures from one, in grey levels: all 10 and all 9 from all 13 -> [3.0, 4.0].

    Those that are in colour are compared with one in black and white by their brightness, and the other way round.
    """
    found = np.abs(several.astype(np.int16) - one).mean((1, 2, 3))
    if (other := is_grey(several) != is_grey(one)).any():
        found[other] = np.abs((several[other] - one.astype(np.float32)) @ _GREY_WEIGHTS).mean((1, 2))
    return found


def _pixels(image: Image.Image, side: int) -> npt.NDArray[np.float32]:
    """`[side, side, 3]`, blurred a little: edges that were resized twice are softer than those resized once."""
    how = Image.Resampling.BOX if min(image.size) >= 2 * side else Image.Resampling.BICUBIC
    return np.asarray(image.resize((side, side), how).filter(ImageFilter.BoxBlur(2)), dtype=np.float32)
