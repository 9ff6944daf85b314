"""Weights that an update made no numbers: never saved, whatever saw them first."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import phi3v
from phi3v.errors import TrainingError
from phi3v.run_folder import RunFolder
from phi3v.training.checkpoints import newest_checkpoint
from phi3v.training.step_faults import all_finite
from phi3v.training.step_trainer import StepTrainer

MakeRecipe = Callable[..., phi3v.Recipe]
STEPS = {"save_steps": 2, "logging_steps": 1, "epochs": 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_is_seen(value: float) -> None:
    large, short, counts = torch.full((3, 4), 3e38), torch.ones(5, dtype=torch.bfloat16), torch.tensor([7])
    assert all_finite([large, short, counts, torch.empty(0, 4), torch.tensor(1.0, dtype=torch.float64)])
    short[3] = value
    assert not all_finite([large, short, counts])


def spoil_update(monkeypatch: pytest.MonkeyPatch, step: int, *, state: bool = False) -> None:
    """Has the update of a step make one number of a weight, or of the optimiser's state, NaN."""
    original, calls = StepTrainer.create_optimizer, [0]

    def spoil(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        calls[0] += 1
        weight = optimizer.param_groups[0]["params"][1]
        if calls[0] == step:
            (optimizer.state[weight]["exp_avg_sq"] if state else weight.data).view(-1)[3] = math.nan

    def spoilt(self: Any, *args: Any) -> torch.optim.Optimizer:
        optimizer = original(self, *args)
        optimizer.register_step_post_hook(spoil)
        return optimizer

    monkeypatch.setattr(StepTrainer, "create_optimizer", spoilt)


@pytest.mark.parametrize(
    ("step", "options", "dtype", "last"),
    [
        (4, {}, "float32", "checkpoint-2"),
        (4, {}, "bfloat16", "checkpoint-2"),  # the master alone: the weight takes it in the next step
        (4, {"state": True}, "float32", "checkpoint-2"),
        (3, {}, "float32", "checkpoint-2"),  # seen by the loss of step 4, which has another fault then
        (1, {"at_end": True}, "float32", None),
    ],
)
def test_weights_that_an_update_made_no_numbers_are_never_saved(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, step: int, options: dict[str, bool], dtype: str, last: str | None
) -> None:
    ends = {"max_steps": 1, "save_strategy": "no", "save_steps": 500} if options.pop("at_end", False) else {}
    recipe = make(model={"name": make().model.name, "dtype": dtype}, training={**STEPS, **ends, "non_finite": "skip"})
    run = RunFolder(recipe.output)
    spoil_update(monkeypatch, step, **options)
    with pytest.raises(TrainingError) as error:
        phi3v.train(recipe)
    good = f"the last good checkpoint is {run.checkpoints / last}" if last else "no checkpoint was written yet"
    assert f"after step {step} weights, or what" in str(error.value) and f"are not saved, {good}; " in str(error.value)
    newest = newest_checkpoint(run.checkpoints)
    assert (newest.name if newest else None) == last and not run.has_weights() and not run.adapter.exists()
