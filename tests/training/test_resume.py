"""Runs that are stopped and begun again: what they end with is bit for bit what the undisturbed one ends with."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import phi3v
from phi3v.errors import Interrupted
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.checkpoints import all_checkpoints, find_fault, newest_checkpoint

MakeRecipe = Callable[..., phi3v.Recipe]

HARD: dict[str, Any] = {
    "lora": {"r": 4, "lora_dropout": 0.2},
    "training": {
        "samples_per_step": 4,
        "micro_batch_size": 1,
        "epochs": 3,
        "save_steps": 2,
        "logging_steps": 3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "warmup_steps": 1,
    },
}
"""LoRA dropout, shuffling, packing, four samples a step in several packs, lines of the log between checkpoints."""


def end_of(recipe: phi3v.Recipe) -> dict[str, Any]:
    """What a run ends with: tuned weights, the whole of its last checkpoint but for times, its losses."""
    run = RunFolder(recipe.output)
    last = newest_checkpoint(run.checkpoints)
    assert last is not None and {file.suffix for file in last.iterdir()} == {".safetensors", ".json"}
    tensors = {
        f"{file.parent.name}/{file.name}/{name}": tensor
        for file in [*last.glob("*.safetensors"), run.adapter / "adapter_model.safetensors"]
        for name, tensor in load_file(file).items()
    }
    plain = {file.name: json.loads(file.read_text()) for file in last.glob("*.json") if file.name != "manifest.json"}
    state = plain.pop("trainer_state.json")
    losses = [
        (line["step"], name, line[name])
        for line in run.read_metrics()
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss")
        if name in line
    ]
    return {"tensors": tensors, "plain": plain, "step": state["global_step"], "losses": losses}


def assert_same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["step"], found["losses"], found["plain"]) == (expected["step"], expected["losses"], expected["plain"])
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


def sender(number: int, at: Callable[[TrainingEvent], bool]) -> Callable[[TrainingEvent], None]:
    """Sends a signal to this process at an event."""

    def send(event: TrainingEvent) -> None:
        if at(event):
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_stopped_after_each_step_ends_as_an_undisturbed_one(make: MakeRecipe, workers: int) -> None:
    hard = {**HARD, "training": {**HARD["training"], "dataloader_num_workers": workers}}
    undisturbed = make("undisturbed", data={"split": {"validation": 2}}, **hard)
    phi3v.train(undisturbed)
    recipe = make("stopped", data={"split": {"validation": 2}}, **hard)
    for step in range(1, 6):
        number = (signal.SIGTERM, signal.SIGINT)[step % 2]
        with pytest.raises(Interrupted) as stop:
            phi3v.train(
                recipe, on_event=sender(number, lambda event, step=step: (event.kind, event.step) == ("step", step + 1))
            )
        assert stop.value.exit_code == 128 + number
        newest = newest_checkpoint(RunFolder(recipe.output).checkpoints)
        assert newest is not None and newest.name == f"checkpoint-{step + 1}"
    assert phi3v.train(recipe).steps == 6
    assert_same_end(end_of(recipe), end_of(undisturbed))
