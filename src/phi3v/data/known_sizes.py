"""Sizes of the images of records, kept from a first look so that no header is read twice.

In come numbers of records, ascending, with the sizes of their images; out come these sizes again. A record takes 16
bytes and each of its images 8.
"""

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

Size = tuple[int, int]
"""Width and height in pixels."""


class KnownSizes:
    """Sizes by number of record.

    Example: after add(3, [(40, 30), (8, 6)]) and add(7, []) of(3) is ((40, 30), (8, 6)), and of(7) and of(5) are ().
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._numbers = array("q")
        self._ends = array("q")  # of each record: where its sizes end in the next array
        self._sides = array("I")  # width, height, width, height, ...

    def add(self, number: int, sizes: Sequence[Size]) -> None:
        """Keep the sizes of a record whose number is above all before."""
        assert not self._numbers or number > self._numbers[-1]
        self._numbers.append(number)
        for size in sizes:
            self._sides.extend(size)
        self._ends.append(len(self._sides))

    def of(self, number: int) -> tuple[Size, ...]:
        """The sizes of a record; () where none are known."""
        place = bisect_left(self._numbers, number)
        found = place < len(self._numbers) and self._numbers[place] == number
        return self._at(place) if found else ()

    def merged(self, other: "KnownSizes") -> "KnownSizes":
        """What both know, of different records."""
        both = KnownSizes()
        for number, sizes in heapq.merge(self._items(), other._items()):
            both.add(number, sizes)
        return both

    def _items(self) -> Iterator[tuple[int, tuple[Size, ...]]]:
        return ((number, self._at(place)) for place, number in enumerate(self._numbers))

    def _at(self, place: int) -> tuple[Size, ...]:
        start = self._ends[place - 1] if place else 0
        sides = self._sides[start : self._ends[place]]
        return tuple(zip(sides[::2], sides[1::2], strict=True))
