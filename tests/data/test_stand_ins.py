"""Where a row cannot be encoded the next one stands in, and the row is told of once."""

import pytest
import torch

from phi3v.data.schema import Message, Row, RowProblem, TextPart
from phi3v.data.stand_ins import StandIns
from phi3v.errors import DataError, ImageError, TooLongError


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
    with pytest.raises(ImageError, match="image b.png does not decode$"):
        StandIns(Numbers(6, bad), spare=3, on_problem="stop")[1]
    with pytest.raises(DataError, match="no row can be encoded"):
        StandIns(Numbers(1, {0: DataError("x")}), spare=3)[0]


def test_iterating_ends_behind_the_last_row() -> None:
    samples = StandIns(Numbers(3, {2: DataError("a.csv, row 2: 9 tokens")}), spare=3)
    assert [int(sample["input_ids"]) for _, sample in zip(range(9), samples, strict=False)] == [0, 1, 0]
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"there is no row {number}: there are 3"):
            samples[number]
