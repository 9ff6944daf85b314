"""Training samples of an endless stream of rows, for torch's DataLoader.

In come a stream and what encodes a row; out come samples, the same at every position whatever the number of loader
workers and wherever a run goes on. A row that cannot be encoded is told of and replaced by the next one that can, so
positions stay what they are.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from phi3v.data.encode import Example
from phi3v.data.judging import most_allowed
from phi3v.data.schema import Row, RowProblem
from phi3v.data.stand_ins import TOO_MANY_FAILED, row_problem, stopped_by
from phi3v.data.streaming import CHECKED_EVERY, RowStream
from phi3v.errors import DataError

_MOST_STAND_INS = 100
"""Rows in a row that may fail before the stream is given up."""
_MOST_WORKERS = 4096
"""More loader workers than any machine runs; each has its own place among the shared counts."""
_FAILED, _POSITION = 0, 1


class StreamedExamples(IterableDataset[Example]):
    """Samples without an end.

    Attributes:
        start: position of the first sample: samples that a resumed run has had already.
    """

    def __init__(
        self,
        stream: RowStream,
        encode: Callable[[Row], Example],
        *,
        micro_batch: int,
        start: int = 0,
        tell: Callable[[RowProblem], None] = lambda problem: None,
    ) -> None:
        """Keep the stream.

        Args:
            stream: the rows.
            encode: makes a sample of a row; raises DataError where it cannot.
            micro_batch: samples in a batch of the loader, whose workers take batches in turn.
            start: samples to pass over, without encoding them.
            tell: called with each row that is left out, in whichever process finds it.
        """
        self.stream = stream
        self.encode = encode
        self.micro_batch = micro_batch
        self.start = start
        self.tell = tell
        # In memory that loader workers share. Each writes its own line alone, so no lock is needed, which could not go
        # to forked and to spawned workers alike.
        self._counts = torch.zeros((_MOST_WORKERS, 2), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Example]:
        """Samples from `start` on; a loader worker gives those of its own batches alone.

        Example: micro_batch 2 and 2 workers -> worker 0 gives the samples 0, 1, 4, 5, ..., worker 1 the others.
        """
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        tell = self.tell if mine == 0 else lambda problem: None  # every worker reads all rows
        rows = self.stream.rows(tell, start=self.start)
        ahead: deque[Row | None] = deque()
        position = 0
        counts = self._counts[mine]
        counts.zero_()

        def is_mine(place: int) -> bool:
            return place // self.micro_batch % workers == mine

        while True:
            if is_mine(position):
                sample, failed = self._sample(ahead, rows)
                # A worker also meets bad rows of another one's, in search of a stand-in; that one meets them, too.
                counts[_FAILED] += sum(is_mine(position + place) for place in failed)
                counts[_POSITION] = position
                yield sample
                self._refuse_failures(workers)
            if not ahead:
                ahead.append(next(rows))
            ahead.popleft()
            position += 1

    def _sample(self, ahead: deque[Row | None], rows: Iterator[Row]) -> tuple[Example, list[int]]:
        """The sample of the first row ahead that can be encoded, and the places ahead of those that now could not; such
        a row is None from then on."""
        failed: list[int] = []
        problem: RowProblem | str = "all had failed before"
        for place in range(_MOST_STAND_INS):
            if place == len(ahead):
                ahead.append(next(rows))
            row = ahead[place]
            if row is None:
                continue
            try:
                return self.encode(row), failed
            except DataError as error:
                if self.stream.on_problem == "stop":
                    raise stopped_by(error) from error
                ahead[place] = None
                failed.append(place)
                problem = row_problem(row, error)
                self.tell(problem)
        raise DataError(
            f"{_MOST_STAND_INS} rows one after the other could not be encoded, the last of them: {problem}; look at "
            "the set with phi3v data check"
        )

    def _refuse_failures(self, workers: int) -> None:
        """Raises: DataError when more rows have failed in all workers than the stream allows of its records.

        Both count from `start` on: how many failed before a run went on is not known here.
        They are held against the foremost worker's position: those behind it have still to count some of theirs.
        """
        counts = self._counts[:workers]
        failed, position = int(counts[:, _FAILED].sum()), int(counts[:, _POSITION].max())
        if position >= CHECKED_EVERY and failed > most_allowed(self.stream.max_skipped, position):
            raise DataError(
                f"{failed} of {position} rows could not be encoded when their turn came, more than "
                f"data.max_skipped allows: {TOO_MANY_FAILED}"
            )
