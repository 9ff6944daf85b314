"""What is wrong with a checkpoint or an option, in one line: the file, the field, the way out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_photos, write_tiny_model

from phi3v import loading, tuning, weight_files
from phi3v.errors import CheckpointError, ConfigError, DeviceError, MissingPackageError
from phi3v.evaluation.run import evaluate
from phi3v.generate import ChatModel
from phi3v.passthrough import first_line
from phi3v.recipe import ModelSection, Recipe
from phi3v.training.data_check import check_recipe
from phi3v.training.train import train


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def change(folder: Path, **fields: Any) -> None:
    """Writes other values into config.json; a mapping is merged into the one that is there."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    merged = {key: {**config[key], **value} if isinstance(value, dict) else value for key, value in fields.items()}
    file.write_text(json.dumps({**config, **merged}))


OTHER_TYPE = (
    "{} is of model type 'llama', phi3v loads 'phi3_v': use microsoft/Phi-3-vision-128k-instruct, "
    "microsoft/Phi-3.5-vision-instruct or a model made from them"
)


def test_another_type_is_refused_before_the_processor(model_folder: Path, tmp_path: Path) -> None:
    rows = write_photos(tmp_path / "photos", 4)
    change(model_folder, model_type="llama")
    values = {"model": str(model_folder), "image": {"num_crops": 1}, "output": str(tmp_path / "run")}
    values["data"] = {"train": str(rows), "prompt": "What?", "answer": "{colour}", "split": {"validation": 1}}
    recipe = Recipe.from_dict(values)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    commands: list[Callable[[], Any]] = [
        lambda: ChatModel.from_target(model_folder, num_crops=1),
        lambda: train(recipe),
        lambda: evaluate(model_folder, tmp_path / "r.yaml"),
        lambda: check_recipe(recipe),
    ]
    for command in commands:
        with pytest.raises(CheckpointError) as error:
            command()
        assert str(error.value) == OTHER_TYPE.format(model_folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope_scaling": {"short_factor": [1.0] * 3}}, "rope_scaling's short_factor field must have length 8, got 3"),
        ({"rope_scaling": {"type": "foo"}}, "rope_scaling's type field must be one of ['longrope'], got foo"),
        ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str (value: 'x')"),
        ({"num_attention_heads": 7}, "hidden_size is 32, which is no multiple of num_attention_heads, 7"),
        (
            {"vision_config": {"hidden_size": "y"}},
            "vision_config: Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got "
            "str (value: 'y')",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_file(model_folder: Path, fields: dict[str, Any], reason: str) -> None:
    change(model_folder, **fields)
    for load in (loading.load_config, loading.load_processor, loading.load_base, loading.load_target):
        with pytest.raises(CheckpointError) as error:
            load(model_folder)
        expected = f"{model_folder}/config.json: {reason}; restore config.json as it was published"
        assert str(error.value) == expected


def test_a_file_of_the_processor_that_is_missing_is_named(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as error:
        loading.load_processor(model_folder)
    assert str(error.value) == (
        f"cannot load the processor of {model_folder}: {model_folder} has no tokenizer.json; it needs tokenizer.json, "
        "tokenizer_config.json, preprocessor_config.json as they were published"
    )


def test_options_end_with_the_way_out(model_folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loading.load_base(model_folder, attn_implementation="foo")
    assert str(error.value) == (
        "model.attn_implementation 'foo' is none that transformers has for this model: use sdpa or eager, or "
        "flash_attention_2 where flash-attn is installed"
    )


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
def test_a_device_of_another_kind_that_is_not_there(model_folder: Path) -> None:
    with pytest.raises(DeviceError) as error:
        loading.load_base(model_folder, device="mps")
    seen = f"torch {torch.__version__} sees no such device"
    assert str(error.value) == f"model.device is 'mps' and {seen}: use model.device=cpu or auto"


@pytest.mark.skipif(loading.importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_missing_attention_names_what_installs_it(model_folder: Path) -> None:
    with pytest.raises(MissingPackageError) as error:
        loading.load_base(model_folder, attn_implementation="flash_attention_2")
    out = "pip install flash-attn --no-build-isolation, or use model.attn_implementation=sdpa"
    assert str(error.value).endswith(out) and "\n" not in str(error.value)


def test_an_adapter_without_weights_is_refused_before_its_base_is_read(model_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    tuning.attach_lora(loading.load_base(model_folder), {"r": 2}).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        loading.load_target(adapter)
    assert str(error.value) == (
        f"cannot read {adapter}/adapter_model.safetensors: No such file or directory; copy it there again, or train "
        "again"
    )


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no such model\nTry again later", "no such model"),
        ("Validation error for field 'r':\n    TypeError: 'r' expected int", "'r' expected int"),
        ("Only a heading:", "Only a heading:"),
        (
            "both should match, but found\n- save: epoch\n- eval: no",
            "both should match, but found save: epoch, eval: no",
        ),
        ("not found\nPlease see:\n- the name", "not found"),
        ("ValueError: kept where it is the first line", "ValueError: kept where it is the first line"),
        ("", "RuntimeError"),
    ],
)
def test_the_line_that_says_something(message: str, line: str) -> None:
    assert first_line(RuntimeError(message)) == line


def test_the_recipes_words_on_dtype_and_attention_are_true(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {key: field.description or "" for key, field in ModelSection.model_fields.items()}
    assert words["attn_implementation"].endswith("null takes sdpa.")
    assert loading.load_base(model_folder, attn_implementation=None).config._attn_implementation == "sdpa"
    chosen = []
    for device, has_bfloat16 in (("cuda", True), ("cuda", False), ("cpu", True)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        chosen.append(str(loading.resolve_dtype("auto", torch.device(device))).removeprefix("torch."))
    found = "auto: {} on GPUs that have it, else {}; {} on the CPU.".format(*chosen)
    assert words["dtype"].endswith(found)


@pytest.mark.parametrize("shard", ["100GB", "20KB"])
def test_a_second_name_of_the_embeddings_with_other_values_is_refused(tmp_path: Path, shard: str, monkeypatch) -> None:
    """In one file and in shards, and where the row that differs is one of the last; equal values are ignored."""
    monkeypatch.setattr(weight_files, "_ROWS_AT_ONCE", 100)
    folder = write_tiny_model(tmp_path / "model")
    model = loading.load_base(folder)
    weights = model.state_dict()
    second = weights["model.embed_tokens.weight"].clone()
    state = {**weights, "model.vision_embed_tokens.wte.weight": second}

    def write() -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard)

    write()
    assert (folder / "model.safetensors.index.json").is_file() == (shard == "20KB")
    equal = loading.load_base(folder).state_dict()
    assert all(torch.equal(equal[name], value) for name, value in weights.items())
    second[-1, -1] += 1
    write()
    with pytest.raises(CheckpointError) as error:
        loading.load_base(folder)
    assert re.fullmatch(
        r"\S+model/model\S*\.safetensors: model.vision_embed_tokens.wte.weight is a second name of "
        r"model.embed_tokens.weight and differs from it: which .*, or restore the file",
        str(error.value),
    )
