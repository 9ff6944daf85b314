"""Runs that are stopped and begun again: what they end with is bit for bit what the undisturbed one ends with."""

import inspect
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ends import HARD, assert_same_end, end_of
from safetensors.torch import load_file
from transformers import Trainer

import phi3v
from phi3v.data.augment import Augmented
from phi3v.errors import Interrupted
from phi3v.run_folder import RunFolder
from phi3v.targets import ADAPTER_WEIGHTS
from phi3v.training import checkpoints, durable_trainer, stop_signals
from phi3v.training.callbacks import MetricsCallback, ProgressCallback, TrainingEvent
from phi3v.training.checkpoints import newest_checkpoint, read_manifest
from phi3v.training.step_trainer import StepTrainer
from phi3v.training.stop_signals import StopSignals

MakeRecipe = Callable[..., phi3v.Recipe]


@pytest.fixture
def undisturbed(make: MakeRecipe) -> dict[str, Any]:
    """What the run ends with that nothing happens to."""
    recipe = make("undisturbed", **HARD)
    epochs, original = set(), Augmented.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Augmented, "of", lambda self, row: epochs.add(int(self._epoch)) or original(self, row))
        phi3v.train(recipe)
    assert epochs == {0, 1, 2}, "training images are not changed anew in each epoch"
    return end_of(recipe.output)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def at_micro_batch(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends a signal in the second of the four micro-batches of a step."""
    original, calls = StepTrainer._one, []

    def spy(self: Any, *arguments: Any) -> Any:
        calls.append(self.state.global_step)
        if calls.count(step - 1) == 2:
            send(number)
        return original(self, *arguments)

    patch.setattr(StepTrainer, "_one", spy)


def at_update(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends a signal while the weights of a step are updated."""
    original = StepTrainer._get_learning_rate

    def spy(self: Any) -> Any:
        if self.updating and self.state.global_step == step - 1:
            send(number)
        return original(self)

    patch.setattr(StepTrainer, "_get_learning_rate", spy)


def at_evaluation(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends a signal in the evaluation behind a step."""
    original = StepTrainer.prediction_step

    def spy(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            send(number)
        return original(self, *arguments, **named)

    patch.setattr(StepTrainer, "prediction_step", spy)


def at_save(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends a signal while the checkpoint of a step is written."""
    original = checkpoints.publish

    def spy(staging: Path, facts: dict[str, Any]) -> Path:
        if staging.name == f".checkpoint-{step}.tmp":
            send(number)
        return original(staging, facts)

    patch.setattr(checkpoints, "publish", spy)


def at_score(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends a signal while the line of the evaluation behind a step is logged."""
    original = RunFolder.append_metrics

    def spy(self: Any, values: dict[str, Any]) -> None:
        original(self, values)
        if "eval_loss" in values and values["step"] == step:
            send(number)

    patch.setattr(RunFolder, "append_metrics", spy)


def at_end(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends a signal when all steps are done, of which `step` is the last, and no weights are written yet."""
    original = ProgressCallback.on_train_end

    def spy(self: Any, args: Any, state: Any, *arguments: Any, **named: Any) -> None:
        assert state.global_step == step
        send(number)
        original(self, args, state, *arguments, **named)

    patch.setattr(ProgressCallback, "on_train_end", spy)


STOPS: list[tuple[Callable[..., None], int, int, int]] = [
    (at_micro_batch, 2, signal.SIGTERM, 1),
    (at_evaluation, 2, signal.SIGINT, 2),
    (at_update, 3, signal.SIGTERM, 3),
    (at_save, 4, signal.SIGINT, 4),
    (at_micro_batch, 5, signal.SIGINT, 4),
    (at_evaluation, 6, signal.SIGTERM, 6),
]
"""Where a signal comes, at which step, and the step whose checkpoint is the newest then."""


def test_a_run_that_is_stopped_anywhere_ends_as_an_undisturbed_one(
    make: MakeRecipe, undisturbed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make("stopped", **HARD)
    for place, step, number, saved in STOPS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stop:
            place(patch, step, number)
            phi3v.train(recipe)
        assert stop.value.exit_code == 128 + number
        newest = newest_checkpoint(RunFolder(recipe.output).checkpoints)
        assert newest is not None and newest.name == f"checkpoint-{saved}", (place, step)
    assert phi3v.train(recipe).resumed_from == 6
    assert_same_end(end_of(recipe.output), undisturbed)
    assert not caplog.records


LOSSES = {0: 9.0, 1: 5.0, 2: 3.0, 3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0}
"""Pretended validation losses by step: with a patience of 3 a run of eight steps ends at step 6 with
the weights of step 3, though a checkpoint is due at every second step alone."""
PATIENT: dict[str, Any] = {
    **HARD,
    "evaluation": {"rows": 1, "max_new_tokens": 2, "against": None},
    "training": {**HARD["training"], "epochs": 4, "eval_steps": 1, "eval_on_start": True, "early_stopping": 3},
}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses are those of `LOSSES`."""
    original = StepTrainer.evaluation_loop

    def loop(self: Any, *arguments: Any, **named: Any) -> Any:
        output = original(self, *arguments, **named)
        output.metrics["eval_loss"] = LOSSES[self.state.global_step]
        return output

    monkeypatch.setattr(StepTrainer, "evaluation_loop", loop)


@pytest.mark.usefixtures("pretended")
def test_an_early_stop_is_the_same_one_however_often_a_run_is_stopped(make: MakeRecipe) -> None:
    """Patience is counted across stops, and what has ended early stays ended until its weights are written. They are
    those of the best checkpoint that an undisturbed run has too, wherever the run's folder lies by then. The look at
    held-out rows before the first step is none before a later one: it would stand twice in the log, and be counted. The
    best step is one at which no checkpoint is due.
    """
    undisturbed, recipe, moved, copy = (make(name, **PATIENT) for name in ("patient", "stopped", "moved", "copy"))
    first = phi3v.train(undisturbed)
    assert (first.steps, first.planned) == (6, 8)
    assert first.kept == {"step": 3, "metric": "eval_loss", "score": 2.0, "last_score": 6.0, "patience": 3}

    def stop(run: phi3v.Recipe, place: Callable[..., None], step: int, saved: int) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            place(patch, step, signal.SIGTERM)
            phi3v.train(run)
        newest = newest_checkpoint(RunFolder(run.output).checkpoints)
        assert newest is not None and newest.name == f"checkpoint-{saved}", (place, step)

    stop(recipe, at_evaluation, 2, 2)
    stop(recipe, at_score, 3, 3)
    stop(recipe, at_update, 5, 5)
    shutil.copytree(recipe.output, copy.output)
    shutil.move(recipe.output, moved.output)
    stop(moved, at_end, 6, 6)
    stop(copy, at_evaluation, 6, 6)
    for run in (moved, copy):
        result = phi3v.train(run)
        assert (result.resumed_from, result.steps) == (6, 6)
        assert (result.planned, result.kept) == (first.planned, first.kept)
        assert_same_end(end_of(run.output), end_of(undisturbed.output))
    for run in (undisturbed, moved):
        assert read_manifest(RunFolder(run.output).checkpoints / "checkpoint-6")["best"] == "checkpoint-3"
        best = load_file(RunFolder(run.output).checkpoints / "checkpoint-3" / ADAPTER_WEIGHTS)
        ended = load_file(RunFolder(run.output).adapter / ADAPTER_WEIGHTS)
        assert all(torch.equal(ended[name], weight) for name, weight in best.items())


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("when", ["between", "at the end"])
def test_where_the_best_weights_are_damaged_the_best_that_are_left_take_their_place(
    make: MakeRecipe, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """Whole newer checkpoints stay of use, patience is counted on, and no checkpoint names what is not there."""
    recipe = make("patient", **PATIENT)
    checkpoints = RunFolder(recipe.output).checkpoints
    file = checkpoints / "checkpoint-3" / ADAPTER_WEIGHTS

    def damage(event: TrainingEvent) -> None:
        if event.kind == "step" and event.step == 6 and when == "at the end":
            file.write_bytes(bytes(file.stat().st_size))

    if when == "between":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            at_micro_batch(patch, 6, signal.SIGTERM)
            phi3v.train(recipe)
        shutil.rmtree(file.parent)
    result = phi3v.train(recipe, on_event=damage)
    assert result.steps == 6 and result.resumed_from == (5 if when == "between" else None)
    (line,) = [record.getMessage() for record in caplog.records]
    between = (
        f"{file.parent / 'manifest.json'} is missing (the best weights up to checkpoint-5); going on from checkpoint-5"
    )
    at_the_end = (
        f"{file} is damaged (the best weights of this run); ending with the best that are left, of checkpoint-6"
    )
    assert line.startswith(between if when == "between" else at_the_end)
    best = checkpoints / ("checkpoint-5" if when == "between" else "checkpoint-6")  # by their losses, 5.0 and 6.0
    left, ended = load_file(best / ADAPTER_WEIGHTS), load_file(RunFolder(recipe.output).adapter / ADAPTER_WEIGHTS)
    assert all(torch.equal(ended[name], weight) for name, weight in left.items())
    assert f"checkpoint-{result.kept['step']}" == best.name and result.kept["score"] == LOSSES[result.kept["step"]]
    if when == "between":
        assert read_manifest(checkpoints / "checkpoint-6")["best"] == "checkpoint-5"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.slow
def test_loader_workers_change_nothing_of_it(make: MakeRecipe, undisturbed: dict[str, Any]) -> None:
    hard = {**HARD, "training": {**HARD["training"], "dataloader_num_workers": 2}}
    recipe = make("stopped", **hard)
    for step in (1, 4):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            at_update(patch, step, signal.SIGTERM)
            phi3v.train(recipe)
    assert phi3v.train(recipe).resumed_from == 4
    assert_same_end(end_of(recipe.output), undisturbed)


def test_a_model_that_is_tuned_as_a_whole_goes_on_exactly(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {**HARD, "lora": None, "vision": {"tower": "train", "projector": "train"}}
    undisturbed, recipe = make("whole", **whole), make("stopped", **whole)
    original, means = MetricsCallback.on_log, []

    def spy(self: Any, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        means.extend(value for name, value in logs.items() if name == "train_loss")
        original(self, args, state, control, logs=logs, **kwargs)

    monkeypatch.setattr(MetricsCallback, "on_log", spy)
    phi3v.train(undisturbed)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        at_update(patch, 3, signal.SIGTERM)
        phi3v.train(recipe)
    assert phi3v.train(recipe).resumed_from == 3
    assert len(means) == 2 and means[0] == means[1] > 1, "what trackers are told of the whole run"
    assert_same_end(end_of(recipe.output), end_of(undisturbed.output))


def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from(make: MakeRecipe) -> None:
    recipe = make("early", **HARD)
    with pytest.raises(Interrupted):
        phi3v.train(recipe, on_event=lambda event: send(signal.SIGTERM) if event.kind == "rows" else None)
    assert not Path(recipe.output).exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are given back"


def test_a_signal_in_a_destructor_is_not_lost_and_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(lost.exc_type))

    class Last:
        def __init__(self, act: Callable[[], None]) -> None:
            self.act = act

        def __del__(self) -> None:
            self.act()

    with pytest.raises(Interrupted), StopSignals() as signals:
        Last(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert signals.received == signal.SIGTERM and not told
        signals.check()
    with StopSignals():
        Last(lambda: print(1 / 0))  # what others lose is told as ever
    assert told == [ZeroDivisionError]


@pytest.mark.parametrize(("patient", "echo", "code"), [(False, 3.0, 143), (True, 3.0, 0), (True, 0.0, 143)])
def test_a_second_signal_leaves_at_once(patient: bool, echo: float, code: int) -> None:
    """Of ranks one that comes right behind the first is their launcher's, which hands on what each of them got."""
    child = os.fork()
    if not child:
        stop_signals._ECHO = echo
        signals = StopSignals(patient=patient).__enter__()
        signals.hold()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """Ctrl-C for the terminal's command is none for a run that a script began with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_trainer_still_is_what_we_change() -> None:
    """What `durable_trainer` replaces without a public name, in the form that it was written against."""
    forms = {
        "_save_checkpoint": "self, model, trial",
        "_save": "self, output_dir, state_dict",
        "_load_from_checkpoint": "self, resume_from_checkpoint, model",
        "_load_best_model": "self",
        "_load_optimizer_and_scheduler": "self, checkpoint",
        "_load_scaler": "self, checkpoint",
        "_load_rng_state": "self, checkpoint",
        "_evaluate": "self, trial, ignore_keys_for_eval, skip_scheduler",
        "_determine_best_metric": "self, metrics, trial",
        "_get_grad_norm": "self, model, grad_norm",
        "_maybe_log_save_evaluate": "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
        "learning_rate",
    }
    for name, form in forms.items():
        assert ", ".join(inspect.signature(getattr(Trainer, name)).parameters) == form, name
    source = inspect.getsource(sys.modules[Trainer.__module__])
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "self._run_epoch(", "_push_from_checkp"):
        assert name in source, name
    assert "torch.load" not in inspect.getsource(durable_trainer)
