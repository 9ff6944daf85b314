"""Training on a tiny model: what a run writes, what a step is, and that a resumed run ends as an undisturbed one."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import phi3v
from phi3v.cli_screen import repeated_line
from phi3v.errors import CheckpointError, ConfigError, TrainingError
from phi3v.loading import load_base
from phi3v.run_folder import RunFolder
from phi3v.training import step_trainer
from phi3v.training import train as training
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.module_walks import short_walks
from phi3v.training.sampling import epoch_order

MakeRecipe = Callable[..., phi3v.Recipe]


def adapter(recipe: phi3v.Recipe) -> dict[str, torch.Tensor]:
    """The adapter that a run wrote."""
    return load_file(RunFolder(recipe.output).adapter / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def moved(weights: dict[str, torch.Tensor]) -> bool:
    """Whether every lora_B left its start at zero."""
    return all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


def test_a_step_does_not_walk_over_all_modules(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the model is told its mode when training begins, around validations and at its end alone."""
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    told: list[bool] = []
    plain = Phi3MLP.train
    monkeypatch.setattr(Phi3MLP, "train", lambda self, mode=True: told.append(mode) or plain(self, mode))
    graded: list[int] = []
    step = step_trainer.StepTrainer.training_step

    def counted(self: Any, model: Any, *given: Any) -> Any:
        graded.append(sum(weight.grad is not None for weight in model.parameters()))
        return step(self, model, *given)

    monkeypatch.setattr(step_trainer.StepTrainer, "training_step", counted)
    runs = {}
    for name, steps in (("short", 3), ("long", 9)):
        told.clear()
        recipe = make(name, training={"max_steps": steps, "micro_batch_size": 1, "save_steps": 99})
        phi3v.train(recipe)
        runs[name] = list(told)
    assert runs["short"] == runs["long"] and graded == [0] * 12


def test_no_part_of_a_model_is_left_in_another_mode() -> None:
    """As PEFT's models are around a base that was loaded to answer, and as who asks a part for answers leaves it."""
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Dropout()), torch.nn.Linear(2, 2))
    with short_walks(model):
        model[0].eval()
        assert model.train() is model and all(module.training for module in model.modules())
        model[0][0].eval()
        model.train()
        assert model[0][0].training
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()(torch.ones(1, 2)).sum().backward()
        model.zero_grad()
        listed = [*model.parameters(), *model.parameters()]
    assert listed == [*model[1].parameters()] * 2 and all(weight.grad is None for weight in listed)
    assert not {"train", "zero_grad", "parameters"} & vars(model).keys()


def test_a_run_has_all_its_files_and_the_second_call_says_finished(make: MakeRecipe) -> None:
    events: list[TrainingEvent] = []
    recipe = make(data={"split": {"validation": 2}})
    result = phi3v.train(recipe, on_event=events.append)
    run = RunFolder(recipe.output)
    assert (result.status, result.steps, result.held_out) == ("trained", 4, 2)
    assert run.state() == "finished" and moved(adapter(recipe))
    assert run.read_summary()["samples"] == result.samples and result.samples["most_images"] == 1
    for path in (run.recipe, run.versions, run.metrics, run.evaluation, run.predictions, run.report):
        assert path.stat().st_size > 0
    lines = run.read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    losses, validated = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert result.metrics == {"loss": losses[-1]["loss"], "eval_loss": validated[-1]["eval_loss"]}
    assert "eval_loss_low" not in validated[-1], "two rows are too few for an interval"

    kinds = [event.kind for event in events]
    assert kinds[0] == "look" and kinds.count("start") == 1
    assert kinds.count("step") == 4 and kinds[-1] == "answers"
    started = events[kinds.index("start")]
    assert started.trainable is not None and started.trainable.parts["projector"].trainable == 0
    left = [event.seconds_left for event in events if event.kind == "step"]
    assert left[-1] == 0.0 and all(seconds > 0 for seconds in left[:-1])

    before = adapter(recipe)
    again = phi3v.train(recipe)
    assert (again.status, again.steps, again.metrics) == ("finished", 4, result.metrics)
    assert_same(adapter(recipe), before)
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        phi3v.train(recipe.with_overrides(["training.seed=6"]))


def test_the_guides_last_step_works_on_the_adapter_folder(trained: MakeRecipe, world: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoProcessor

    recipe = trained()
    folder = RunFolder(recipe.output).adapter
    phi3v.register()
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    processor = AutoProcessor.from_pretrained(str(folder))
    assert processor.image_processor.num_crops == 1
    chat = phi3v.ChatModel(model, processor)
    photo = world / "photos" / "1.png"
    ours = phi3v.ask(recipe.output, photo, "Which colour?", max_new_tokens=8)
    assert chat.ask(photo, "Which colour?", max_new_tokens=8) == ours


@pytest.mark.parametrize("micro", [1, 4])
def test_a_step_does_not_depend_on_its_micro_batches(make: MakeRecipe, trained: MakeRecipe, micro: int) -> None:
    whole, cut = trained(), make(training={"micro_batch_size": micro})
    assert whole.training.micro_batch_size == 2
    phi3v.train(cut)
    assert_same(adapter(cut), adapter(whole), 1e-5)
    losses = [[line["loss"] for line in RunFolder(r.output).read_metrics() if "loss" in line] for r in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_steps_loss_is_the_mean_over_all_its_trained_tokens(make: MakeRecipe, world: Path) -> None:
    recipe = make(data={"answer": "{colour} {colour} {colour}"}, training={"max_steps": 1})
    phi3v.train(recipe)
    logged = RunFolder(recipe.output).read_metrics()[0]["loss"]

    from phi3v.data.columns import RowOptions
    from phi3v.data.encode import encode
    from phi3v.data.sources import load_data
    from phi3v.loading import load_target

    base = load_target(world / "model")
    rows = load_data(options=RowOptions(**recipe.data.row_options), **recipe.data.load_options).train
    total, tokens = 0.0, 0
    for index in epoch_order(10, 4, seed=5, epoch=0)[:4]:
        example = encode(rows[index], base.processor)
        ids = example["input_ids"][None]
        with torch.no_grad():
            images = {name: example[name] for name in ("pixel_values", "image_sizes")}
            logits = base.model(input_ids=ids, **images).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, example["labels"][1:], reduction="none")
        total, tokens = total + float(losses.sum()), tokens + int((example["labels"] != -100).sum())
    assert logged == pytest.approx(total / tokens, abs=1e-5)


@pytest.mark.parametrize("stop_after", [3, 4, 5])
def test_a_resumed_run_ends_as_an_undisturbed_one(make: MakeRecipe, trained: MakeRecipe, stop_after: int) -> None:
    settings = {"save_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "warmup_steps": 1}
    sections = {"lora": {"r": 4, "lora_dropout": 0.1}, "training": settings}
    undisturbed = trained(**sections)

    def interrupt(event: TrainingEvent) -> None:
        if event.kind == "step" and event.step == stop_after:
            raise KeyboardInterrupt

    recipe = make("interrupted", **sections)
    with pytest.raises(KeyboardInterrupt):
        phi3v.train(recipe, on_event=interrupt)
    assert RunFolder(recipe.output).state() == "unfinished"
    events: list[TrainingEvent] = []
    result = phi3v.train(recipe, on_event=events.append)
    expected = 2 * ((stop_after - 1) // 2)
    started = next(event for event in events if event.kind == "start")
    assert (result.status, result.resumed_from, started.resumed_from) == ("resumed", expected, expected)
    assert_same(adapter(recipe), adapter(undisturbed))

    def losses(of: phi3v.Recipe) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in RunFolder(of.output).read_metrics() if "loss" in line]

    assert losses(recipe) == losses(undisturbed)


def test_logits_are_computed_at_trained_positions_only(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

    seen: list[tuple[int, int]] = []
    original = Phi3VForCausalLM.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        seen.append((output.logits.shape[0], int((kwargs["labels"] != -100).sum())))
        return output

    monkeypatch.setattr(Phi3VForCausalLM, "forward", spy)
    phi3v.train(make(training={"max_steps": 1}))
    assert seen and all(logits == trained for logits, trained in seen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_and_changes_nothing(
    make: MakeRecipe, trained: MakeRecipe, reentrant: bool
) -> None:
    vision: dict[str, Any] = {"vision": {"tower": "lora", "projector": "lora"}} if reentrant else {}
    plain = trained(training={"max_steps": 2}, **vision)
    options: dict[str, Any] = {"max_steps": 2, "gradient_checkpointing": True}
    if reentrant:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    checkpointed = make("checkpointed", training=options, **vision)
    phi3v.train(checkpointed)
    assert moved(adapter(checkpointed))
    assert_same(adapter(checkpointed), adapter(plain), 1e-6)


def test_the_whole_model_is_tuned_without_lora(make: MakeRecipe, world: Path) -> None:
    recipe = make(lora=None, vision={"tower": "train", "projector": "train"}, training={"save_steps": 2})
    phi3v.train(recipe)
    before = load_file(world / "model" / "model.safetensors")
    after = load_file(RunFolder(recipe.output).model / "model.safetensors")
    assert set(after) == set(before)
    same = {name for name in before if torch.equal(before[name], after[name])}
    tower = "model.vision_embed_tokens.img_processor.vision_model"
    assert same == {name for name in before if name.startswith((f"{tower}.encoder.layers.2.", f"{tower}.post"))}
    answer = phi3v.ask(recipe.output, world / "photos" / "1.png", "Which colour?", max_new_tokens=4)
    assert isinstance(answer, str)
    weights = RunFolder(recipe.output).model / "model.safetensors"
    content = weights.read_bytes()
    for file in (weights, RunFolder(recipe.output).checkpoints / "checkpoint-6" / weights.name):
        file.write_bytes(file.read_bytes()[:-9] + bytes(9))
        with pytest.raises(CheckpointError, match=f"^{file} is damaged ") as error:
            load_base(file.parent, device="cpu")
        way_out = "name another checkpoint" if file != weights else "` writes it again from the newest good checkpoint;"
        assert way_out in str(error.value)
    assert phi3v.train(recipe).resumed_from == 4  # the newest that is whole
    assert weights.read_bytes() == content


def test_a_trained_projector_is_stored_in_the_adapter(make: MakeRecipe, world: Path) -> None:
    recipe = make(vision={"tower": "train", "projector": "train"}, data={"split": {"validation": 2}})
    phi3v.train(recipe)
    stored = adapter(recipe)
    name = "base_model.model.model.vision_embed_tokens.img_projection.0.weight"
    original = load_file(world / "model" / "model.safetensors")["model.vision_embed_tokens.img_projection.0.weight"]
    assert not torch.equal(stored[name], original)
    assert RunFolder(recipe.output).report.is_file()


def test_the_validation_loss_is_a_mean_over_tokens(make: MakeRecipe, world: Path) -> None:
    """Its interval is the evaluation's, which takes the two rows of each photo together, in batches of any size."""
    losses, photos = [], world / "photos"
    rows = [json.loads(line) for line in (photos / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    twice = [json.dumps({**rows[at % 4], "colour": "red " * (at % 3 + 1)}) for at in range(8)]
    (photos / "twice.jsonl").write_text("\n".join(twice), encoding="utf-8")
    for name, size in (("one", 1), ("three", 3)):
        recipe = make(
            name,
            data={"answer": "{colour}", "validation": str(photos / "twice.jsonl")},
            training={"max_steps": 1, "eval_strategy": "epoch"},
            evaluation={"batch_size": size, "max_new_tokens": 2},
        )
        losses.append(phi3v.train(recipe).metrics["eval_loss"])
        run = RunFolder(recipe.output)
        assert run.read_evaluation()["scores"]["tuned"]["loss"] == pytest.approx(losses[-1], abs=1e-4)
        last = [line for line in run.read_metrics() if "eval_loss" in line][-1]
        assert run.read_evaluation()["images"] == {"rows": 8, "different": 4}
        asked = run.read_evaluation()["metrics"]["loss"]["tuned"]  # the same rows by another way
        ends = [last["eval_loss_low"], last["eval_loss"], last["eval_loss_high"]]
        assert ends == pytest.approx([asked[name] for name in ("low", "value", "high")], rel=1e-4)
        assert ends == sorted(ends)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_loss_that_is_no_number_stops_the_run(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = step_trainer.StepTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(step_trainer.StepTrainer, "compute_loss", broken)
    recipe = make()
    with pytest.raises(TrainingError, match="loss is nan at step 3"):
        phi3v.train(recipe)
    assert RunFolder(recipe.output).state() == "unfinished"


def test_null_for_checkpointing_arguments_leaves_them_to_us(make: MakeRecipe) -> None:
    options = {"max_steps": 1, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": None}
    recipe = make(training=options)
    phi3v.train(recipe)
    assert moved(adapter(recipe))


def test_a_run_without_held_out_rows_has_a_report_with_its_curve(trained: MakeRecipe) -> None:
    recipe = trained()
    result = phi3v.train(recipe)
    assert result.status == "finished"
    run = RunFolder(recipe.output)
    page = run.report.read_text(encoding="utf-8")
    assert result.held_out == 0 and not run.evaluation.exists()
    assert "There are no held-out rows" in page and "<svg" in page and "What was trained" in page
    assert "Exact match" not in page and "evaluation.json" not in page


def test_the_last_loss_is_that_of_the_last_step(make: MakeRecipe, trained: MakeRecipe) -> None:
    often, seldom = trained(), make("seldom", training={"logging_steps": 4})
    told: list[tuple[str, int]] = []
    every = phi3v.train(often).metrics
    few = phi3v.train(seldom, on_event=lambda event: told.append((event.kind, event.step))).metrics
    lines = [line for line in RunFolder(seldom.output).read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 4, 5, 6]
    assert few == every == {"loss": lines[-1]["loss"]}
    assert told.index(("metrics", 6)) < told.index(("step", 6))  # so that the screen shows it beside "6 of 6"
    assert all("train_loss" not in line for line in RunFolder(seldom.output).read_metrics())


def test_a_step_larger_than_all_rows_repeats_them_and_says_so(make: MakeRecipe) -> None:
    recipe = make(training={"samples_per_step": 25, "micro_batch_size": 5, "epochs": 1}, evaluation={"rows": 1})
    events: list[TrainingEvent] = []
    assert phi3v.train(recipe, on_event=events.append, report=False).steps == 1
    used = next(event.rows for event in events if event.rows is not None)
    assert (used.train, used.repeated) == (10, 15)
    assert repeated_line(used) == (
        "an epoch is 1 step of 25 samples (training.samples_per_step): 10 rows, and rows once more for the other 15"
    )
    last = RunFolder(recipe.output).read_metrics()[-1]
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(25, abs=0.1)
    assert [replace(used, samples_per_step=step).repeated for step in (10, 5, 3, 1)] == [0, 0, 2, 0]


def test_another_evaluation_is_made_without_training_again(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(data={"split": {"validation": 4}}, training={"max_steps": 1}, evaluation={"max_new_tokens": 2})
    phi3v.train(recipe)
    run, before = RunFolder(recipe.output), adapter(recipe)
    first = run.evaluation.read_bytes()
    monkeypatch.setattr(training, "_tune", lambda *args: pytest.fail("trained again"))
    shown = recipe.with_overrides(["report.samples=1"])
    phi3v.train(shown)
    assert run.report.read_text().count('class="sample"') == 1 and run.evaluation.read_bytes() == first
    again = shown.with_overrides(["evaluation.rows=3"])
    assert phi3v.train(again).status == "finished"
    assert run.read_evaluation()["rows"] == 3 == len(run.read_predictions())
    assert run.read_recipe().evaluation.rows == 3 and run.report.is_file()
    for lost in (run.evaluation, run.predictions):
        answers = run.read_predictions()
        lost.unlink()
        assert phi3v.train(again).status == "finished"
        assert run.read_evaluation()["rows"] == 3 and run.read_predictions() == answers
    assert_same(adapter(recipe), before)
    with pytest.raises(ConfigError, match="numeric_fields names 'foo'"):
        phi3v.train(again.with_overrides(["evaluation.numeric_fields=[foo]"]))
    assert run.read_recipe() == again and run.report.is_file()


def test_tensorboard_writes_into_the_run(make: MakeRecipe) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional package")
    recipe = make(training={"max_steps": 1}, report={"to": "tensorboard"})
    phi3v.train(recipe)
    assert list((Path(recipe.output) / "tensorboard").glob("events.out.tfevents.*"))


def test_wandb_runs_offline(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is an optional package")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report = {"to": "wandb", "project": "photos", "run_name": "first"}
    recipe = make(training={"max_steps": 2}, data={"split": {"validation": 0.2}}, report=report)
    phi3v.train(recipe)
    files = list((Path(recipe.output) / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)  # the training, and the predictions
    assert len({file.parent.name.rpartition("-")[2] for file in files}) == 1, "one run at W&B"
    [table] = (Path(recipe.output) / "wandb").rglob("predictions_*.table.json")
    told, rows = json.loads(table.read_text()), RunFolder(recipe.output).read_predictions()
    assert told["columns"][:3] == ["row", "source", "images"] and "scores.tuned.exact_match" in told["columns"]
    assert [line[told["columns"].index("tuned")] for line in told["data"]] == [row["tuned"] for row in rows]
    metrics, until = RunFolder(recipe.output).read_evaluation()["metrics"], time.monotonic() + 20
    while b"base/loss" not in (sent := b"".join(file.read_bytes() for file in files)) and time.monotonic() < until:
        time.sleep(0.1)  # another process writes it, later on a busy machine
    for name in ("tuned/exact_match", "tuned/loss", "base/loss"):  # a name, a mark, the length of the value, the value
        [(length, rest)] = re.findall(re.escape(name.encode()) + rb"\x82\x01(.)(.{30})", sent, re.DOTALL)
        side, metric = name.split("/")
        assert float(rest[: length[0]]) == pytest.approx(metrics[metric][side]["value"]), name
    assert wandb.run is None
