"""What can be watched of a training: rates, answers to fixed rows, the curve; in the run and at the trackers."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

import phi3v
from phi3v.errors import ConfigError
from phi3v.run_folder import RunFolder
from phi3v.training import trackers
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.meter import Meter, contents
from phi3v.training.trackers import tracker_callbacks

MakeRecipe = Callable[..., phi3v.Recipe]


def test_a_meter_counts_samples_tokens_and_pictures_without_padding() -> None:
    meter = Meter()
    packed = {"input_ids": torch.zeros(1, 5), "cu_seqlens": torch.tensor([0, 3, 5])}
    padded = {"input_ids": torch.zeros(2, 4), "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1]])}
    meter.add(*contents([packed, padded]))
    meter.add(*contents([{"input_ids": torch.zeros(1, 3), "image_sizes": [[336, 336], [672, 336]]}]))
    assert (meter.samples, meter.tokens, meter.pictures) == (4 + 1, 5 + 4 + 2 + 3, 2)
    rates = meter.rates()
    assert rates["tokens_per_second"] / rates["samples_per_second"] == pytest.approx(14 / 5)
    assert rates["memory_gib"] > 0.01


@pytest.fixture(scope="module")
def watched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that answers two of its held-out rows at each validation and tells both trackers."""
    folder, events = tmp_path_factory.mktemp("watched"), []
    recipe = phi3v.Recipe.from_dict(
        {
            "model": str(world / "model"),
            "data": {
                "train": str(world / "photos" / "rows.jsonl"),
                "prompt": "Which colour?",
                "answer": "It is {colour}.",
                "split": {"validation": 4},
            },
            "lora": {"r": 4},
            "training": {
                "samples_per_step": 3,
                "max_steps": 2,
                "eval_steps": 1,
                "save_steps": 1,
                "logging_steps": 1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "similarity",
            },
            "evaluation": {"during_training": 2, "max_new_tokens": 4},
            "report": {"to": ["wandb", "tensorboard"]},
            "output": str(folder / "run"),
        }
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        patched.setenv("WANDB_SILENT", "true")
        patched.setenv("HOME", str(folder / "home"))  # where W&B would keep photos of tables
        patched.delenv("WANDB_DATA_DIR", raising=False)
        phi3v.train(recipe, on_event=events.append)
    return {"run": RunFolder(recipe.output), "events": events}


def test_steps_have_rates(watched: dict[str, Any]) -> None:
    steps: list[TrainingEvent] = [event for event in watched["events"] if event.kind == "step"]
    assert [event.step for event in steps] == [1, 2]
    for event in steps:
        assert set(event.rates) == {"samples_per_second", "tokens_per_second", "memory_gib"}
        assert all(value > 0 for value in event.rates.values())


def test_answers_are_told_scored_and_kept(watched: dict[str, Any]) -> None:
    told = [event for event in watched["events"] if event.kind == "samples"]
    assert [event.step for event in told] == [1, 2] and all(len(event.answers) == 2 for event in told)
    assert [one["row"] for one in told[0].answers] == [one["row"] for one in told[1].answers]
    lines = watched["run"].read_metrics()
    assert [line["answers"] for line in lines if "answers" in line] == [event.answers for event in told]
    scored = [line for line in lines if "eval_similarity" in line]
    assert len(scored) == 2 and all(0 <= line["eval_similarity"] <= 1 and "eval_loss" in line for line in scored)
    for one in told[0].answers:
        assert one["question"] == "Which colour?" and one["expected"].startswith("It is ")


def test_the_curve_is_a_picture(watched: dict[str, Any]) -> None:
    with Image.open(watched["run"].path / "loss.png") as curve:
        assert curve.format == "PNG" and min(curve.size) > 300
        assert len(curve.convert("RGB").getcolors(10**6)) > 10


def is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x89PNG" and path.name != "loss.png"


def test_a_run_that_goes_on_is_one_run_to_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found: list[str] = []
    for done, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):  # killed after step 4, its checkpoint is of step 2
        names: list[str] = ["tensorboard", "wandb"]
        board, _ = tracker_callbacks(names, folder=tmp_path, project=None, run_name="run", config={}, done=done)
        for step in steps:
            board.tb_writer.add_scalar("loss", done, step)  # type: ignore[attr-defined]
        board.tb_writer.close()  # type: ignore[attr-defined]
        found.append(wandb.run.id)
        wandb.finish()
        time.sleep(1)  # names of their files have seconds
    assert found[0] == found[1]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(one.step, one.value) for one in shown] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    class Failing(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            told.append("log")
            raise ConnectionResetError("Connection lost")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            told.append("step")

    monkeypatch.setattr(trackers, "_tensorboard", lambda folder, done: Failing())
    recipe = make(report={"to": "tensorboard"}, training={"max_steps": 3})
    assert phi3v.train(recipe).steps == 3
    assert told == ["step", "log"]
    assert caplog.text.count("tensorboard failed (Connection lost): nothing more is shown there") == 1
    assert [line["step"] for line in RunFolder(recipe.output).read_metrics() if "loss" in line] == [1, 2, 3]


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(
        ConfigError, match="^report.to names tensorboard, which cannot begin [(].*take it out"
    ) as caught:
        tracker_callbacks(["tensorboard"], folder=tmp_path, project=None, run_name="run", config={})
    assert "\n" not in str(caught.value)


def test_trackers_get_answers_with_their_photos(watched: dict[str, Any]) -> None:
    folder = watched["run"].path
    tables = list((folder / "wandb").rglob("answers_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["step", "images", "question", "expected", "answer"] and len(table["data"]) == 2
    assert len([path for path in (folder / "wandb").rglob("*") if path.is_file() and is_png(path)]) == 4
    assert not [path for path in (folder.parent / "home").rglob("*") if path.is_file() and is_png(path)]
    assert "WANDB_DATA_DIR" not in os.environ
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert any(tag.startswith("answers/row") for tag in events.Tags()["tensors"])
    assert len(events.Tags()["images"]) == 2
