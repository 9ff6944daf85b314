"""Sizes and fingerprints of the images of records, kept from a first look so that no file is looked at twice.

In come numbers of records, ascending, with what was seen of their images; out comes this again. A record takes 16 bytes
and each of its images 16.
"""

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

Seen = tuple[tuple[int, int], int]
"""Width and height in pixels, and the file's fingerprint, see `images.ImageLook`."""


class KnownSizes:
    """Sizes and fingerprints by number of record.

    Example: after add(3, [((40, 30), 17), ((8, 6), 4)]) and add(7, []) of(3) is (((40, 30), 17), ((8, 6), 4)), and
    of(7) and of(5) are ().
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._numbers = array("q")
        self._ends = array("q")  # of each record: where its images end in the next arrays
        self._sides = array("I")  # width, height, width, height, ...
        self._fingerprints = array("Q")

    def add(self, number: int, seen: Sequence[Seen]) -> None:
        """Keep what was seen of a record whose number is above all before."""
        assert not self._numbers or number > self._numbers[-1]
        self._numbers.append(number)
        for size, fingerprint in seen:
            self._sides.extend(size)
            self._fingerprints.append(fingerprint)
        self._ends.append(len(self._fingerprints))

    def of(self, number: int) -> tuple[Seen, ...]:
        """What was seen of a record; () where nothing is known."""
        place = bisect_left(self._numbers, number)
        found = place < len(self._numbers) and self._numbers[place] == number
        return self._at(place) if found else ()

    def merged(self, other: "KnownSizes") -> "KnownSizes":
        """What both know, of different records."""
        both = KnownSizes()
        for number, seen in heapq.merge(self._items(), other._items()):
            both.add(number, seen)
        return both

    def _items(self) -> Iterator[tuple[int, tuple[Seen, ...]]]:
        return ((number, self._at(place)) for place, number in enumerate(self._numbers))

    def _at(self, place: int) -> tuple[Seen, ...]:
        start, end = self._ends[place - 1] if place else 0, self._ends[place]
        sides = self._sides[2 * start : 2 * end]
        sizes = zip(sides[::2], sides[1::2], strict=True)
        return tuple(zip(sizes, self._fingerprints[start:end], strict=True))
