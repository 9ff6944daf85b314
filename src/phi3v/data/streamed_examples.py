"""Training samples of an endless stream of rows, for torch's DataLoader.

In come a stream and what encodes a row; out come samples, the same at every position whatever the number of loader
workers and wherever a run goes on. A row that cannot be encoded is told of and replaced by the next one that can, so
positions stay what they are.
"""

from collections import deque
from collections.abc import Callable, Iterator

from torch.utils.data import IterableDataset, get_worker_info

from phi3v.data.encode import Example
from phi3v.data.judging import most_allowed
from phi3v.data.schema import Row, RowProblem
from phi3v.data.stand_ins import row_problem
from phi3v.data.streaming import CHECKED_EVERY, RowStream
from phi3v.errors import DataError

_MOST_STAND_INS = 100
"""Rows in a row that may fail before the stream is given up."""


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
        self._failed = 0
        while True:
            if position // self.micro_batch % workers == mine:
                yield self._sample(ahead, rows)
                self._refuse_failures(position)
            if not ahead:
                ahead.append(next(rows))
            ahead.popleft()
            position += 1

    def _sample(self, ahead: deque[Row | None], rows: Iterator[Row]) -> Example:
        """The sample of the first row ahead that can be encoded; one that cannot is None from then on."""
        problem: RowProblem | str = "all had failed before"
        for place in range(_MOST_STAND_INS):
            if place == len(ahead):
                ahead.append(next(rows))
            row = ahead[place]
            if row is None:
                continue
            try:
                return self.encode(row)
            except DataError as error:
                if self.stream.on_problem == "stop":
                    raise
                ahead[place] = None
                self._failed += 1
                problem = row_problem(row, error)
                self.tell(problem)
        raise DataError(
            f"{_MOST_STAND_INS} rows one after the other could not be encoded, the last of them: {problem}; look at "
            "the set with phi3v data check"
        )

    def _refuse_failures(self, position: int) -> None:
        """Raises: DataError when more samples have failed than the stream allows of its records."""
        if position >= CHECKED_EVERY and self._failed > most_allowed(self.stream.max_skipped, position):
            raise DataError(
                f"{self._failed} of {position} rows could not be encoded when their turn came, more than "
                "data.max_skipped allows: mend the data, or raise it"
            )
