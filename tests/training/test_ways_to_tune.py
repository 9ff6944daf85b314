"""Ways to tune: vision parts under LoRA, rates by part, going on from adapters, what passes through to libraries."""

import io
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

import phi3v
from phi3v import adapters, loading, targets, tuning
from phi3v.cli_screen import show_run
from phi3v.errors import CheckpointError, ConfigError
from phi3v.features.vision import VisionFeatures
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training import step_trainer
from phi3v.training.arguments import training_arguments
from phi3v.training.part_rates import set_part_rates

MakeRecipe = Callable[..., phi3v.Recipe]
STEP = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no"}


def weights_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(recipe.output).adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(("part", "layers"), [("tower", 2 * 6), ("projector", 2)])
def test_lora_sits_on_vision_parts_that_ask_for_it(make: MakeRecipe, world: Path, part: str, layers: int) -> None:
    tuned = tuning.attach_lora(loading.load_base(world / "model"), {"r": 4}, **{part: "lora"})
    on_language = [name for name, _ in tuned.named_modules() if name.endswith("lora_A") and "vision" not in name]
    on_vision = [name for name, _ in tuned.named_modules() if name.endswith("lora_A") and "vision" in name]
    assert (len(on_language), len(on_vision)) == (8, layers)
    assert not any("layers.2." in name for name in on_vision)  # whose output nobody reads
    assert tuning.vision_choices(tuned) == {"tower": "frozen", "projector": "frozen", part: "lora"}
    recipe = make(vision={part: "lora"}, training=STEP)
    phi3v.train(recipe)
    moved = [name for name, weight in weights_of(recipe).items() if "lora_B" in name and bool(weight.any())]
    assert len(moved) == 8 + layers
    found = loading.load_target(recipe.output)
    assert tuning.vision_choices(found.model)[part] == "lora"


def test_a_bias_of_lora_is_saved_without_a_warning_of_shards(world: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        tuned = tuning.attach_lora(loading.load_base(world / "model"), {"r": 4, "lora_bias": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.save_tuned(tuned, tmp_path)
    assert any(name.endswith("lora_B.bias") for name in load_file(tmp_path / "adapter_model.safetensors"))
    targeted = targets.read_json(tmp_path / "adapter_config.json")["target_modules"]
    assert targeted == sorted(targeted) and len(targeted) > 3, "another order in each process"
    file = tmp_path / "config.json"
    for names in (["b", "a", "c"], ["c", "b", "a"]):
        file.write_text(json.dumps({"target_modules": names, "layers_pattern": ["z", "y"]}))
        adapters._sort_sets(file, {"target_modules": {"a", "b", "c"}, "layers_pattern": ["z", "y"]})
        assert list(targets.read_json(file).values()) == [["z", "y"], ["a", "b", "c"]]


def test_a_projector_that_peft_wraps_as_a_whole_is_looked_at_by_name(world: Path) -> None:
    """Neither the model nor its kept features may look at it place by place; recipes say vision.projector instead."""
    base = loading.load_base(world / "model", device="cpu")
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["qkv_proj"], modules_to_save=["img_projection"]))
    assert VisionFeatures(wrapped, phi3v.FeatureMemory(10**9)).size_of((336, 336)) == 313 * 32 * 4
    pixels, sizes = torch.zeros(1, 2, 3, 336, 336), torch.tensor([[336, 336]])
    assert wrapped.get_base_model().get_image_features(pixels, sizes).last_hidden_state.shape == (313, 32)


def test_lora_on_some_layers_and_the_tower(world: Path) -> None:
    """What PEFT refuses for patterns holds for names: layers_to_transform still chooses layers of the decoder."""
    options = {"r": 4, "layers_to_transform": [1], "target_modules": ["o_proj", "down_proj"]}
    tuned = tuning.attach_lora(loading.load_base(world / "model"), options, tower="lora")
    found = {name for name, _ in tuned.named_modules() if name.endswith("lora_A")}
    assert {name for name in found if "vision" not in name} == {
        "base_model.model.model.layers.1.self_attn.o_proj.lora_A",
        "base_model.model.model.layers.1.mlp.down_proj.lora_A",
    }
    assert len(found) == 2 + 12


def test_modules_that_train_whole_are_the_language_models_alone(make: MakeRecipe, world: Path) -> None:
    """PEFT goes by ends of names: embed_tokens would be vision_embed_tokens too, norm the tower's pre_layrnorm."""
    expected = {
        "embed_tokens": ["model.embed_tokens"],
        "norm": [
            *(f"model.layers.{layer}.{norm}_layernorm" for layer in (0, 1) for norm in ("input", "post_attention")),
            "model.norm",
        ],
        "lm_head": ["lm_head"],
    }
    for end, names in expected.items():
        tuned = tuning.attach_lora(loading.load_base(world / "model"), {"r": 4, "modules_to_save": [end]})
        assert sorted(tuned.peft_config["default"].modules_to_save) == sorted(names)
        kept = [name for name, module in tuned.named_modules() if hasattr(module, "original_module")]
        assert sorted(kept) == sorted(f"base_model.model.{name}" for name in names)
        assert not any(
            tuning.part_of(name) != "language model" for name, one in tuned.named_parameters() if one.requires_grad
        )
    recipe = make(
        lora={"r": 4, "modules_to_save": ["embed_tokens", "norm"]}, vision={"projector": "train"}, training=STEP
    )
    report = phi3v.train(recipe).trainable
    assert report["vision tower"]["trainable"] == 0 < report["projector"]["trainable"]
    assert tuning.vision_choices(loading.load_target(recipe.output).model) == {"tower": "frozen", "projector": "train"}
    for end in ("img_processor", "fc1", "model"):
        with pytest.raises(ConfigError, match=f"modules_to_save: '{end}' hits no module of the language model alone"):
            tuning.attach_lora(loading.load_base(world / "model"), {"r": 4, "modules_to_save": [end]})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lora": None, "vision": {"tower": "lora"}}, "vision.tower asks for LoRA, and lora is null"),
        ({"lora": None, "model": {"adapter": "runs/x"}}, "model.adapter asks for LoRA"),
        ({"vision": {"projector_learning_rate": 1e-5}}, "vision.projector is frozen"),
    ],
)
def test_contradictions_are_one_line(make: MakeRecipe, world: Path, sections: dict[str, Any], words: str) -> None:
    if "model" in sections:
        sections = {**sections, "model": {"name": str(world / "model"), **sections["model"]}}
    with pytest.raises(ConfigError, match=words) as caught:
        make(**sections)
    assert "\n" not in str(caught.value)


def test_each_part_has_its_own_rate(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SGD, one step moves a weight by its gradient times its part's rate."""
    seen: dict[str, list[float]] = {}
    plain = step_trainer.set_part_rates

    def noted(optimizer: Any, model: Any, rates: Any) -> None:
        plain(optimizer, model, rates)
        names = {id(weight): name for name, weight in model.named_parameters()}
        for group in optimizer.param_groups:
            for weight in group["params"]:
                seen.setdefault(tuning.part_of(names[id(weight)]), []).append(group["lr"])

    monkeypatch.setattr(step_trainer, "set_part_rates", noted)
    step = {**STEP, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    vision = {"tower": "lora", "projector": "lora"}
    one = make("one", training=step, vision=vision)
    other = make("other", training=step, vision={**vision, "tower_learning_rate": 0.25, "projector_learning_rate": 0.5})
    phi3v.train(one)
    assert not seen
    phi3v.train(other)
    assert {part: set(rates) for part, rates in seen.items()} == {
        "language model": {1.0},
        "vision tower": {0.25},
        "projector": {0.5},
    }
    plain_weights, found = weights_of(one), weights_of(other)
    share = {"language model": 1.0, "vision tower": 0.25, "projector": 0.5}
    for name, weight in plain_weights.items():
        if "lora_B" in name:  # began at zero, so it is the gradient times the rate
            torch.testing.assert_close(found[name], share[tuning.part_of(name)] * weight, rtol=1e-5, atol=1e-9)


def test_groups_are_cut_by_part() -> None:
    model = torch.nn.Module()
    model.vision_embed_tokens = torch.nn.Linear(2, 2)
    model.lm_head = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.3)
    set_part_rates(optimizer, model, {"projector": 0.1})
    assert [(group["lr"], len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 2, 0.3),
        (1.0, 2, 0.3),
    ]


def test_a_run_goes_on_from_another_on_new_data(make: MakeRecipe, world: Path) -> None:
    first = make("first", training=STEP)
    phi3v.train(first)
    begun = weights_of(first)
    model = {"name": str(world / "model"), "adapter": first.output}
    still = make("still", model=model, training={**STEP, "learning_rate": 1e-30})
    phi3v.train(still)
    for name, weight in weights_of(still).items():
        torch.testing.assert_close(weight, begun[name], rtol=0, atol=1e-12)
    further = make("further", model=model, training={**STEP, "seed": 9})
    result = phi3v.train(further)
    assert result.trainable["language model"]["trainable"] == 2 * 4 * ((32 + 96) + 64 + 160 + 96)
    assert all(not torch.equal(weight, begun[name]) for name, weight in weights_of(further).items() if "lora_B" in name)
    saved = json.loads((RunFolder(further.output).adapter / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str((world / "model").resolve())
    with pytest.raises(ConfigError, match="model.adapter .* has its tower frozen: set vision.tower=frozen, it is lora"):
        phi3v.train(make("wrong", model=model, training=STEP, vision={"tower": "lora"}))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        phi3v.train(make("none", model={**model, "adapter": str(world / "model")}))
    spoilt = shutil.copytree(RunFolder(first.output).adapter, Path(first.output).with_name("spoilt"))
    begun[min(begun)][0, 0] = math.nan
    save_file(begun, spoilt / "adapter_model.safetensors")
    (spoilt / "digests.json").unlink()  # with them it is refused before its numbers are looked at
    none = make("none", model={**model, "adapter": str(spoilt)}, training=STEP)
    with pytest.raises(CheckpointError, match=f"{spoilt}: 1 of its tensors hold NaN or infinity, {min(begun)} for ins"):
        phi3v.train(none)
    (spoilt / "adapter_model.safetensors").rename(spoilt / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only adapter_model.bin, a pickle, .* peft .*safe_serialization=True\)"):
        phi3v.train(none)
    assert not Path(none.output).exists()


def foreign_adapter(world: Path, folder: Path) -> Path:
    """An adapter as Microsoft's script writes it with transformers 4: its class by remote code, LoRA on every part."""
    tuned = tuning.attach_lora(loading.load_base(world / "model"), {"r": 4}, tower="lora", projector="lora")
    tuned.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    language = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    names = [*language, "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "img_projection.0", "img_projection.2"]
    kept = ("r", "lora_alpha", "lora_dropout", "bias", "peft_type", "task_type", "base_model_name_or_path")
    old = {key: config[key] for key in kept} | {"target_modules": names, "init_lora_weights": "gaussian"}
    remote = "transformers_modules.microsoft.Phi-3-vision-128k-instruct.0ed6b9b.modeling_phi3_v"
    old |= {"auto_mapping": {"base_model_class": "Phi3VForCausalLM", "parent_library": remote}, "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(old))
    weights = load_file(folder / "adapter_model.safetensors")
    torch.manual_seed(4)
    for name in [name for name in weights if "layers.1.mlp.fc1.lora_A" in name]:
        for matrix, shape in {"q_proj": (4, 16), "k_proj": (4, 16), "v_proj": (4, 16), "out_proj": (4, 16)}.items():
            unread = name.replace("layers.1.mlp.fc1", f"layers.2.self_attn.{matrix}")
            weights[unread], weights[unread.replace("lora_A", "lora_B")] = torch.randn(shape), torch.zeros(16, 4)
        for matrix, (rows, columns) in {"fc1": (32, 16), "fc2": (16, 32)}.items():
            unread = name.replace("layers.1.mlp.fc1", f"layers.2.mlp.{matrix}")
            weights[unread], weights[unread.replace("lora_A", "lora_B")] = torch.randn(4, columns), torch.zeros(rows, 4)
    save_file(
        {name: torch.randn_like(weight) for name, weight in weights.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_adapters_of_other_tools_load_and_go_on(
    make: MakeRecipe, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose base is a folder of another machine goes on on the recipe's model, which a line says."""
    folder = foreign_adapter(world, tmp_path / "foreign")
    found = loading.load_target(folder, device="cpu")
    stored = load_file(folder / "adapter_model.safetensors")
    for name, weight in adapters.adapter_state(found.model).items():
        torch.testing.assert_close(weight, stored[name], rtol=0, atol=0)
    assert targets.resolve_target(folder).adapter == folder
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/of/another"}))
    with pytest.raises(CheckpointError, match="was tuned on /of/another, which is not here"):
        targets.resolve_target(folder)
    vision = {"tower": "lora", "projector": "lora"}
    recipe = make(model={"name": str(world / "model"), "adapter": str(folder)}, vision=vision, training=STEP)
    phi3v.train(recipe)
    assert weights_of(recipe).keys() == stored.keys()
    said = f"model.adapter {folder} was tuned on /of/another, which is not here: it fits {world / 'model'}"
    assert said in caplog.messages
    assert targets.resolve_target(recipe.output).base == str(world / "model")


def test_adapters_that_lack_what_nobody_reads_load_and_go_on(make: MakeRecipe, world: Path, tmp_path: Path) -> None:
    """Microsoft's docvqa script takes the last layer out of the tower before it puts LoRA there."""
    folder = foreign_adapter(world, tmp_path / "foreign")
    batch = {
        "input_ids": torch.tensor([[1, *[754] * 313, 20, 21]]),
        "pixel_values": torch.randn(1, 2, 3, 336, 336),
        "image_sizes": torch.tensor([[336, 336]]),
    }
    whole = loading.load_target(folder, device="cpu").model(**batch).logits
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    last = {name for name in stored if "img_processor" in name and ".layers.2." in name}
    assert len(last) == 2 * 6
    read = {name: weight for name, weight in stored.items() if name not in last}
    save_file(read, file)
    found = loading.load_target(folder, device="cpu")
    torch.testing.assert_close(found.model(**batch).logits, whole, rtol=0, atol=0)
    recipe = make(
        model={"name": str(world / "model"), "adapter": str(folder)},
        vision={"tower": "lora", "projector": "lora"},
        training=STEP,
    )
    trained = phi3v.train(recipe).trainable["vision tower"]["trainable"]
    assert trained == sum(weight.numel() for name, weight in read.items() if "img_processor" in name)
    for name in (min(read), next(name for name in read if "layers.1.mlp.fc1" in name)):
        save_file({other: weight for other, weight in read.items() if other != name}, file)
        with pytest.raises(CheckpointError, match=f"does not fit .*: {name} is missing in the file"):
            loading.load_target(folder, device="cpu")


OPTIMISERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad", "nadam", "lion_8bit"]


@pytest.mark.parametrize(
    "options",
    [
        *({"optim": name} for name in ["adamw_torch", "adafactor", "rmsprop"]),
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        {"weight_decay": 0.5},
        {"max_grad_norm": 1e-6},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.2},
    ],
    ids=str,
)
def test_options_of_the_trainer_change_what_is_learned(make: MakeRecipe, plain: Any, options: dict[str, Any]) -> None:
    """Passed through by their own names: three steps with each end at other weights than three steps without."""
    recipe = make(training={"max_steps": 3, "save_strategy": "no", "learning_rate": 0.01, **options})
    phi3v.train(recipe)
    found = weights_of(recipe)
    assert all(bool(torch.isfinite(weight).all()) for weight in found.values())
    assert any(not torch.equal(found[name], weight) for name, weight in plain(make).items())


@pytest.fixture(scope="module")
def plain() -> Callable[[MakeRecipe], dict[str, torch.Tensor]]:
    """Weights of the plain run, made once."""
    kept: dict[str, torch.Tensor] = {}

    def weights(make: MakeRecipe) -> dict[str, torch.Tensor]:
        if not kept:
            recipe = make("plain", training={"max_steps": 3, "save_strategy": "no", "learning_rate": 0.01})
            phi3v.train(recipe)
            kept.update(weights_of(recipe))
        return kept

    return weights


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adamw_bnb_8bit"])
def test_optimisers_of_bitsandbytes_are_chosen_by_name(make: MakeRecipe, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import Trainer

    recipe = make(training={"optim": name})
    arguments = training_arguments(
        recipe, RunFolder(recipe.output), device=torch.device("cpu"), autocast=None, validated=False
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert kind.__module__.startswith("bitsandbytes")
    assert options["optim_bits"] == 8 and options["is_paged"] == name.startswith("paged")


def test_early_stopping_keeps_the_best_weights(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses 3, 2, 4, 5 with a patience of 2: the run ends at step 4 with the weights of step 2."""
    losses = iter([3.0, 2.0, 4.0, 5.0, 1.0])
    states: dict[int, dict[str, torch.Tensor]] = {}
    plain = step_trainer.StepTrainer.evaluation_loop

    def pretended(self: Any, *given: Any, **named: Any) -> Any:
        output = plain(self, *given, **named)
        output.metrics["eval_loss"] = next(losses)
        states[self.state.global_step] = {
            name: weight.clone() for name, weight in adapters.adapter_state(self.model).items()
        }
        return output

    monkeypatch.setattr(step_trainer.StepTrainer, "evaluation_loop", pretended)
    steps = {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "eval_strategy": "steps", "learning_rate": 0.05}
    recipe = make(training={**steps, "early_stopping": 2, "epochs": 8}, data={"split": {"validation": 2}})
    result = phi3v.train(recipe)
    assert (result.steps, result.planned) == (4, 8)
    for name, weight in weights_of(recipe).items():
        torch.testing.assert_close(weight, states[2][name], rtol=0, atol=0)
    kept = {"step": 2, "metric": "eval_loss", "score": 2.0, "last_score": 5.0, "patience": 2}
    run = RunFolder(recipe.output)
    assert run.read_summary()["kept"] == result.kept == phi3v.train(recipe).kept == kept
    line = (
        "nded early at step 4 of 8: held-out loss did not get better for 2 validations; the weights kept are of "
        "step 2, held-out loss 2 (5 at the last validation)"
    )
    printed = io.StringIO()
    show_run(Console(file=printed), {**result.to_dict(), "evaluation": None, "report": None})
    assert f"\ne{line}\n" in printed.getvalue()
    assert f"<p>E{line}.</p>" in run.report.read_text(encoding="utf-8")


def test_float16_computes_beside_float32_adapters(make: MakeRecipe) -> None:
    """For GPUs without bfloat16; on a CPU the same arithmetic."""
    recipe = make(model={"name": make().model.name, "dtype": "float16"}, training={**STEP, "max_steps": 2})
    arguments = training_arguments(
        recipe, RunFolder(recipe.output), device=torch.device("cuda"), autocast=torch.float16, validated=False
    )
    assert (arguments.fp16, arguments.bf16) == (True, False)
    from phi3v.training.prepare import prepare_model

    prepared = prepare_model(recipe, torch.device("cpu"))
    assert (prepared.autocast, prepared.short) == (torch.float16, None)
    kinds = {weight.dtype for weight in prepared.model.parameters() if weight.requires_grad}
    assert kinds == {torch.float32}
    assert {weight.dtype for weight in prepared.model.parameters() if not weight.requires_grad} == {torch.float16}
    with pytest.raises(ConfigError, match="training.fp16 is decided by model.dtype .*bfloat16 cannot be scaled back"):
        phi3v.train(make(training={"fp16": True}))
