"""What a run goes on under besides its rows and base: the adapter that it began with, the scores that judge it."""

import json
import logging.handlers
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ends import assert_same_end, end_of
from safetensors.torch import load_file, save_file
from tiny_models import write_photos
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

import phi3v
from phi3v import loading, tuning
from phi3v.errors import CheckpointError, ConfigError
from phi3v.run_folder import OPTIONAL_PACKAGES, RunFolder
from phi3v.targets import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phi3v.training import conditions
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.prepare import prepare_model

MakeRecipe = Callable[..., phi3v.Recipe]


def stop_behind(step: int) -> Callable[[TrainingEvent], None]:
    """Ends a run behind a step, without a checkpoint of it."""

    def stop(event: TrainingEvent) -> None:
        if (event.kind, event.step) == ("step", step):
            raise KeyboardInterrupt

    return stop


def set_value(file: Path, key: str, value: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def test_an_adapter_of_another_base_is_told(
    make: MakeRecipe, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes do not tell Phi-3 and Phi-3.5 apart; a local copy goes by its folder's name, or its config's."""
    base = shutil.copytree(world / "model", tmp_path / "copy")
    tuning.attach_lora(loading.load_base(base), {"r": 2}).save_pretrained(folder := tmp_path / "adapter")
    file, recipe = folder / "adapter_config.json", make(model={"name": str(base), "adapter": str(folder)})

    def told(**values: Any) -> list[str]:
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        caplog.clear()
        prepare_model(recipe, torch.device("cpu"))
        return [line for line in caplog.messages if "was tuned on" in line]

    assert told() == [] and told(base_model_name_or_path="microsoft/copy") == []
    names = ("microsoft/Phi-3-vision-128k-instruct", str(world / "model"))
    said = (
        "model.adapter {} was tuned on {}, and goes on on {}: its shapes fit, whether it is the same model is not known"
    )
    for name in names:
        assert told(base_model_name_or_path=name) == [said.format(folder, name, base)]
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "Phi-3-vision-128k-instruct"}
    (base / "config.json").write_text(json.dumps(config))
    assert told(base_model_name_or_path=names[0]) == []
    with pytest.raises(
        CheckpointError, match=r"lora_alpha in its adapter_config.json is 0, by which nothing of it ans"
    ):
        told(lora_alpha=0)


def test_an_adapter_to_go_on_from_that_is_another_is_refused(
    make: MakeRecipe, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a resumed run computes by is its checkpoint's own adapter, whatever the first one says by then."""
    first = make("first", training={"max_steps": 1})
    phi3v.train(first)
    source = shutil.copytree(RunFolder(first.output).adapter, Path(first.output).with_name("source"))
    model, training = {"name": str(world / "model"), "adapter": str(source)}, {"max_steps": 4, "save_steps": 2}
    undisturbed, recipe = (make(name, model=model, training=training) for name in ("undisturbed", "stopped"))
    phi3v.train(undisturbed)
    with pytest.raises(KeyboardInterrupt):
        phi3v.train(recipe, on_event=stop_behind(3))

    (source / "digests.json").unlink()  # with them, files that were changed are refused before this
    config, weights = source / ADAPTER_CONFIG, source / ADAPTER_WEIGHTS
    named, values, stored = conditions.name_adapter(str(source)), json.loads(config.read_text()), load_file(weights)
    set_value(config, "target_modules", sorted(values["target_modules"], reverse=True))
    set_value(config, "base_model_name_or_path", str(world))
    assert conditions.name_adapter(str(source)) == named, "the order of a set, and notes, are no change"
    set_value(config, "base_model_name_or_path", values["base_model_name_or_path"])

    changed = {name: weight.clone() for name, weight in stored.items()}
    changed[min(changed)][0, 0] += 1
    save_file(changed, weights)
    with pytest.raises(ConfigError, match="^the weights of model.adapter are not those that checkpoint-2 was trained"):
        phi3v.train(recipe)
    save_file(stored, weights)
    set_value(config, "lora_alpha", 8 * values["lora_alpha"])
    with pytest.raises(ConfigError, match="^the values in adapter_config.json of model.adapter are not those that che"):
        phi3v.train(recipe)
    monkeypatch.setattr(conditions, "name_adapter", lambda *given: {})  # as with a checkpoint that does not name it yet
    plain = compare_trainer_and_checkpoint_args
    lines = logging.handlers.BufferingHandler(9)
    logging.getLogger(plain.__module__).addHandler(lines)

    def on_more_ranks(args: Any, state: Any) -> None:
        plain(args, replace(state, train_batch_size=99))

    monkeypatch.setattr(sys.modules[Trainer.__module__], "compare_trainer_and_checkpoint_args", on_more_ranks)
    assert phi3v.train(recipe).resumed_from == 2
    assert not lines.buffer, "transformers' own list"
    plain(TrainingArguments(per_device_train_batch_size=7), TrainerState(train_batch_size=98))
    logging.getLogger(plain.__module__).removeHandler(lines)
    assert len(lines.buffer) == 1, "which is left alone elsewhere"
    assert_same_end(end_of(recipe.output), end_of(undisturbed.output))
    saved = json.loads((RunFolder(recipe.output).adapter / ADAPTER_CONFIG).read_text())
    assert saved["lora_alpha"] == values["lora_alpha"]


def test_a_run_without_a_checkpoint_says_what_was_changed_since_it_began(
    make: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It starts over with what is there now, so nothing is refused; without a change nothing is said."""
    rows = write_photos(tmp_path / "own", 4)
    recipe = make(data={"train": str(rows)}, training={"max_steps": 2, "save_strategy": "no"})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            phi3v.train(recipe, on_event=stop_behind(1), report=False)
    assert "starts over" not in caplog.text
    rows.write_text(rows.read_text().replace("red", "crimson"))
    told = phi3v.train(recipe, report=False)
    assert told.status == "trained" and told.steps == 2
    line = f"{recipe.output} has no checkpoint to go on from and starts over; not as it began before: the training rows"
    assert [one for one in caplog.messages if "starts over" in one] == [line]


def test_settings_by_which_a_run_is_judged_are_those_it_began_with(
    make: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers whose score ends a run or chooses its weights are made one way; beside a loss they decide nothing."""
    often = {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "early_stopping": 3}
    shared: dict[str, Any] = {"data": {"split": {"validation": 3}}}
    shared["evaluation"] = {"during_training": 2, "max_new_tokens": 2, "against": None}
    by_score = make("score", **shared, training={**often, "metric_for_best_model": "similarity"})
    by_loss = make("loss", **shared, training=often)
    for recipe in (by_score, by_loss):
        with pytest.raises(KeyboardInterrupt):
            phi3v.train(recipe, on_event=stop_behind(3), report=False)
    for name, value in (
        ("max_new_tokens", "3"),
        ("during_training", "1"),
        ("metrics", "[chrf]"),
        ("numeric_fields", "[colour]"),
    ):
        line = f"^values of evaluation.{name}, by which this run is judged, are not those that checkpoint-2 was trained"
        with pytest.raises(ConfigError, match=line):
            phi3v.train(by_score.with_overrides([f"evaluation.{name}={value}"]), report=False)
    less = [f"evaluation.{name}" for name in ("max_new_tokens=3", "during_training=0", "batch_size=2")]
    for recipe, overrides in ((by_score, less[2:]), (by_loss, less)):
        caplog.clear()
        assert phi3v.train(recipe.with_overrides(overrides), report=False).resumed_from == 2
        assert "going on from checkpoint-2 with evaluation.batch_size 2 (8 until then): the run will" in caplog.text
    assert phi3v.train(by_score.with_overrides(less[:1]), report=False).status == "finished"


def test_versions_of_packages_that_only_some_runs_compute_with_are_compared_there(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And of checkpoints that were written before they were noted nothing is said."""
    versions = dict.fromkeys(("torch", "pillow", "numpy", "platform", *OPTIONAL_PACKAGES), "1.0")
    monkeypatch.setattr(conditions, "gather_versions", lambda: versions)
    monkeypatch.setattr(conditions, "name_files", lambda *given: {})
    monkeypatch.setattr(conditions, "name_data", lambda *given: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")

    def noted(device: str = "cpu", **sections: Any) -> set[str]:
        found = conditions.conditions_of(Any, make(**sections), "", torch.device(device), torch.float32)  # type: ignore[arg-type]
        return set(found) & set(versions)

    always = {"torch", "pillow", "numpy"}
    assert noted() == noted(training={"optim": "adamw_torch_8bit"}) == always
    for name, sections in (
        ("bitsandbytes", {"training": {"optim": "paged_adamw_8bit"}}),
        ("bitsandbytes", {"training": {"optim": "lion_32bit"}}),
        ("bitsandbytes", {"quantization": {"load_in_4bit": True}}),
        ("simplejpeg", {"image": {"fast": True}}),
        ("liger-kernel", {"training": {"use_liger_kernel": True}}),
    ):
        assert noted(**sections) == {*always, name}
    assert noted("cuda") == {*always, "triton", "flash-attn-4"}
    conditions.compare({"torch": "1.0"}, {"torch": "1.0", "bitsandbytes": "0.50"}, "checkpoint-2")
    assert not caplog.messages
    conditions.compare({"bitsandbytes": "0.47"}, {"bitsandbytes": "0.50"}, "checkpoint-2")
    assert "with bitsandbytes 0.50 (0.47 until then)" in caplog.text
