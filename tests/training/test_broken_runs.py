"""Runs with files that are gone or broken: they go on from what is whole, or one line names file and way out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_photos, write_tiny_model

import phi3v
from phi3v.adapters import check_adapter
from phi3v.data.schema import Row
from phi3v.errors import CheckpointError, ConfigError
from phi3v.evaluation.report_run import NEEDED, write_report
from phi3v.export.run import export
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target

MakeCopy = Callable[[], tuple[phi3v.Recipe, RunFolder]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> phi3v.Recipe:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    values: dict[str, Any] = {
        "model": str(write_tiny_model(folder / "model")),
        "data": {"train": str(write_photos(folder / "photos", 4)), "prompt": "What?", "answer": "It is {colour}."},
        "lora": {"r": 2},
        "training": {"samples_per_step": 2, "max_steps": 2, "save_steps": 1},
        "output": str(folder / "run"),
    }
    values["data"]["split"] = None
    recipe = phi3v.Recipe.from_dict(values)
    phi3v.train(recipe)
    return recipe


@pytest.fixture
def copy(trained: phi3v.Recipe, tmp_path: Path) -> MakeCopy:
    """Makes a copy of that run to be broken, with the recipe that goes on with it."""

    def make() -> tuple[phi3v.Recipe, RunFolder]:
        shutil.copytree(trained.output, tmp_path / "run")
        return trained.with_overrides([f"output={tmp_path / 'run'}"]), RunFolder(tmp_path / "run")

    return make


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(folder).adapter / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def flip(file: Path) -> None:
    """One bit near its end is another."""
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_finished_run_whose_weights_are_damaged_gets_them_back(
    trained: phi3v.Recipe, copy: MakeCopy, caplog: pytest.LogCaptureFixture
) -> None:
    """From its newest checkpoint; without one the line says the ways out, and nothing is trained again unasked. What
    was logged is written again too where it is gone, and so is its curve."""
    recipe, run = copy()
    file, metrics = run.adapter / "adapter_model.safetensors", run.read_metrics()
    halve(file)
    run.metrics.unlink()
    (run.path / "loss.png").unlink()
    assert phi3v.train(recipe).resumed_from == 2
    assert run.read_metrics()[:-1] == metrics[:-1] and "train_runtime" in metrics[-1]
    assert_same(weights(run.path), weights(trained.output))
    assert (run.path / "loss.png").is_file()
    damaged, gone = caplog.messages
    assert damaged.startswith(f"{file} has ") and damaged.endswith(
        "; the tuned weights are written again, from checkpoint-2"
    )
    assert gone == f"{run.metrics} is gone: the losses are written again, from checkpoint-2"
    halve(file)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match="its header says .*: copy it again, or remove it to train from the sta"):
        phi3v.train(recipe)


def test_a_flipped_bit_in_a_finished_adapter_is_seen(trained: phi3v.Recipe, copy: MakeCopy) -> None:
    """Whatever loads an adapter asks `check_adapter`; the command that trained it writes it again."""
    recipe, run = copy()
    check_adapter(run.adapter)
    weights_file = run.adapter / "adapter_model.safetensors"
    for file in (weights_file, run.adapter / "tokenizer.json", run.checkpoints / "checkpoint-1" / weights_file.name):
        flip(file)
        with pytest.raises(CheckpointError, match=f"^{file} is damaged ") as error:
            check_adapter(file.parent)
        assert ("checkpoint" in str(error.value)) and "\n" not in str(error.value)
        flip(file)
        check_adapter(file.parent)
    flip(weights_file)
    for load in (phi3v.ChatModel.from_target, lambda place: export(place, run.path / "out", to="merged")):
        with pytest.raises(CheckpointError, match=f"`phi3v train {run.recipe}` writes it again from the newest good"):
            load(run.path)
    assert phi3v.train(recipe).resumed_from == 2
    assert_same(weights(run.path), weights(trained.output))
    (run.adapter / "digests.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"digests\.json is damaged"):
        check_adapter(run.adapter)
    (run.adapter / "digests.json").unlink()  # of an older run, or another tool's
    flip(weights_file)
    check_adapter(run.adapter)


def test_a_run_whose_recipe_is_gone_says_how_to_put_it_back(copy: MakeCopy) -> None:
    recipe, run = copy()
    way_out = (
        rf"recipe.yaml: copy the recipe that began this run there \({run.recipe}\) to go on, or give another output$"
    )
    run.recipe.write_text("")
    with pytest.raises(CheckpointError, match=f"^{run.path} holds an empty {way_out}"):
        phi3v.train(recipe)
    run.recipe.unlink()
    with pytest.raises(ConfigError, match=f"^output {run.path} holds versions.json and no {way_out}"):
        phi3v.train(recipe)
    run.write_recipe(recipe)
    assert phi3v.train(recipe).status == "finished"


def test_a_finished_run_without_its_weights_gets_them_back(trained: phi3v.Recipe, copy: MakeCopy) -> None:
    recipe, run = copy()
    shutil.rmtree(run.adapter)
    with pytest.raises(CheckpointError, match="holds no tuned weights yet: finish it with `phi3v train .*recipe.yaml`"):
        resolve_target(run.path)
    result = phi3v.train(recipe)
    assert (result.status, result.resumed_from, result.steps) == ("resumed", 2, 2)
    assert_same(weights(run.path), weights(trained.output))
    assert phi3v.train(recipe).status == "finished" and resolve_target(run.path).kind == "run"


def test_a_checkpoint_holds_what_the_documentation_says(trained: phi3v.Recipe) -> None:
    files = {file.name for file in (RunFolder(trained.output).checkpoints / "checkpoint-2").iterdir()}
    states = {f"{name}.{kind}" for name in ("optimizer", "scheduler", "rank-0") for kind in ("safetensors", "json")}
    assert files == states | {
        "adapter_model.safetensors",
        "adapter_config.json",
        "trainer_state.json",
        "manifest.json",
    }


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(trained: phi3v.Recipe, copy: MakeCopy) -> None:
    recipe, run = copy()
    run.finished.unlink()
    halve(run.checkpoints / "checkpoint-2" / "optimizer.safetensors")
    result = phi3v.train(recipe)
    assert (result.status, result.resumed_from, result.steps) == ("resumed", 1, 2)
    assert_same(weights(run.path), weights(trained.output))


@pytest.mark.parametrize(("content", "reason"), [("{}", "it lacks held_out"), ("[]", "it holds no JSON object")])
def test_a_summary_of_something_else_is_named(copy: MakeCopy, content: str, reason: str) -> None:
    recipe, run = copy()
    run.finished.write_text(content)
    with pytest.raises(CheckpointError) as error:
        phi3v.train(recipe)
    assert str(error.value) == (
        f"{run.finished} cannot be read: {reason}; remove it, and `phi3v train {run.recipe}` writes it again"
    )
    run.finished.unlink()  # the way out
    assert phi3v.train(recipe).status == "resumed" and run.read_summary()["steps"] == 2


def test_an_evaluation_of_something_else_is_named(copy: MakeCopy) -> None:
    _, run = copy()
    run.report.unlink()
    run.write_evaluation({})
    run.write_predictions([])
    row = Row(messages=(), images=(), fields={}, source="rows.jsonl", index=0)
    with pytest.raises(
        CheckpointError, match="evaluation.json cannot be read: it lacks against; remove it, and `phi3v evaluate"
    ):
        write_report(run, [row])
    run.write_evaluation(dict.fromkeys(NEEDED))
    with pytest.raises(CheckpointError, match="predictions.jsonl holds 0 of 1 answered rows; remove it and let it be"):
        write_report(run, [row])
