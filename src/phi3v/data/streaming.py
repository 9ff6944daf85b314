"""Rows as they come, for sets that are larger than the disk: an endless, repeatable order of rows.

In come opened sets; out come rows, one made at a time, in an order that sets, weights and seed decide alone: a pass
over a set gives every usable row once, shuffled within a window of 1,000 rows or 256 MiB of embedded images. Every
record is a row or a problem, which is told when it comes by. Knows no models and no batches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from random import Random
from typing import Literal

from phi3v.data.cells import check_images, group_keys
from phi3v.data.fetch import FetchLimits, fetch_images
from phi3v.data.image_cache import FetchFailure
from phi3v.data.judging import StreamTally, shared_image_problem
from phi3v.data.rows import RecordSet
from phi3v.data.schema import Row, RowProblem, UnusableRecord
from phi3v.errors import DataError, NoUsableRowError

WINDOW_ROWS = 1000
WINDOW_BYTES = 256 * 2**20
_DOWNLOADED_AT_ONCE = 64
CHECKED_EVERY = 1000
"""After so many records of a pass their share of problems is looked at, and at its end."""

Tell = Callable[[RowProblem], None]


@dataclass(frozen=True)
class RowStream:
    """Rows of sets without an end.

    Attributes:
        sets: where they come from; opened for streaming.
        weights: how often a row of each set comes, beside the others.
        seed: another seed gives another order.
        limits: of downloads, which are made as their rows come by.
        download: False downloads nothing.
        max_skipped: share of the records of a set that may be problems.
        on_problem: "stop" allows none.
        held_out: (number of the set, source, index) of rows that are not to come, because they are validation rows.
        held_out_keys: what ties a row to them, see `cells.group_keys`; such rows do not come either.
    """

    sets: Sequence[RecordSet]
    weights: Sequence[float]
    seed: int = 0
    limits: FetchLimits | None = None
    download: bool = True
    max_skipped: float = 0.05
    on_problem: Literal["skip", "stop"] = "skip"
    held_out: frozenset[tuple[int, str, int]] = frozenset()
    held_out_keys: frozenset[str] = frozenset()

    def rows(self, tell: Tell, *, start: int = 0, shuffled: bool = True) -> Iterator[Row]:
        """Rows from position `start` on.

        Args:
            tell: called with each problem, once.
            start: so many rows are passed over.
            shuffled: False gives the order of the sets.
        Example: sets a (rows 0, 1) and b (row 0), weights 2 and 1, not shuffled -> a0, b0, a1, a0, b0, a1, ...
        Raises: DataError when a set has too many problems; NoUsableRowError when it has nothing else, or nothing else
            among its first 1,000 records.
        """
        sources = [self._endless(number, tell, shuffled) for number in range(len(self.sets))]
        return (row for _, row in islice(interleaved(sources, self.weights), start, None))

    def passes(self, tell: Callable[[int, RowProblem], None]) -> list[Iterator[Row]]:
        """One pass over each set, in order, for `interleaved`.

        Args:
            tell: called with the number of the set and each problem.
        Raises: as `rows` does, while rows are taken.
        """
        return [self._one_pass(number, partial(tell, number), set()) for number in range(len(self.sets))]

    def without(self, rows: Sequence[Row], held_out: Iterable[tuple[int, str, int]] = ()) -> "RowStream":
        """The same stream without rows that share an image with validation rows, and without these themselves.

        Args:
            rows: the validation rows.
            held_out: number of the set, source and index of those that are of this stream.
        """
        keys = frozenset(key for row in rows for key in group_keys(row))
        return replace(self, held_out=frozenset(held_out), held_out_keys=keys)

    def _endless(self, number: int, tell: Tell, shuffled: bool) -> Iterator[Row]:
        """One set again and again."""
        told: set[int] = set()
        for turn in count():
            rows = self._one_pass(number, tell, told)
            if shuffled:
                rows = _shuffled(rows, Random(f"stream {self.seed} {number} {turn}"))
            found = False
            for row in rows:
                found = True
                yield row
            if not found:  # each is held out, or shares an image with one that is: of nothing but faults a pass tells
                raise NoUsableRowError(StreamTally(self.sets[number].map.source).nothing_left())

    def _one_pass(self, place: int, tell: Tell, told: set[int]) -> Iterator[Row]:
        """The usable rows of a set in order, its problems told the first time."""
        records = self.sets[place]
        tally = StreamTally(records.map.source)
        for number, outcome in self._outcomes(records):
            tally.seen += 1
            problem = self._problem(place, number, outcome)
            if problem is not None:
                tally.note(problem)
                if number not in told:
                    told.add(number)
                    tell(problem)
                if self.on_problem == "stop" and tally.faults:
                    raise DataError(f"{problem}; data.on_problem is stop: mend the row, or set it to skip")
            elif isinstance(outcome, Row) and (place, outcome.source, outcome.index) not in self.held_out:
                yield outcome
            if tally.seen % CHECKED_EVERY == 0:
                self._judge(tally)
        self._judge(tally)

    def _problem(self, place: int, number: int, outcome: Row | UnusableRecord) -> RowProblem | None:
        """Why a record is not among the rows, unless it is held out itself."""
        if isinstance(outcome, UnusableRecord):
            return self.sets[place].problem(number, outcome)
        if not self.held_out_keys or (place, outcome.source, outcome.index) in self.held_out:
            return None
        if self.held_out_keys.isdisjoint(group_keys(outcome)):
            return None
        return shared_image_problem(outcome.source, outcome.index)

    def _judge(self, tally: StreamTally) -> None:
        """Raises: DataError when there are more problems than allowed; NoUsableRowError when there is nothing else."""
        if (error := tally.refusal(self.max_skipped, self.on_problem)) is not None:
            raise error

    def _outcomes(self, records: RecordSet) -> Iterator[tuple[int, Row | UnusableRecord]]:
        """Each record's number with its row or with what is wrong with it, downloads made for some at a time."""
        patient, waiting = records.waiting_for_downloads(), []
        for number, record in enumerate(records.records()):
            waiting.append((number, record, _attempt(patient, record, number)))
            if len(waiting) == _DOWNLOADED_AT_ONCE or not self.download:
                yield from self._downloaded(records, waiting)
                waiting = []
        yield from self._downloaded(records, waiting)

    def _downloaded(
        self, records: RecordSet, waiting: Sequence[tuple[int, Mapping, Row | UnusableRecord]]
    ) -> Iterator[tuple[int, Row | UnusableRecord]]:
        """Outcomes whose missing images were downloaded first."""
        rows = [outcome for _, _, outcome in waiting if isinstance(outcome, Row)]
        missing = dict.fromkeys(image.url for row in rows for image in row.images if image.url and image.path is None)
        if not missing or not self.download or records.map.cells.cache is None:
            yield from ((number, outcome) for number, _, outcome in waiting)
            return
        failures: Mapping[str, FetchFailure] = fetch_images(missing, records.map.cells.cache, self.limits).failures
        told = replace(records, map=replace(records.map, cells=replace(records.map.cells, failures=failures)))
        for number, record, outcome in waiting:
            absent = isinstance(outcome, Row) and any(image.url in missing for image in outcome.images)
            yield number, _attempt(told, record, number) if absent else outcome


def _attempt(records: RecordSet, record: Mapping, number: int) -> Row | UnusableRecord:
    """The row of a record whose images have been looked at, or what is wrong with it."""
    try:
        row = records.made(record, number)
        check_images(row, records.max_pixels)
        return row
    except UnusableRecord as problem:
        return problem


def _shuffled(rows: Iterator[Row], random: Random) -> Iterator[Row]:
    """All rows once, each drawn from a window that moves over them."""
    window: list[Row] = []
    held = 0
    for row in rows:
        window.append(row)
        held += _embedded_bytes(row)
        while len(window) >= WINDOW_ROWS or held > WINDOW_BYTES:
            drawn = _draw(window, random)
            held -= _embedded_bytes(drawn)
            yield drawn
    while window:
        yield _draw(window, random)


def _draw(window: list[Row], random: Random) -> Row:
    """Takes a row out of a window; the last one comes to its place."""
    place = random.randrange(len(window))
    window[place], window[-1] = window[-1], window[place]
    return window.pop()


def _embedded_bytes(row: Row) -> int:
    """Size of the images that a row holds."""
    return sum(len(image.data) for image in row.images if image.data is not None)


def interleaved(sources: Sequence[Iterator[Row]], weights: Sequence[float]) -> Iterator[tuple[int, Row]]:
    """Rows of several sources with the number of each; at any time each has given its share, to within one row.

    A source that comes to its end leaves the others to share what follows.
    Example: weights 2 and 1 -> a, b, a, a, b, a, ...: the source that is furthest behind its share comes next.
    """
    left = dict(enumerate(sources))
    given = dict.fromkeys(left, 0)
    while left:
        rows, total = sum(given[number] for number in left) + 1, sum(weights[number] for number in left)
        chosen = max(left, key=lambda number: rows * weights[number] / total - given[number])
        row = next(left[chosen], None)
        if row is None:
            del left[chosen]
            continue
        given[chosen] += 1
        yield chosen, row
