"""Streams: an order that seed and weights decide, each record a row or a problem, whatever the number of workers."""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from image_server import image_server, picture

from phi3v.data.columns import RowOptions
from phi3v.data.schema import Row, RowProblem
from phi3v.data.sources import Reading, load_rows, stream_data
from phi3v.data.streamed_examples import StreamedExamples
from phi3v.errors import DataError, NoUsableRowError, TooLongError

pytestmark = pytest.mark.usefixtures("datasets_cache")


def ignore(problem: RowProblem) -> None:
    """Nobody is told."""


def texts(count: int) -> list[str]:
    return [json.dumps({"q": f"q{number}", "a": f"a{number}"}) for number in range(count)]


def stream(folder: Path, count: int = 7, **more: Any) -> Any:
    (folder / "t.jsonl").write_text("\n".join(texts(count)) + "\n")
    options = RowOptions(images=None, prompt="{q}", answer="{a}")
    return stream_data(str(folder / "t.jsonl"), options=options, **more)


def first(rows: Iterator[Row], count: int) -> list[int]:
    return [next(rows).index for _ in range(count)]


def test_a_stream_gives_every_row_once_a_pass_in_an_order_of_its_seed(tmp_path: Path) -> None:
    data = stream(tmp_path)
    order = first(data.train.rows(ignore), 21)
    assert [sorted(order[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert order == first(stream(tmp_path).train.rows(ignore), 21) and order[:7] != order[7:14]
    assert order != first(stream(tmp_path, split_seed=1).train.rows(ignore), 21)
    assert first(data.train.rows(ignore, start=9), 12) == order[9:]
    assert first(data.train.rows(ignore, shuffled=False), 9) == [*range(7), 0, 1]


def test_a_streams_first_rows_are_held_out(tmp_path: Path) -> None:
    data = stream(tmp_path, validation_split=3)
    assert [row.index for row in data.validation] == [0, 1, 2] and data.origin == "split"
    assert set(first(data.train.rows(ignore), 40)) == {3, 4, 5, 6}
    with pytest.raises(DataError, match="asks for 9 rows, and the sets have fewer"):
        stream(tmp_path, validation_split=9)


def test_streams_are_mixed_by_weight(tmp_path: Path) -> None:
    sets = []
    for name, count, weight in (("a", 3, 2.0), ("b", 50, 1.0)):
        (tmp_path / f"{name}.csv").write_text("q,a\n" + "".join(f"{name},{n}\n" for n in range(count)))
        sets.append({"source": str(tmp_path / f"{name}.csv"), "weight": weight})
    options = RowOptions(images=None, prompt="{q}", answer="{a}")
    rows = stream_data(sets, options=options).train.rows(ignore)
    assert [next(rows).question for _ in range(9)] == ["a", "b", "a"] * 3
    with pytest.raises(DataError, match="with data.streaming each of several sets needs a weight"):
        stream_data([{"source": one["source"]} for one in sets], options=options)


def test_a_streams_problems_are_told_once_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"q": f"q{number}", "a": None if number % 10 == 4 else "a"}) for number in range(1500)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    options = RowOptions(images=None, prompt="{q}", answer="{a}")
    told: list[RowProblem] = []
    data = stream_data(str(tmp_path / "t.jsonl"), options=options, reading=Reading(max_skipped=0.1))
    rows = data.train.rows(told.append)
    assert sorted(first(rows, 1350)) == [number for number in range(1500) if number % 10 != 4]
    first(rows, 1350)
    assert [problem.row for problem in told] == list(range(4, 1500, 10))
    assert {problem.reason_code for problem in told} == {"missing_value"}
    strict = stream_data(str(tmp_path / "t.jsonl"), options=options, reading=Reading(max_skipped=0.09))
    with pytest.raises(DataError, match=r"100 of 1000 rows cannot be used .*at most 9% may be left out"):
        first(strict.train.rows(ignore), 1000)


def test_a_stream_of_nothing_but_problems_is_given_up_with_its_reasons(tmp_path: Path) -> None:
    lines = [json.dumps({"q": f"q{number}", "a": [] if number % 3 else None}) for number in range(2500)]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, *texts(1)]) + "\n")
    options = RowOptions(images=None, prompt="{q}", answer="{a}")
    for allowed, error, end in (
        (1.0, NoUsableRowError, "; no row is left to train on: mend the data"),
        (
            0.5,
            DataError,
            "; at most 50% may be left out (data.max_skipped): mend the data, or the columns in the recipe",
        ),
    ):
        told: list[RowProblem] = []
        data = stream_data(str(tmp_path / "t.jsonl"), options=options, reading=Reading(max_skipped=allowed))
        with pytest.raises(error) as caught:
            next(data.train.rows(told.append))
        head = f"{tmp_path / 't.jsonl'}: 1000 of 1000 rows cannot be used (666 value_type, 334 missing_value): row 0: "
        assert str(caught.value).startswith(head) and str(caught.value).endswith(end)
        assert [problem.row for problem in told] == list(range(1000))


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("workers", [0, 3])
def test_loader_workers_change_nothing(workers: int, tmp_path: Path) -> None:
    def sample(row: Row) -> dict[str, torch.Tensor]:
        if row.index == 2:
            raise TooLongError("t.jsonl, row 2: too long")
        return {"input_ids": torch.tensor([row.index])}

    told: list[RowProblem] = []
    data = stream(tmp_path)
    examples = StreamedExamples(data.train, sample, micro_batch=2, start=5, tell=told.append)
    order = first(data.train.rows(ignore), 40)
    expected = [next(n for n in order[place:] if n != 2) for place in range(5, 25)]
    batches = iter(torch.utils.data.DataLoader(examples, batch_size=2, num_workers=workers, collate_fn=list))
    found = [int(example["input_ids"]) for _ in range(10) for example in next(batches)]
    assert found == expected
    if not workers:
        assert {problem.row for problem in told} == {2} and {problem.reason_code for problem in told} == {"too_long"}


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize(("allowed", "refused", "ranks"), [(0.15, True, 1), (0.15, True, 2), (0.25, False, 1)])
def test_loader_workers_share_what_may_fail_of_a_stream(
    allowed: float, refused: bool, ranks: int, tmp_path: Path
) -> None:
    """A fifth of the rows cannot be encoded; each of two workers sees a tenth, and its neighbour's as stand-ins. A rank
    reads all steps and keeps its part of each, so it counts what all of them have.
    """

    def sample(row: Row) -> dict[str, torch.Tensor]:
        if row.index % 5 == 0:
            raise TooLongError(f"t.jsonl, row {row.index}: too long")
        return {"input_ids": torch.tensor([row.index])}

    (tmp_path / "t.jsonl").write_text("\n".join(texts(1500)) + "\n")
    options = RowOptions(images=None, prompt="{q}", answer="{a}")
    data = stream_data(str(tmp_path / "t.jsonl"), options=options, reading=Reading(max_skipped=allowed))
    examples = StreamedExamples(data.train, sample, micro_batch=20, tell=ignore)
    part = IterableDatasetShard(examples, batch_size=20 // ranks, num_processes=ranks, process_index=ranks - 1)
    loader = torch.utils.data.DataLoader(part, batch_size=20 // ranks, num_workers=2, collate_fn=list)
    batches = iter(loader)
    with pytest.raises(DataError, match="rows could not be encoded .* more than") if refused else nullcontext():
        for _ in range(70):
            next(batches)


def make(kind: str, folder: Path) -> str:
    """Five photos with titles, in a set of some kind."""
    rows = [{"image": f"{number}.png", "title": f"t{number}"} for number in range(5)]
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture(number))
    if kind == "photo folder":
        lines = [json.dumps({"file_name": row["image"], "title": row["title"]}) for row in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)
    if kind == "csv":
        lines = ["image,title", *(f"{row['image']},{row['title']}" for row in rows)]
        (folder / "a.csv").write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        features = datasets.Features({"image": datasets.Image(), "title": datasets.Value("string")})
        table = [{**row, "image": {"bytes": picture(n), "path": None}} for n, row in enumerate(rows)]
        datasets.Dataset.from_list(table, features=features).to_parquet(folder / "a.parquet")
    else:
        with tarfile.open(folder / "a.tar", "w") as tar:
            for number, row in enumerate(rows):
                for ending, data in (("png", picture(number)), ("title", row["title"].encode())):
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"a.{kind}")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "tar", "photo folder"])
def test_every_kind_of_set_streams_the_rows_that_it_has(kind: str, tmp_path: Path) -> None:
    source, options = make(kind, tmp_path), RowOptions(prompt="?", answer="{title}")
    rows = stream_data(source, options=options).train.rows(ignore, shuffled=False)
    assert [next(rows) for _ in range(5)] == list(load_rows(source, options=options)[0])


def test_a_streams_addresses_are_downloaded_as_they_come(tmp_path: Path) -> None:
    told: list[RowProblem] = []
    with image_server() as server:
        paths = ["/404/3.png" if number == 3 else f"/good/{number}.png" for number in range(100)]
        rows = [json.dumps({"image": server.url(path), "title": path}) for path in paths]
        (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
        how = Reading.of(image_cache=str(tmp_path / "cache"), allow_hosts=["127.0.0.1"])
        data = stream_data(str(tmp_path / "a.jsonl"), options=RowOptions(prompt="?", answer="{title}"), reading=how)
        found = data.train.rows(told.append, shuffled=False)
        assert first(found, 10) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
        assert server.count("/good/90.png") == 0
        assert first(found, 89) == list(range(11, 100))
    assert [(problem.row, problem.reason_code) for problem in told] == [(3, "url_not_found")]


def test_a_stream_that_would_break_off_is_refused_before_its_first_row(tmp_path: Path) -> None:
    line = f"{'x' * 10_000},2\n".encode()  # long enough that the beginning alone is fine
    (tmp_path / "a.csv").write_bytes(b"q,a\n" + line * 100 + b"\xff,2\n")
    with pytest.raises(DataError, match=r"a.csv cannot be read: line 102 is not UTF-8 text"):
        stream_data(str(tmp_path / "a.csv"), options=RowOptions(images=None, prompt="{q}", answer="{a}"))
