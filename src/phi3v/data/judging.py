"""How many rows may be left out: the rule by which `phi3v data check` and a training refuse the same sets.

In come problems and counts; out comes one line for people, or None. Opens nothing and knows no recipes.

Every row that is left out counts against `data.max_skipped` and `data.on_problem`, with one exception: of a stream a
row that shares an image with a held-out one (`held_out_image`) is told and does not count. It is sound, and it stands
right behind the held-out rows, which are a stream's first: where one photo has a hundred questions, such rows would be
a tenth of the first thousand records, by which a stream is judged first, and next to none of the whole set.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from phi3v.data.mixing import SetUse
from phi3v.data.schema import RowProblem
from phi3v.errors import DataError, NoUsableRowError

_SHARED = "held_out_image"
_TOLD = 3
"""Problems that a line tells one by one."""
_LONG = 40
"""Letters from which on a way out that problems share is told once."""


def refusal(
    problems: Sequence[RowProblem], total: int, source: str, *, max_skipped: float, on_problem: str
) -> str | None:
    """Why rows are refused: more are left out than the recipe allows, none is usable, or there is none; else None.

    Example: 3 problems of 40 rows, max_skipped 0.05 -> "shop.csv: 3 of 40 rows cannot be used (3 missing_value): ...;
    at most 5% may be left out (data.max_skipped): ..."; 2 of 40 -> None.

    Args:
        problems: rows that were left out and count, see `counted`.
        total: rows of the set.
        source: what the set is called.
        max_skipped: share that may be left out; 1.0 allows all.
        on_problem: "stop" allows none.
    """
    if not total:
        return f"{source} has no rows"
    line = describe_problems(problems, total, source)
    if on_problem == "stop" and problems:
        return f"{line}; data.on_problem is stop: mend them, or set it to skip"
    if max_skipped < 1.0 and (len(problems) == total or len(problems) > most_allowed(max_skipped, total)):
        return f"{line}; {_limit(max_skipped, total)}"
    return None


def most_allowed(share: float, total: int) -> int:
    """The most rows of `total` within a share as it is written: 0.29 of 100 are 29, though 0.29 * 100 is less.

    Example: most_allowed(0.05, 40) -> 2; most_allowed(0.05, 39) -> 1.
    """
    most = int(share * total)
    return most + 1 if total and (most + 1) / total <= share else most


def counted(problems: Sequence[RowProblem], *, streamed: bool) -> Sequence[RowProblem]:
    """The problems that count against what a recipe allows: all, but of a stream those alone that are faults."""
    return [problem for problem in problems if is_fault(problem)] if streamed else problems


def is_fault(problem: RowProblem) -> bool:
    """Whether something is wrong with the row itself, and not only its image a held-out one."""
    return problem.reason_code != _SHARED


def uncounted(reasons: Mapping[str, int], *, streamed: bool) -> int:
    """How many rows are left out and do not count: {"held_out_image": 9, "missing_value": 2} of a stream -> 9."""
    return reasons.get(_SHARED, 0) if streamed else 0


def shared_image_problem(source: str, row: int) -> RowProblem:
    """A training row that is left out because of its image."""
    return RowProblem(row, "held_out_image", "it shares an image with a validation row", source)


def unused_set(sets: Sequence[SetUse], used: Collection[int], problems: Sequence[RowProblem]) -> str | None:
    """Why one of several sets cannot take part: it has no row to train on; None where each that is asked for one has.

    Its share would fall to the others, and nobody has asked for a training without it.
    Example: "c.jsonl has no row to train on (2 missing_value): row 0: column 't' is empty; row 1: ...; mend it, or take
    it out of data.train".

    Args:
        sets: what an epoch holds of each; one that weights or `data.max_rows` leave out is not missed.
        used: numbers of those that have a row to train on.
        problems: all rows that are left out.
    """
    for number, one in enumerate(sets):
        if number in used or (one.rows and not one.epoch):
            continue
        its = [problem for problem in problems if problem.source == one.source]
        counts = ", ".join(f"{count} {code}" for code, count in Counter(one.reason_code for one in its).most_common())
        why = f" ({counts}): {_first_told(its[:_TOLD], one.source)}" if its else ": each is held out or cannot be used"
        return f"{one.source} has no row to train on{why}; mend it, or take it out of data.train"
    return None


@dataclass
class StreamTally:
    """What was seen of one set of a stream.

    Attributes:
        source: the set.
        seen: its records, held-out ones among them.
        usable: rows to train on.
        reasons: reason code of a fault -> rows.
        first: the first three of them.
        shared: rows that share an image with a held-out one.
    """

    source: str
    seen: int = 0
    usable: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[RowProblem] = field(default_factory=list)
    shared: int = 0

    def note(self, problem: RowProblem) -> None:
        """Counts a problem of a record that was seen."""
        if not is_fault(problem):
            self.shared += 1
            return
        self.reasons[problem.reason_code] += 1
        if len(self.first) < _TOLD:
            self.first.append(problem)

    @property
    def faults(self) -> int:
        """Rows that count against `data.max_skipped`."""
        return self.reasons.total()

    def refusal(self, max_skipped: float, on_problem: str) -> DataError | None:
        """Why a training gives the set up after what was seen of it; None when it goes on.

        A NoUsableRowError says that there was nothing but faults, which no `max_skipped` allows.
        """
        if not self.faults:
            return None
        line = describe_counts(self.reasons, self.first, self.seen, self.source)
        if on_problem == "stop":
            return DataError(f"{line}; data.on_problem is stop: mend them, or set it to skip")
        if self.faults > most_allowed(max_skipped, self.seen):
            return DataError(f"{line}; {_limit(max_skipped, self.seen)}")
        if self.faults == self.seen:
            return NoUsableRowError(f"{line}; no row is left to train on: mend the data")
        return None

    def nothing_left(self) -> str:
        """Why a set that was read to its end cannot take part, as none of its rows is usable.

        Its share of a mix does not fall to the others, as rows come by one at a time.
        """
        if self.faults and not self.shared:
            line = describe_counts(self.reasons, self.first, self.seen, self.source)
            return f"{line}; no row is left to train on: mend the data"
        return (
            f"{self.source} has no usable row to train on: each is held out, shares an image with a held-out row or "
            "cannot be used (phi3v data check names them); take it out of data.train, or change data.split or "
            "data.validation"
        )


def _limit(max_skipped: float, total: int) -> str:
    """What is allowed of so many rows, and the way out."""
    none = f", none of {total}" if max_skipped and not most_allowed(max_skipped, total) else ""
    return (
        f"at most {100 * max_skipped:.3g}% may be left out (data.max_skipped){none}: mend the data, or the columns in "
        "the recipe"
    )


def describe_problems(problems: Sequence[RowProblem], total: int, source: str) -> str:
    """One line: how many rows are left out, why, and the first three.

    Example: "shop.csv: 2 of 40 rows cannot be used (2 missing_value): row 3: column 'title' is empty; row 9: ...".
    """
    return describe_counts(Counter(problem.reason_code for problem in problems), problems[:_TOLD], total, source)


def describe_counts(reasons: Counter[str], first: Sequence[RowProblem], total: int, source: str) -> str:
    """The same where not all problems are at hand, only how many of each reason code there are."""
    if not total:
        return f"{source} has no rows"
    counts = ", ".join(f"{count} {code}" for code, count in reasons.most_common())
    return f"{source}: {reasons.total()} of {total} rows cannot be used ({counts}): {_first_told(first, source)}"


def _first_told(first: Sequence[RowProblem], source: str) -> str:
    """Problems one by one, with the source of those that are of another; a long way out that all of them name stands
    once, behind the last one.

    Example: "row 0: image a.png lies outside /data; row 1: image b.png lies outside /data (each: move it there, ...)".
    """
    tails = (
        [first[0].message[colon.start() :] for colon in re.finditer(": ", first[0].message)] if len(first) > 1 else []
    )
    tail = next((one for one in tails if all(problem.message.endswith(one) for problem in first)), "")
    tail = tail if len(tail) >= _LONG else ""
    short = [replace(problem, message=problem.message.removesuffix(tail)) for problem in first]
    told = "; ".join(f"row {one.row}: {one.message}" if one.source == source else str(one) for one in short)
    return f"{told} (each{tail})" if tail else told
