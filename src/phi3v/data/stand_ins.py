"""Training samples that never fail on a row: where one cannot be encoded, the next one stands in.

In come encoded rows; out come the same, but a row that turns out to be unusable when its turn comes (pixels that break
off further in, more tokens than the limit) is told to `on_problem` once and replaced by the row behind it. Which row
stands in depends on the rows alone, so a step has its number of samples, and a resumed run has the same ones.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch

from phi3v.data.encode import Example
from phi3v.data.schema import Row, RowProblem
from phi3v.errors import DataError, ImageError

_logger = logging.getLogger(__name__)


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
    ) -> None:
        """Keep the samples.

        Args:
            encoded: an `EncodedRows`: samples by number, and `rows`.
            spare: so many rows may fail; more stops with an error.
            on_problem: "stop" allows none.
            tell: called once with each problem, in whichever process finds it.
        """
        self.encoded = encoded
        self.spare = spare
        self.on_problem = on_problem
        self.tell = tell
        self._failed: set[int] = set()
        self._told: set[tuple[str, int]] = set()  # fewer, where weights repeat rows

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
            if number in self._failed:
                continue
            try:
                return self.encoded[number]
            except DataError as error:
                self._note(number, error)
        raise DataError("no row can be encoded")

    def is_own(self, index: int) -> bool:
        """Whether the sample of a row is its own, as far as this process has seen."""
        return index % len(self) not in self._failed

    def _note(self, number: int, error: DataError) -> None:
        """Counts and tells of a failure. Raises: DataError when it is one too many."""
        if self.on_problem == "stop":
            raise error
        self._failed.add(number)
        problem = row_problem(self.encoded.rows[number], error)
        if (problem.source, problem.row) in self._told:
            return
        self._told.add((problem.source, problem.row))
        self.tell(problem)
        _logger.warning("%s; the next row stands in for it", problem)
        if len(self._told) > self.spare:
            raise DataError(
                f"{problem}; with it {len(self._told)} rows could not be used when their turn came, more than "
                "data.max_skipped leaves: mend the data, or raise it"
            ) from error


def row_problem(row: Row, error: DataError) -> RowProblem:
    """An error of encoding as the problem of its row."""
    name = f"{row.source}, row {row.index}: "
    return RowProblem(row.index, reason_code_of(error), str(error).removeprefix(name), row.source)


def reason_code_of(error: DataError) -> str:
    """One word for an error of encoding: "image_unreadable", "too_long", or "not_encoded"."""
    return "image_unreadable" if isinstance(error, ImageError) else str(getattr(error, "reason_code", "not_encoded"))
