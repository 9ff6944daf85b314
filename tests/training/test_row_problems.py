"""Rows that turn out to be unusable in training: named, replaced, and without an effect on steps and resumed runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_photos, write_tiny_model

import phi3v
from phi3v.data.columns import RowOptions
from phi3v.data.encode import encode
from phi3v.data.schema import Message, Row, RowProblem, TextPart
from phi3v.data.sources import Reading, stream_data
from phi3v.data.stand_ins import StandIns
from phi3v.data.streamed_examples import StreamedExamples
from phi3v.errors import ConfigError, DataError, ImageError
from phi3v.loading import load_processor
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares goes into a folder of the test run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 20 photos, of which number 7 breaks in its middle: header and end are sound."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 20)
    photo = folder / "photos" / "7.png"
    data = bytearray(photo.read_bytes())
    place = data.index(b"IDAT") + 8
    data[place : place + 8] = b"\xff" * 8
    photo.write_bytes(bytes(data))
    return folder


def make(world: Path, output: Path, changes: dict[str, Any], data: dict[str, Any]) -> phi3v.Recipe:
    values = {
        "model": {"name": str(world / "model"), "device": "cpu"},
        "data": {
            "train": str(world / "photos" / "rows.jsonl"),
            "prompt": "Which colour?",
            "answer": "It is {colour}.",
            "split": None,
            **data,
        },
        "lora": {"r": 4, "lora_dropout": 0.1},
        "training": {
            "samples_per_step": 4,
            "micro_batch_size": 2,
            "max_steps": 6,
            "save_steps": 2,
            "seed": 3,
            **changes,
        },
        "output": str(output),
    }
    return phi3v.Recipe.from_dict(values)


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
    bad = {1: ImageError("a.csv, row 1: image b.png does not decode"), 2: DataError("a.csv, row 2: 9 tokens")}
    bad[5] = DataError("a.csv, row 5: 8 tokens")
    samples = StandIns(Numbers(6, bad), spare=3, tell=told.append)
    found = [[int(samples[number]["input_ids"]) for number in range(6)] for _ in range(2)]
    assert found == [[0, 3, 3, 3, 4, 0]] * 2
    assert told == [
        RowProblem(1, "image_unreadable", "image b.png does not decode", "a.csv"),
        RowProblem(2, "too_long", "9 tokens", "a.csv"),
        RowProblem(5, "too_long", "8 tokens", "a.csv"),
    ]
    with pytest.raises(DataError, match=r"row 2: 9 tokens; with it 2 rows could not be used when their turn came"):
        StandIns(Numbers(6, bad), spare=1.5)[1]
    with pytest.raises(ImageError, match="image b.png does not decode$"):
        StandIns(Numbers(6, bad), spare=3, on_problem="stop")[1]
    with pytest.raises(DataError, match="no row can be encoded"):
        StandIns(Numbers(1, {0: DataError("x")}), spare=3)[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_photo_stops_neither_a_run_nor_its_resuming(
    streaming: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"streaming": streaming, "max_skipped": 0.1}
    whole = make(world, tmp_path / "whole", {}, data)
    result = phi3v.train(whole)
    assert (result.status, result.steps) == ("trained", 6)  # 24 samples of 20 rows: all photos have had their turn

    def interrupt(event: TrainingEvent) -> None:
        if event.kind == "step" and event.step == 3:
            raise KeyboardInterrupt

    cut = make(world, tmp_path / "cut", {}, data)
    with pytest.raises(KeyboardInterrupt):
        phi3v.train(cut, on_event=interrupt)
    assert phi3v.train(cut).resumed_from == 2
    weights = [load_file(RunFolder(r.output).adapter / "adapter_model.safetensors") for r in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for recipe in (whole, cut):
        (problem,) = RunFolder(recipe.output).read_problems()
        assert (problem["row"], problem["reason_code"], problem["found"]) == (7, "image_unreadable", "training")
        assert "7.png does not decode" in problem["message"]


def test_more_broken_photos_than_allowed_stop(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 7: image 7.png does not decode.*more than data.max_skipped leaves"):
        phi3v.train(make(world, tmp_path / "few", {}, {"max_skipped": 0.01}))
    with pytest.raises(DataError, match=r"row 7: image 7.png does not decode"):
        phi3v.train(make(world, tmp_path / "none", {}, {"on_problem": "stop"}))


def test_a_broken_photo_among_validation_rows_is_left_out_of_the_scores(world: Path, tmp_path: Path) -> None:
    rows = (world / "photos" / "rows.jsonl").read_text().splitlines()
    (world / "photos" / "held.jsonl").write_text("\n".join(rows[6:9]) + "\n")
    data = {"validation": str(world / "photos" / "held.jsonl"), "max_skipped": 0.2}
    recipe = make(world, tmp_path / "run", {"max_steps": 1}, data)
    result = phi3v.train(recipe)
    run = RunFolder(recipe.output)
    assert result.held_out == 3 and [line["row"] for line in run.read_predictions()] == [0, 2]
    assert any("row 1: image 7.png does not decode" in line for line in run.read_evaluation()["problems"])


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


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("workers", [0, 3])
def test_loader_workers_change_nothing(workers: int, world: Path, tmp_path: Path) -> None:
    processor = load_processor(str(world / "model"))

    def sample(row: Row) -> dict[str, torch.Tensor]:
        if row.index == 2:
            raise DataError("t.jsonl, row 2: too long")
        return encode(row, processor)

    told: list[RowProblem] = []
    data = stream(tmp_path)
    examples = StreamedExamples(data.train, sample, micro_batch=2, start=5, tell=told.append)
    order = first(data.train.rows(ignore), 40)
    expected = [next(n for n in order[place:] if n != 2) for place in range(5, 25)]
    batches = iter(torch.utils.data.DataLoader(examples, batch_size=2, num_workers=workers, collate_fn=list))
    found = [processor.tokenizer.decode(example["input_ids"]) for _ in range(10) for example in next(batches)]
    pairs = zip(expected, found, strict=True)
    assert all(f"q{number}" in text and f"a{number}" in text for number, text in pairs)
    if not workers:
        assert {problem.row for problem in told} == {2} and {problem.reason_code for problem in told} == {"too_long"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training": {}}, "data.streaming needs training.max_steps"),
        ({"vision": {"cache": "memory"}}, "vision.cache keeps all rows"),
        ({"data": {"train": "a.csv", "streaming": True}}, "data.split.validation is a share"),
    ],
)
def test_what_a_stream_cannot_give_is_one_line(changes: dict[str, Any], line: str) -> None:
    values = {
        "model": "a/b",
        "data": {"train": "a.csv", "streaming": True, "split": None},
        "training": {"max_steps": 5},
    }
    with pytest.raises(ConfigError, match=f"^{line}"):
        phi3v.Recipe.from_dict(values | changes)
