"""Packing in a training: the same weights as padding and one by one, planned from headers, a step stays N samples."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from no_waiting import told_waits
from PIL import Image, ImageFile
from safetensors.torch import load_file
from tiny_models import PREPROCESSOR, write_tiny_model
from transformers import TrainerCallback

import phi3v
from phi3v.data.plan import plan_steps
from phi3v.errors import ConfigError
from phi3v.kernels import packed_attention
from phi3v.loading import load_processor
from phi3v.model.vision_phi3_v import Phi3VVisionTransformer
from phi3v.run_folder import RunFolder
from phi3v.training import train as training
from phi3v.training.samples import make_collators, micro_batches_of, read_data
from phi3v.training.sampling import epoch_order
from phi3v.training.step_trainer import StepTrainer

SHAPES = [(40, 30), None, (80, 30), (30, 30), (30, 90), None, (45, 45), (90, 32), None, (33, 31), (61, 60)]
"""Photos of several crop grids, and rows of text alone."""
LIMIT = 600  # of the short rope factors: rows of four crops are beyond it, text alone and one crop within

MakeRecipe = Callable[..., phi3v.Recipe]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a short original context, and eleven rows of photos and text."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model", original_max_position_embeddings=LIMIT)
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "num_crops": 4}))
    rows = []
    for number, shape in enumerate(SHAPES):
        row: dict[str, Any] = {}
        if shape is not None:
            Image.new("RGB", shape, (20 * number, 200 - 15 * number, 90)).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        asked = ("<image>\n" if shape else "") + "Say it again. " * (number % 4 + 1)
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"number {number} " * (number % 3 + 1)}]
        rows.append({**row, "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def make(world: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe of six steps of four samples; keywords are keys of its section training."""

    def recipe(name: str = "run", **changes: Any) -> phi3v.Recipe:
        steps = {"samples_per_step": 4, "max_steps": 6, "seed": 2, "logging_steps": 1, "save_strategy": "no"}
        return phi3v.Recipe.from_dict(
            {
                "model": {"name": str(world / "model"), "device": "cpu"},
                "data": {"train": str(world / "rows.json"), "split": None},
                "lora": {"r": 4},
                "training": {**steps, **changes},
                "output": str(tmp_path / name),
            }
        )

    return recipe


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a training is not looked at here."""
    monkeypatch.setattr(training, "_report", lambda *args: None)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of samples in each row that went through the attention of packs, layer after layer."""
    seen: list[list[int]] = []
    original = packed_attention.by_slices

    def note(module: Any, query: Any, key: Any, value: Any, lengths: list[int], **kwargs: Any) -> torch.Tensor:
        seen.append(lengths)
        return original(module, query, key, value, lengths, **kwargs)

    monkeypatch.setattr(packed_attention, "by_slices", note)
    return seen


def losses(recipe: phi3v.Recipe) -> list[float]:
    return [line["loss"] for line in RunFolder(recipe.output).read_metrics() if "loss" in line]


@pytest.mark.timeout(600)  # on a machine that is very busy it took more than the usual three minutes
def test_ten_steps_packed_padded_and_one_by_one_give_the_same_adapter(make: MakeRecipe, packs: list) -> None:
    recipes = {
        "packed": make("packed", max_steps=10, micro_batch_size=2),
        "whole": make("whole", max_steps=10, tokens_per_micro_batch=10_000),
        "padded": make("padded", max_steps=10, micro_batch_size=4, packing=False),
        "alone": make("alone", max_steps=10, packing=False),
    }
    for name, recipe in recipes.items():
        packs.clear()
        phi3v.train(recipe)
        layers = 2
        if name == "padded" or name == "alone":
            assert not packs
        else:
            assert sum(len(lengths) for lengths in packs) == 10 * 4 * layers
            assert any(min(lengths) < 100 and max(lengths) > LIMIT for lengths in packs)
        if name == "whole":
            assert len(packs) == 10 * layers
    adapters = {
        name: load_file(RunFolder(recipe.output).adapter / "adapter_model.safetensors")
        for name, recipe in recipes.items()
    }
    assert all(bool(tensor.any()) for tensor in adapters["alone"].values())
    for name, found in adapters.items():
        assert losses(recipes[name]) == pytest.approx(losses(recipes["alone"]), abs=1e-5)
        assert found.keys() == adapters["alone"].keys()
        for key, tensor in adapters["alone"].items():
            torch.testing.assert_close(
                found[key], tensor, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_the_plan_is_made_of_headers_and_the_steps_follow_it(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(micro_batch_size=2, max_steps=3)
    processor = load_processor(recipe.model.name)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda *args: pytest.fail("decoded an image"))
        data = read_data(recipe, processor, lambda *told: None)
    how = micro_batches_of(recipe, max(data.lengths))
    assert how.tokens == 2 * max(data.lengths)
    order = epoch_order(len(SHAPES), 4, recipe.training.seed, 0)
    planned = [
        sorted([data.lengths[row] for row in group] for group in step)
        for step in plan_steps(data.lengths, order, 4, how)
    ]
    made: list[list[list[int]]] = []
    original = StepTrainer.training_step

    def note(self: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        made.append(sorted(batch["cu_seqlens"].diff().tolist() for batch in inputs))
        return original(self, model, inputs, *args)

    monkeypatch.setattr(StepTrainer, "training_step", note)
    phi3v.train(recipe)
    assert made == planned and any(len(group) > 1 for step in made for group in step)


def test_the_budget(make: MakeRecipe) -> None:
    recipe = make(micro_batch_size=2)
    processor = load_processor(recipe.model.name)
    data = read_data(recipe, processor, lambda *told: None)
    step, _ = make_collators(recipe, data, processor)
    assert step.micro_batches.tokens == 2 * max(data.lengths) and len(data.lengths) == len(data.train)
    assert make_collators(make(tokens_per_micro_batch=77), data, processor)[0].micro_batches.tokens == 77
    assert micro_batches_of(recipe, 0).tokens is None  # of a stream: each step by its own longest
    assert make_collators(make(packing=False), data, processor)[0].collate is not step.collate
    with pytest.raises(ConfigError, match="^training.tokens_per_micro_batch is the budget of packs, and"):
        make(packing=False, tokens_per_micro_batch=5000)


def test_tokens_and_operations_are_counted_over_all_micro_batches(make: MakeRecipe) -> None:
    told = {}
    for name, changes in {"packed": {}, "padded": {"packing": False, "micro_batch_size": 4}}.items():
        recipe = make(name, max_steps=2, include_num_input_tokens_seen="non_padding", **changes)
        phi3v.train(recipe)
        lines = RunFolder(recipe.output).read_metrics()
        told[name] = [line["num_input_tokens_seen"] for line in lines if "loss" in line], lines[-1]["total_flos"]
    data = read_data(make(), load_processor(make().model.name), lambda *told: None)
    order = epoch_order(len(SHAPES), 4, 2, 0)
    first = sum(data.lengths[row] for row in order[:4])
    assert told["packed"][0] == told["padded"][0] == [first, first + sum(data.lengths[row] for row in order[4:8])]
    assert 0 < told["packed"][1] < told["padded"][1]  # the Trainer's estimate counts padding


def test_features_that_are_kept_stand_in_packs(make: MakeRecipe, packs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Phi3VVisionTransformer.forward

    def count(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(Phi3VVisionTransformer, "forward", count)
    plain = make("plain", max_steps=3)
    kept = phi3v.Recipe.from_dict(make("kept", max_steps=3).model_dump() | {"vision": {"cache": "memory"}})
    for recipe in (plain, kept):
        phi3v.train(recipe)
        assert packs and seen
        packs.clear()
        if recipe is plain:
            seen.clear()
    images = sum(shape is not None for shape in SHAPES)
    assert len(seen) == images == RunFolder(kept.output).read_features()["computed"]  # all before the first step
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)


def test_validation_rows_are_padded_and_go_the_plain_way(make: MakeRecipe, packs: list) -> None:
    validated = []
    for changes in ({}, {"packing": False}):
        values = make(f"run{len(validated)}", max_steps=1, eval_strategy="steps", eval_steps=1, **changes).model_dump()
        values["data"] |= {"split": {"validation": 3}}
        recipe = phi3v.Recipe.from_dict(values)
        validated.append(phi3v.train(recipe).metrics["eval_loss"])
        assert sum(len(lengths) for lengths in packs) in (0, 4 * 2)  # a training step alone, in two layers
        packs.clear()
    assert validated[0] == pytest.approx(validated[1], abs=1e-5)


def as_varlen(query: Any, key: Any, value: Any, borders: Any, longest: int, scaling: float | None) -> torch.Tensor:
    """A stand-in for the kernel of a GPU, which is not waited for: `[T, heads, head size]` in and out."""
    sample = torch.searchsorted(borders, torch.arange(len(query), dtype=borders.dtype), right=True)
    mask = (sample[:, None] == sample).tril()
    parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scaling)[0].transpose(0, 1)


def test_a_packed_step_is_waited_for_once_where_its_update_is_decided(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the beginning of a step to its end as on a GPU; a CPU alone compares crops and takes packs in slices."""
    monkeypatch.setattr("phi3v.model.vision_phi3_v.seen_twice", lambda *crops: [])
    monkeypatch.setattr(packed_attention, "_runs_varlen", lambda device: True)
    monkeypatch.setattr(
        packed_attention, "varlen_kernel", lambda: lambda *given: longest.append(given[4]) or as_varlen(*given)
    )
    told: list[str] = []
    longest: list[int] = []
    for name in ("training_step", "_get_grad_norm"):
        plain = getattr(StepTrainer, name)

        def noted(self: Any, *args: Any, name: str = name, plain: Any = plain, **named: Any) -> Any:
            told.append(name)
            done = plain(self, *args, **named)
            told.append("-")
            return done

        monkeypatch.setattr(StepTrainer, name, noted)

    class Watch(TrainerCallback):
        stack = contextlib.ExitStack()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.clear()
            if state.global_step == 2:  # the first step is looked at more closely
                self.stack.enter_context(told_waits(told.append))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack.close()

    recipe = make(max_steps=3, micro_batch_size=2, logging_steps=100).with_overrides(["model.dtype=bfloat16"])
    training.train_watched(recipe, [Watch()])
    assert told == ["training_step", "-", "_get_grad_norm", "Tensor.tolist", "-"]
    assert len(longest) >= 3 * 2 and max(longest) > LIMIT  # two layers
