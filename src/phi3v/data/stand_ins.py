"""Training samples that never fail on a row: where one cannot be encoded, the next one stands in.

In come encoded rows; out come the same, but a row that turns out to be unusable when its turn comes (pixels that break
off further in, more tokens than the limit) is told to `on_problem` once and replaced by the row behind it. Which row
stands in depends on the rows alone, so a step has its number of samples, and a resumed run has the same ones.
"""

import logging
from collections.abc import Callable, Set
from typing import Any, Literal

import torch

from phi3v.data.encode import Example
from phi3v.data.schema import Row, RowProblem
from phi3v.errors import DataError, ImageError

_logger = logging.getLogger(__name__)

TOO_MANY_FAILED = "mend the data and give another output, or raise it, which a begun run takes"
"""What helps where more rows fail than data.max_skipped leaves; with mended photos it would be another run."""


class StandIns(torch.utils.data.Dataset[Example]):
    """Encoded rows without gaps.

    Example: rows 0, 1, 2 of which 1 does not decode -> samples 0, 2, 2; of which 2 does not -> samples 0, 1, 0.
    """

    def __init__(
        self,
        encoded: Any,
        *,
        spare: float,
        on_problem: Literal["skip", "stop"] = "skip",
        tell: Callable[[RowProblem], None] = lambda problem: None,
        elsewhere: Callable[[], Set[tuple[str, int]]] = frozenset,
    ) -> None:
        """Keep the samples.

        Args:
            encoded: an `EncodedRows`: samples by number, and `rows`.
            spare: so many rows may fail, whichever loader workers and ranks find them; more stops with an error.
            on_problem: "stop" allows none.
            tell: called once with each problem, in whichever process finds it.
            elsewhere: source and index of the rows that count beside those that these samples meet: what other ranks
                and other samples of the run have found. Asked after each failure alone.
        """
        self.encoded = encoded
        self.spare = spare
        self.on_problem = on_problem
        self.tell = tell
        self.elsewhere = elsewhere
        # A byte for each sample in memory that loader workers share. Each process only ever writes a 1, so no lock is
        # needed, which could not go to forked and to spawned workers alike.
        self._failed = torch.zeros(len(encoded), dtype=torch.uint8).share_memory_()
        self._keys: dict[int, tuple[str, int]] = {}  # of failed samples; fewer rows, where weights repeat them

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> Example:
        """The sample of a row, or of the first one behind it that can be encoded.

        Raises: DataError when too many rows fail, or with on_problem="stop" for the first; IndexError behind the last
        row, by which iterating ends.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no row {index}: there are {len(self)}")
        for place in range(index, index + len(self)):
            number = place % len(self)
            if self._failed[number]:
                continue
            try:
                return self.encoded[number]
            except DataError as error:
                self._note(number, error)
        raise DataError("no row can be encoded")

    def choose_epoch(self, epoch: int) -> None:
        """Has images changed as in this epoch, where they are changed."""
        self.encoded.choose_epoch(epoch)

    def is_own(self, index: int) -> bool:
        """Whether the sample of a row is its own, as far as this process and its loader workers have seen."""
        return not self._failed[index % len(self)]

    def _note(self, number: int, error: DataError) -> None:
        """Counts and tells of a failure. Raises: DataError when it is one too many."""
        if self.on_problem == "stop":
            raise stopped_by(error) from error
        before = self._failed_rows()  # reads rows, so another worker may come first meanwhile
        met, self._failed[number] = bool(self._failed[number]), 1
        problem = row_problem(self.encoded.rows[number], error)
        if met or (problem.source, problem.row) in before:
            return
        self.tell(problem)
        if (failed := len(self._failed_rows() | self.elsewhere())) <= self.spare:
            _logger.warning("%s; the next row stands in for it", problem)
        else:  # the error names the row; workers that still go on meanwhile say nothing of theirs
            rows = "1 row could not be used when its" if failed == 1 else f"{failed} rows could not be used when their"
            raise DataError(
                f"{problem}; with it {rows} turn came, and data.max_skipped leaves {int(self.spare)}: {TOO_MANY_FAILED}"
            ) from error

    def _failed_rows(self) -> set[tuple[str, int]]:
        """Source and index of the rows that have failed, in whichever process."""
        for number in self._failed.nonzero().flatten().tolist():
            if number not in self._keys:
                row = self.encoded.rows[number]
                self._keys[number] = (row.source, row.index)
        return set(self._keys.values())


def stopped_by(error: DataError) -> DataError:
    """The error of a row by which a recipe with `on_problem: stop` ends, with the way out."""
    way = "mend the data and give another output, or set skip, which a begun run takes"
    return type(error)(f"{error} (data.on_problem is stop: {way})")


def row_problem(row: Row, error: DataError) -> RowProblem:
    """An error of encoding as the problem of its row."""
    name = f"{row.source}, row {row.index}: "
    return RowProblem(row.index, reason_code_of(error), str(error).removeprefix(name), row.source)


def reason_code_of(error: DataError) -> str:
    """One word for an error of encoding: "image_unreadable", "too_long", or "not_encoded"."""
    return "image_unreadable" if isinstance(error, ImageError) else str(getattr(error, "reason_code", "not_encoded"))
