"""Runs that are stopped and begun again: what they end with is bit for bit what the undisturbed one ends with."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from run_ends import assert_same_end, end_of

import phi3v
from phi3v.errors import Interrupted
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.checkpoints import newest_checkpoint

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
    assert_same_end(end_of(recipe.output), end_of(undisturbed.output))
