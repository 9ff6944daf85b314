"""Numbers that are none: a loss or a gradient never reaches the weights, and weights of an update are never saved."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import phi3v
from phi3v.cli_screen import show_run
from phi3v.errors import TrainingError
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.checkpoints import newest_checkpoint
from phi3v.training.sampling import epoch_order
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


def spoil_loss(monkeypatch: pytest.MonkeyPatch, value: float, step: int, call: int = 0) -> None:
    """Has one micro-batch of a step give a loss that is no number."""
    original, calls = StepTrainer.compute_loss, [0]

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step != step - 1:
            return loss
        calls[0] += 1
        return loss * value if calls[0] == call + 1 else loss

    monkeypatch.setattr(StepTrainer, "compute_loss", spoilt)


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, value: float, step: int, call: int = 0) -> None:
    """Has one gradient of a step be no number, behind a loss that is one."""
    original = StepTrainer.training_step

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            next(weight for weight in self.model.parameters() if weight.grad is not None).grad.view(-1)[3] = value
        return loss

    monkeypatch.setattr(StepTrainer, "training_step", spoilt)


@pytest.mark.parametrize(
    ("spoil", "value", "call", "fault"),
    [
        (spoil_loss, math.nan, 0, "loss is nan"),
        (spoil_loss, math.inf, 1, "loss is inf"),
        (spoil_gradient, math.inf, 0, "grad_norm is inf"),
    ],
)
def test_what_is_no_number_never_reaches_the_weights(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, spoil: Any, value: float, call: int, fault: str
) -> None:
    recipe = make(training={**STEPS, "micro_batch_size": 2, "packing": False, "logging_steps": 5})
    seen: list[dict[str, torch.Tensor]] = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (seen.append({}), original(self, *a, **k))[1])
    spoil(monkeypatch, value, 4, call)
    with pytest.raises(TrainingError) as error:
        phi3v.train(recipe)
    rows = epoch_order(10, 4, 5, 1)[:4]
    names = f"rows {', '.join(map(str, rows[:3]))} and {rows[3]} of {recipe.data.train}"
    last = RunFolder(recipe.output).checkpoints / "checkpoint-2"
    assert str(error.value).startswith(
        f"{fault} at step 4 ({names}): its update was not applied, the last good checkpoint is {last}; look at these"
    )
    assert len(seen) == 1 + 3  # one was of a few numbers, before the run
    assert newest_checkpoint(last.parent) == last
    weights = load_file(last / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    losses = [line["loss"] for line in RunFolder(recipe.output).read_metrics()]
    assert all(loss and math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(("spoil", "dtype"), [(spoil_loss, "float32"), (spoil_gradient, "bfloat16")])
def test_a_step_that_is_left_out_leaves_no_trace(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: Any, dtype: str
) -> None:
    events: list[TrainingEvent] = []
    sections = {
        "model": {"name": make().model.name, "dtype": dtype},
        "lora": {"r": 4, "lora_dropout": 0.2},
        "training": {**STEPS, "non_finite": "skip", "lr_scheduler_type": "cosine"},
    }
    skipped, without = make("skipped", **sections), make("without", **sections)
    with monkeypatch.context() as patch:
        spoil(patch, math.nan, 3)
        result = phi3v.train(skipped, on_event=events.append)

    original = StepTrainer.training_step

    def passed_over(self: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        """A run without the third step: nothing is computed, drawn, updated or scheduled in it."""
        if self.state.global_step != 2:
            return original(self, model, inputs, *args)
        monkeypatch.setattr(self.lr_scheduler, "step", lambda: monkeypatch.undo())
        self._before = None
        self._step_loss = torch.zeros(())
        return torch.zeros(())

    monkeypatch.setattr(StepTrainer, "training_step", passed_over)
    phi3v.train(without)
    ends = [load_file(RunFolder(one.output).adapter / "adapter_model.safetensors") for one in (skipped, without)]
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)
    steps = [line["step"] for line in RunFolder(skipped.output).read_metrics() if "loss" in line]
    assert steps == [1, 2, 4, 5, 6]
    rows = epoch_order(10, 4, 5, 0)[8:12]
    names = f"rows {', '.join(map(str, rows[:3]))} and {rows[3]} of {skipped.data.train}"
    told = {"step": 3, "left_out": "nan", "rows": names}
    (line,) = [line for line in RunFolder(skipped.output).read_metrics() if "left_out" in line]
    assert {**line, "left_out": line["left_out"].split()[-1]} == told and result.left_out == 1
    assert caplog.text.count(f"at step 3 ({names}): the step is left out") == 1
    assert [event.rates.get("left_out", 0) for event in events if event.kind == "step"][-1] == 1
    counts = [event.rates["left_out"] for event in events if event.kind == "metrics" and event.step > 3 and event.rates]
    assert counts == [1, 1, 1], "the losses of a step come with what the step had counted"
    printed = io.StringIO()
    show_run(Console(file=printed), {**result.to_dict(), "evaluation": None, "report": None})
    assert "6 steps" in printed.getvalue() and "; 1 of them left out" in printed.getvalue()
    assert printed.getvalue().endswith("metrics.jsonl): 5 updates made these weights\n")


def test_weights_that_an_update_has_spoilt_are_said_not_the_rows(make: MakeRecipe) -> None:
    recipe = make(training={**STEPS, "learning_rate": 1e30, "save_steps": 1, "non_finite": "skip"})
    line = r"at step \d+ \(rows .* spoilt the weights \(up to \de\+\d\d\), not these rows; .*checkpoint-\d+, the newest"
    with pytest.raises(TrainingError, match=line):
        phi3v.train(recipe)


def test_a_run_that_leaves_out_every_step_is_stopped(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten of them, or at its end, which the same command reaches again."""
    original = StepTrainer.compute_loss
    monkeypatch.setattr(StepTrainer, "compute_loss", lambda *a, **k: original(*a, **k) * math.nan)
    with pytest.raises(TrainingError, match="loss is nan at step 11 .* and in the 10 steps before it"):
        phi3v.train(make(training={**STEPS, "max_steps": 20, "non_finite": "skip"}))
    short = make("short", training={**STEPS, "max_steps": 2, "non_finite": "skip"})
    for _ in range(2):
        with pytest.raises(TrainingError, match="^nothing was trained: each of the 2 steps was left out"):
            phi3v.train(short)
    assert not RunFolder(short.output).has_weights()
