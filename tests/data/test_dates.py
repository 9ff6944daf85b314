"""Dates and times of Parquet files: one out of range is a problem of its row, an unknown zone one line."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.data.columns import RowOptions
from phi3v.data.opening import open_set
from phi3v.data.schema import RowProblem
from phi3v.data.sources import load_rows, stream_data
from phi3v.data.templates import NoDate
from phi3v.errors import DataError

OPTIONS = RowOptions(images=None, prompt="?", answer="{day}")

pytestmark = pytest.mark.usefixtures("datasets_cache")


def days(path: Path, kind: pa.DataType, bad: int, rows: int = 100) -> str:
    """A Parquet file with the date 0 in every row but the seventh."""
    counts = pa.array([bad if number == 7 else 0 for number in range(rows)], pa.int64())
    counts = counts.cast(pa.int32()) if kind == pa.date32() else counts
    pq.write_table(pa.table({"day": counts.view(kind)}), path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "bad", "text"),
    [
        (pa.timestamp("ms"), 253402300800000, "1970-01-01 00:00:00"),
        (pa.timestamp("ms", "UTC"), 2**60, "1970-01-01 00:00:00+00:00"),
        (pa.date32(), 2**30, "1970-01-01"),
    ],
)
def test_a_date_out_of_range_is_a_problem_of_its_row(kind: pa.DataType, bad: int, text: str, tmp_path: Path) -> None:
    source = days(tmp_path / "a.parquet", kind, bad)
    problem = RowProblem(7, "value_type", "column 'day' holds a date or time that is out of range", source)
    rows, problems = load_rows(source, options=OPTIONS)
    assert ([row.answer for row in rows], problems) == ([text] * 99, [problem])
    assert rows[7].index == 8 and rows[7].answer == text
    told: list[Any] = []
    stream = stream_data(source, options=OPTIONS, validation_split=None).train.rows(told.append, shuffled=False)
    assert [next(stream).index for _ in range(99)] == [row.index for row in rows] and told == [problem]


def test_dates_at_any_depth_are_what_they_were(tmp_path: Path) -> None:
    kind = pa.struct({"at": pa.list_(pa.timestamp("ms", "UTC")), "bytes": pa.binary()})
    good = {"at": [datetime(2024, 5, 1, 10, 30, tzinfo=UTC), None], "bytes": b"x"}
    late = pa.array([[2**60]], pa.list_(pa.int64())).view(pa.list_(pa.timestamp("ms", "UTC")))
    bad = pa.StructArray.from_arrays([late, pa.array([b"x"])], fields=list(kind))
    cells = pa.chunked_array([pa.array([good], kind), bad])
    table = pa.table({"title": ["a", "b"], "day": pa.array([date(2024, 5, 1), None]), "other": cells})
    pq.write_table(table, tmp_path / "a.parquet")
    expected = [
        {"title": "a", "day": date(2024, 5, 1), "other": good},
        {"title": "b", "day": None, "other": NoDate()},
    ]
    for streaming in (False, True):
        assert list(open_set(str(tmp_path / "a.parquet"), streaming=streaming)["train"].table) == expected
    opened = open_set(str(tmp_path / "a.parquet"))["train"].table
    assert opened[1] == expected[1] and opened.__getitems__([1, 0]) == expected[::-1]


def test_an_unknown_zone_is_one_line_where_its_column_is_read(tmp_path: Path) -> None:
    times = pa.array([5] * 3, pa.timestamp("ms", "Mars/Phobos"))
    pq.write_table(pa.table({"title": ["a", "b", "c"], "day": times}), tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    line = r"cannot be read: column 'day' is of the type timestamp\[ms, tz=Mars/Phobos\], and no zone of that name is"
    with pytest.raises(DataError, match=line):
        load_rows(source, options=OPTIONS)
    rows, problems = load_rows(source, options=RowOptions(images=None, prompt="?", answer="{title}"))
    assert ([row.answer for row in rows], problems) == (["a", "b", "c"], [])
