"""Rows that turn out to be unusable in training: named, replaced, and without an effect on steps and resumed runs."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_photos, write_tiny_model

import phi3v
from phi3v.errors import ConfigError, DataError
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
