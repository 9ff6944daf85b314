"""Rows that turn out to be unusable while a run trains: named once in its problems.jsonl, by whichever process sees it.

In come problems from loader workers and ranks, which meet the same rows of a stream; out come lines, and the rows that
any of them has found. The file is what they share: it lies where all see it, is touched for a bad row alone and locked
for as long as a line takes, so no step pays for it and no process waits for another's work.
"""

import json
import os
from dataclasses import asdict

from phi3v.data.schema import RowProblem
from phi3v.data.scratch import alone
from phi3v.run_folder import RunFolder

RowKey = tuple[str, int]
"""Source and number of a row."""


class FailedRows:
    """The rows of a run that could not be used when their turn came, in all of its sessions.

    A run that goes on counts them on, so it ends where one that was never stopped would; the list of one that starts
    over is empty (`RunFolder.write_problems`). A row that the run has named is not named again: a stream is read from
    its start at the first look, in training and in each session. Loader workers have copies of this, each of which
    reads on where it was.
    """

    def __init__(self, run: RunFolder) -> None:
        """Of this run, whose folder is there."""
        self._run = run
        self._by_reading: set[RowKey] = set()  # which are left out, and counted as such
        self._found: set[RowKey] = set()
        self._read = 0  # bytes of the file that are known
        self.found()

    def __call__(self, problem: RowProblem) -> None:
        """Writes a row down, unless the run names it already."""
        key = (problem.source, problem.row)
        if key in self._by_reading or key in self._found:
            return
        with alone(self._run.problems) as file:
            self._read_on(file)
            if key not in self._found:
                os.ftruncate(file, self._read)  # half a line, left by a full disk, would spoil the next one
                self._run.append_problem(asdict(problem))

    def found(self) -> frozenset[RowKey]:
        """The rows that all processes of the run have named so far, those of its earlier sessions among them."""
        if self._run.problems.is_file():
            with alone(self._run.problems) as file:
                self._read_on(file)
        return frozenset(self._found)

    def _read_on(self, file: int) -> None:
        """Takes in the lines behind those that are known; a half one is none."""
        with open(file, "rb", closefd=False) as reader:
            reader.seek(self._read)
            text = reader.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            values = json.loads(line)
            known = self._by_reading if values.get("found") == "reading" else self._found
            known.add((values.get("source"), values.get("row")))
        self._found -= self._by_reading
