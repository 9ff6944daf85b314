"""Rows of one or several opened sets: records become rows when they are asked for.

In come tables with their maps; out come `Rows`, and from a first look at every record the problems of those that cannot
be used. Every record is either a row or a problem. Knows nothing about recipes, splits or weights.
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, overload

import numpy as np

from phi3v.data.cells import Looks, check_images, group_keys, named_image
from phi3v.data.columns import ColumnMap
from phi3v.data.conversations import ConversationMap
from phi3v.data.image_cache import FetchFailure
from phi3v.data.kept_keys import KeptKeys
from phi3v.data.known_sizes import KnownSizes
from phi3v.data.not_read import NamedFiles, NotRead
from phi3v.data.opening import narrowed, records_of
from phi3v.data.schema import Row, RowProblem, UnusableRecord
from phi3v.data.tables import FilePart, Table

_READ_AT_ONCE = 32
"""Records that going through rows reads together; their embedded images are in memory meanwhile."""


@dataclass(frozen=True)
class RecordSet:
    """Records and how they become rows.

    Attributes:
        table: the records, with the columns of `map` at least.
        map: how a record becomes a row.
        location: what the user named.
        max_pixels: images with more pixels are unusable.
        files: what the records are read from, where that is known.
        sizes: of images that were looked at.
        parts: the records by file, where there are several files.
        not_read: what else lies there.
    """

    table: Table
    map: ColumnMap | ConversationMap
    location: str
    max_pixels: int
    files: tuple[Path, ...] = ()
    sizes: KnownSizes = field(default_factory=KnownSizes)
    parts: tuple[FilePart, ...] = ()
    not_read: tuple[NotRead, ...] = ()

    @cached_property
    def _firsts(self) -> list[int]:
        """Of each part the number of its first record: parts of 3 and 2 records -> [0, 3]."""
        return [0, *accumulate(part.records for part in self.parts)][: len(self.parts)]

    def place(self, number: int) -> tuple[str, int]:
        """What a record is read from, and its number there.

        Example: record 4 of a.jsonl with 3 records and b.jsonl -> ("b.jsonl", 1).
        """
        if not self.parts:
            return self.map.source, number
        at = self._part(number)
        return self.parts[at].name, number - self._firsts[at]

    def _part(self, number: int) -> int:
        """The place in `parts` of the file that a record comes from."""
        return bisect_right(self._firsts, number) - 1

    @property
    def sources(self) -> list[str]:
        """What records are read from, as `place` names it, in order: ["a.jsonl", "b.jsonl"]."""
        return [part.name for part in self.parts] or [self.map.source]

    def number(self, source: str, row: int) -> int | None:
        """The record of a place, see `place`; None where it is none of these: ("b.jsonl", 1) -> 4."""
        if not self.parts:
            return row if source == self.map.source else None
        return next(
            (first + row for part, first in zip(self.parts, self._firsts, strict=True) if part.name == source), None
        )

    def images_named(self, number: int) -> list[str | None]:
        """What a record says of its images, usable or not: paths and addresses, None for what is none.

        Example: ["gone.jpg"]; an address loses its query; [] where the record has no image, or does not say which.
        """
        try:
            cells = self.map.image_cells(self.table[number])
        except UnusableRecord:
            return []
        return [named_image(cell) for cell in cells]

    def problem(self, number: int, error: UnusableRecord) -> RowProblem:
        """The problem of a record."""
        source, row = self.place(number)
        return RowProblem(row, error.reason_code, str(error), source)

    def made(self, record: Mapping[str, Any], number: int) -> Row:
        """The row of a record that was read, its images unopened. Raises: UnusableRecord."""
        row = self.map.row(record, number)
        if not self.parts:
            return row
        source, place = self.place(number)
        row = replace(row, source=source, index=place)
        root = self.parts[self._part(number)].root
        if root is None:
            return row
        lying = (replace(one, root=root) if one.url is None and one.data is None else one for one in row.images)
        return replace(row, images=tuple(lying))

    def row(self, number: int) -> Row:
        """The row of a record, its images with what is known of them. Raises: UnusableRecord."""
        return self._made(self.table[number], number)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """The rows of several records, which are read together. Raises: UnusableRecord."""
        return map(self._made, self.table.__getitems__(list(numbers)), numbers)

    def _made(self, record: dict[str, Any], number: int) -> Row:
        row, seen = self.made(record, number), self.sizes.of(number)
        if not seen or len(seen) != len(row.images):
            return row
        both = zip(row.images, seen, strict=True)
        images = (replace(image, size=size, fingerprint=fingerprint) for image, (size, fingerprint) in both)
        return replace(row, images=tuple(images))

    def waiting_for_downloads(self) -> "RecordSet":
        """The same records, with images that are not in the cache yet as images to come."""
        cells = replace(self.map.cells, wait_for_download=True)
        return replace(self, map=replace(self.map, cells=cells))

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in order, read for the map's columns alone."""
        return records_of(narrowed(self.table, self.map.columns), self.location, self.files)


class Rows(Sequence[Row]):
    """Rows of sets: nothing but the numbers of set and record is kept in memory.

    `rows[3]` is a Row, `rows[:10]` are Rows. Can be pickled for loader workers.
    """

    def __init__(self, sets: Sequence[RecordSet], set_numbers: Sequence[int], numbers: Sequence[int]) -> None:
        """Name the records.

        Args:
            sets: where they come from.
            set_numbers: for each row its place in `sets`.
            numbers: for each row its record there.
        """
        self._sets = tuple(sets)
        self._set_numbers = array("I", set_numbers)
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        """The rows in order, some records read at a time: one by one a table takes several times as long."""
        for place, positions in groupby(range(len(self)), lambda at: (self._set_numbers[at], at // _READ_AT_ONCE)):
            yield from self._sets[place[0]].rows([self._numbers[position] for position in positions])

    def take(self, positions: Sequence[int]) -> "Rows":
        """The rows at these positions, in that order: rows.take([2, 0])[0] is rows[2]."""
        set_numbers = [self._set_numbers[position] for position in positions]
        return Rows(self._sets, set_numbers, [self._numbers[position] for position in positions])

    def __add__(self, other: "Rows") -> "Rows":
        """These rows, then the others."""
        behind = [number + len(self._sets) for number in other._set_numbers]
        return Rows([*self._sets, *other._sets], [*self._set_numbers, *behind], [*self._numbers, *other._numbers])

    def distinct(self) -> tuple["Rows", Sequence[int]]:
        """Each record once, in the order of their first places, and for each row the number of its record there.

        Example: rows a, b, a -> rows a, b and [0, 1, 0].
        """
        places = np.array(self._set_numbers, dtype=np.int64) * (max(self._numbers, default=0) + 1) + self._numbers
        _, firsts, numbers = np.unique(places, return_index=True, return_inverse=True)
        if len(firsts) == len(self):
            return self, range(len(self))
        order = np.argsort(firsts)
        return self.take(firsts[order].tolist()), array("q", np.argsort(order)[numbers].tolist())

    def images_named(self, source: str, row: int) -> list[str | None]:
        """What a record of these sets says of its images, also one that became no row, see `RecordSet.images_named`."""
        for records in self._sets:
            if (number := records.number(source, row)) is not None:
                return records.images_named(number)
        return []

    @property
    def sources(self) -> list[str]:
        """What the records of these sets are read from, in order, each once, also that of which no record is a row."""
        return list(dict.fromkeys(source for records in self._sets for source in records.sources))

    @property
    def set_numbers(self) -> Sequence[int]:
        """For each row the number of its set: rows of two sets, added -> [0, 0, 1, 1, 1]."""
        return self._set_numbers

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        """A row, or for a slice the rows in it."""
        if isinstance(index, slice):
            return Rows(self._sets, self._set_numbers[index], self._numbers[index])
        return self._sets[self._set_numbers[index]].row(self._numbers[index])


@dataclass(frozen=True)
class FirstLook:
    """What reading every record of a set once showed.

    Attributes:
        records: the set.
        usable: the records that can be used, those among them that wait for a download.
        keys: for each of them what ties it to others, see `cells.group_keys`; empty where nobody asked.
        problems: those that cannot.
        waiting: the records with images that are still to be downloaded.
        not_cached: the web addresses of these images, each once.
        named: what lies beside the data and is named by rows, see `not_read.NamedFiles`.
    """

    records: RecordSet
    usable: Sequence[int]
    keys: Sequence[Sequence[str]]
    problems: list[RowProblem]
    waiting: Sequence[int]
    not_cached: list[str]
    named: Collection[str] = ()

    @property
    def rows(self) -> Rows:
        """The records that can be used, as rows."""
        return Rows([self.records], [0] * len(self.usable), self.usable)


def read_rows(records: RecordSet, *, with_keys: bool) -> FirstLook:
    """Goes through all records once; an image that is not in the cache yet is no problem here.

    Args:
        records: the set; its columns have been checked.
        with_keys: whether keys are wanted, which means a hash of every image, for which its file is read whole.
    """
    patient = records.waiting_for_downloads()
    usable, waiting = array("q"), array("q")
    keys = KeptKeys()
    problems: list[RowProblem] = []
    missing: dict[str, None] = {}
    sizes = KnownSizes()
    named = NamedFiles(records.not_read)
    for number, record in enumerate(records.records()):
        try:
            row = patient.made(record, number)
            named.note(row.images)
            looks = check_images(row, records.max_pixels, digests=with_keys)
        except UnusableRecord as error:
            problems.append(records.problem(number, error))
            continue
        usable.append(number)
        _keep_sizes(sizes, number, looks)
        if absent := [image.url for image in row.images if image.url is not None and image.path is None]:
            waiting.append(number)
            missing |= dict.fromkeys(absent)
        if with_keys:
            keys.add(group_keys(row, looks))
    return FirstLook(replace(records, sizes=sizes), usable, keys, problems, waiting, list(missing), named.names)


def look_again(look: FirstLook, failures: Mapping[str, FetchFailure]) -> FirstLook:
    """The first look once more, at the records that waited for a download: now a missing image is a problem.

    Args:
        look: the first look.
        failures: web address -> why it could not be downloaded.
    Example: usable 0, 1, 2 with 1 waiting, and its address answered 404 -> usable 0, 2 and the problem of 1.
    """
    records, usable, failed = look.records, array("q"), []
    keys, sizes, waiting = KeptKeys(), KnownSizes(), iter(look.waiting)
    told = replace(records, map=replace(records.map, cells=replace(records.map.cells, failures=failures)))
    next_waiting = next(waiting, None)
    for place, number in enumerate(look.usable):
        row_keys = look.keys[place] if look.keys else None
        if number == next_waiting:
            next_waiting = next(waiting, None)
            try:
                row = told.row(number)
                looks = check_images(row, records.max_pixels, digests=row_keys is not None)
            except UnusableRecord as error:
                failed.append(records.problem(number, error))
                continue
            _keep_sizes(sizes, number, looks)
            row_keys = group_keys(row, looks) if row_keys is not None else None
        usable.append(number)
        if row_keys is not None:
            keys.add(row_keys)
    order = {part.name: place for place, part in enumerate(records.parts)}
    problems = sorted([*look.problems, *failed], key=lambda problem: (order.get(problem.source, 0), problem.row))
    known = replace(records, sizes=records.sizes.merged(sizes))
    return FirstLook(known, usable, keys, problems, array("q"), [], look.named)


def _keep_sizes(sizes: KnownSizes, number: int, looks: Looks) -> None:
    """Keeps what was seen of a record all of whose images were looked at."""
    found = [(look.size, look.fingerprint) for look in looks if look is not None]
    if found and len(found) == len(looks):
        sizes.add(number, found)
