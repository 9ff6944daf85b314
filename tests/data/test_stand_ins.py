"""Where a row cannot be encoded the next one stands in, and the row is told of once."""

import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from phi3v.data.schema import Message, Row, RowProblem, TextPart
from phi3v.data.stand_ins import StandIns
from phi3v.errors import DataError, ImageError, TooLongError
from phi3v.run_folder import RunFolder
from phi3v.training.failed_rows import FailedRows
from phi3v.training.loader_watch import taking_over


class Numbers:
    """Encoded rows whose sample is their number; some cannot be encoded."""

    def __init__(self, count: int, bad: dict[int, DataError]) -> None:
        self.rows = [Row((Message("user", (TextPart("?"),)),), (), {}, "a.csv", number) for number in range(count)]
        self.bad = bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if number in self.bad:
            raise self.bad[number]
        return {"input_ids": torch.tensor([number])}


def test_the_next_row_stands_in() -> None:
    told: list[RowProblem] = []
    bad: dict[int, DataError] = {
        1: ImageError("a.csv, row 1: image b.png does not decode"),
        2: TooLongError("a.csv, row 2: 9 tokens"),
    }
    bad[5] = DataError("a.csv, row 5: 8 tokens")
    samples = StandIns(Numbers(6, bad), spare=3, tell=told.append)
    found = [[int(samples[number]["input_ids"]) for number in range(6)] for _ in range(2)]
    assert found == [[0, 3, 3, 3, 4, 0]] * 2
    assert told == [
        RowProblem(1, "image_unreadable", "image b.png does not decode", "a.csv"),
        RowProblem(2, "too_long", "9 tokens", "a.csv"),
        RowProblem(5, "not_encoded", "8 tokens", "a.csv"),
    ]
    with pytest.raises(DataError, match=r"row 2: 9 tokens; with it 2 rows could not be used when their turn came"):
        StandIns(Numbers(6, bad), spare=1.5)[1]
    with pytest.raises(
        DataError, match="with it 1 row could not be used when its turn came, and data.max_skipped leaves 0: mend"
    ):
        StandIns(Numbers(6, bad), spare=0)[1]
    with pytest.raises(ImageError, match=r"image b.png does not decode \(data.on_problem is stop: mend the data"):
        StandIns(Numbers(6, bad), spare=3, on_problem="stop")[1]
    with pytest.raises(DataError, match="no row can be encoded"):
        StandIns(Numbers(1, {0: DataError("x")}), spare=3)[0]


def test_a_row_is_named_once_by_a_warning_or_by_the_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Numbers(6, {number: DataError(f"a.csv, row {number}: 9 tokens") for number in (0, 2, 4)})
    samples = StandIns(rows, spare=2)
    assert [int(samples[number]["input_ids"]) for number in (0, 2)] == [1, 3]
    with pytest.raises(DataError, match=r"row 4: 9 tokens; with it 3 rows could not be used"):
        samples[4]
    assert [record.getMessage() for record in caplog.records] == [
        f"a.csv, row {number}: 9 tokens; the next row stands in for it" for number in (0, 2)
    ]
    told: list[RowProblem] = []
    samples = StandIns(rows, spare=2, tell=told.append)

    def slow(counted: StandIns) -> set[tuple[str, int]]:
        counted._failed[0] = 1  # by another worker, while this one reads rows
        return set()

    monkeypatch.setattr(StandIns, "_failed_rows", slow)
    assert int(samples[0]["input_ids"]) == 1 and told == []


def test_iterating_ends_behind_the_last_row() -> None:
    samples = StandIns(Numbers(3, {2: DataError("a.csv, row 2: 9 tokens")}), spare=3)
    assert [int(sample["input_ids"]) for _, sample in zip(range(9), samples, strict=False)] == [0, 1, 0]
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"there is no row {number}: there are 3"):
            samples[number]


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_loader_workers_share_what_may_fail() -> None:
    """Each of two workers meets two of the four bad samples, which are two rows: weights have each there twice."""
    rows = Numbers(12, {number: DataError(f"a.csv, row {number % 6}: 9 tokens") for number in (0, 3, 6, 9)})
    rows.rows = rows.rows[:6] * 2

    def loader(samples: StandIns) -> DataLoader[Any]:
        return DataLoader(samples, batch_size=1, num_workers=2, collate_fn=list, multiprocessing_context="fork")

    samples = StandIns(rows, spare=2)
    found = [int(sample["input_ids"]) for (sample,) in loader(samples)]
    assert found == [1, 1, 2, 4, 4, 5, 7, 7, 8, 10, 10, 11]
    assert [samples.is_own(number) for number in range(12)] == [False, True, True] * 4
    line = r"^a.csv, row \d: 9 tokens; with it 2 rows could not be used when their turn came"
    with pytest.raises(DataError, match=line), taking_over():
        list(loader(StandIns(rows, spare=1)))


def test_spawned_workers_share_it_too() -> None:
    samples = StandIns(Numbers(3, {1: DataError("a.csv, row 1: 9 tokens")}), spare=1, tell=str)
    sent = ForkingPickler.loads(ForkingPickler.dumps(samples))  # as it comes to a spawned process
    assert int(sent[1]["input_ids"]) == 2 and not samples.is_own(1)


def test_ranks_share_what_may_fail_by_the_run(tmp_path: Path) -> None:
    """Each of two ranks meets two of four bad rows; a session that goes on counts them on, one that starts over not."""
    rows = Numbers(12, {number: DataError(f"a.csv, row {number}: 9 tokens") for number in (0, 3, 6, 9)})
    run = RunFolder(tmp_path)
    run.write_problems([{"source": "a.csv", "row": 99, "reason_code": "missing_value", "message": "empty"}])

    def ranks(spare: int) -> list[StandIns]:
        found = [FailedRows(run) for _ in range(2)]
        return [StandIns(rows, spare=spare, tell=one, elsewhere=one.found) for one in found]

    first, second = ranks(spare=3)
    assert [int(one[number]["input_ids"]) for one, number in ((first, 0), (second, 3), (second, 6))] == [1, 4, 7]
    assert int(first[3]["input_ids"]) == 4  # found by the other one, and counted once
    with pytest.raises(DataError, match=r"row 9: 9 tokens; with it 4 rows could not be used when their turn came"):
        first[9]
    assert [line["row"] for line in map(json.loads, run.problems.read_text().splitlines())] == [99, 0, 3, 6, 9]
    with run.problems.open("a") as file:
        file.write('{"source": "a.csv", "ro')  # as a full disk leaves it
    gone_on = ranks(spare=4)
    assert [int(one[number]["input_ids"]) for one in gone_on for number in (0, 9)] == [1, 10] * 2
    rows.bad[2] = DataError("a.csv, row 2: 9 tokens")
    with pytest.raises(DataError, match=r"row 2: 9 tokens; with it 5 rows could not be used when their turn came"):
        gone_on[0][2]
    assert [line["row"] for line in run.read_problems()] == [99, 0, 3, 6, 9, 2]
    run.write_problems([{"source": "a.csv", "row": 3}])  # found when the rows were read, where it counts already
    assert FailedRows(run).found() == {("a.csv", number) for number in (0, 6, 9, 2)}
    run.write_problems([], anew=True)
    assert int(ranks(spare=1)[0][0]["input_ids"]) == 1
    assert [line["row"] for line in run.read_problems()] == [0]
