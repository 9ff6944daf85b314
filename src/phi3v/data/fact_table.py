"""Facts of many rows in arrays: about a hundred bytes a row and sixteen more for each image.

In come `RowFacts`, one after the other; out come the same facts again, made when they are asked for. Here also: hashes
as numpy arrays, for what counts and compares them. Knows no recipes, splits or limits.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from phi3v.data.lengths import RowLength
from phi3v.data.survey import DIGEST_BYTES, RowFacts


class FactTable(Sequence[RowFacts]):
    """What is known of each row; every access makes a new RowFacts that is equal to the one that was added.

    Example: FactTable([fact])[0] == fact.
    """

    def __init__(self, facts: Iterable[RowFacts] = ()) -> None:
        """Begin with some facts."""
        self._sources: dict[str, int] = {}
        self._places = array("q")  # source and row of each fact
        self._tokens = array("q")  # image, text and trained tokens; -1, -1, -1 where they are not known
        self._sides = array("I")  # width and height of each image
        self._digests = bytearray()  # of the text, the images, the web addresses
        self._ends = array("q", [0, 0, 0])  # of a fact: in the sides; in the digests those of the images, and all
        self._too_long: dict[int, str] = {}
        for fact in facts:
            self.add(fact)

    def add(self, fact: RowFacts) -> None:
        """Keep the facts of the next row."""
        length = fact.length
        if fact.too_long is not None:
            self._too_long[len(self)] = fact.too_long
        self._tokens.extend((-1, -1, -1) if length is None else (length.image, length.text, length.trained))
        self._places.extend((self._sources.setdefault(fact.source, len(self._sources)), fact.row))
        for size in fact.sizes:
            self._sides.extend(size)
        self._digests += fact.text + b"".join(fact.images)
        images_end = len(self._digests)
        self._digests += b"".join(fact.web)
        self._ends.extend((len(self._sides), images_end, len(self._digests)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._places) // 2

    @overload
    def __getitem__(self, index: int) -> RowFacts: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowFacts]: ...
    def __getitem__(self, index: int | slice) -> RowFacts | list[RowFacts]:
        """The facts of a row, or of each row of a slice."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        sides_start, _, start, sides_end, images_end, end = self._ends[3 * index : 3 * index + 6]
        sides = self._sides[sides_start:sides_end]
        sizes = tuple(zip(sides[::2], sides[1::2], strict=True))
        image, text, trained = self._tokens[3 * index : 3 * index + 3]
        source, row = self._places[2 * index : 2 * index + 2]
        text_digest, *images = _cut(self._digests[start:images_end])
        return RowFacts(
            list(self._sources)[source],
            row,
            None if image < 0 else RowLength(image, text, trained, sizes),
            sizes,
            tuple(images),
            text_digest,
            tuple(_cut(self._digests[images_end:end])),
            self._too_long.get(index),
        )


def _cut(digests: bytearray) -> list[bytes]:
    """One hash after the other: 48 bytes -> three."""
    return [bytes(digests[place : place + DIGEST_BYTES]) for place in range(0, len(digests), DIGEST_BYTES)]


def digest_array(digests: Iterable[bytes]) -> np.ndarray:
    """Hashes of `DIGEST_BYTES` each as an array that numpy sorts and compares."""
    buffer = bytearray()
    for digest in digests:
        buffer += digest
    return np.frombuffer(bytes(buffer), dtype=f"S{DIGEST_BYTES}")
