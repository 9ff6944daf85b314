"""A checkpoint in Microsoft's exact layout through train, ask, save and reload: at full width, and narrow in seconds.

The real configuration is cut to two decoder layers and filled with random bfloat16 weights, in shards with an index.
With the reference data at hand its files are the hub's own (config, preprocessor, tokenizer); without, the
configuration is written here and the tokenizer is the small one. At full width that is 1.5 GB of weights and minutes
of arithmetic; narrow, it has the same tensors by name, the same vocabulary, heads of the same size and fewer of them.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_folder
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import PREPROCESSOR, write_photos, write_small_tokenizer

import phi3v
from phi3v.demo.tokenizer import BASE_SIZE
from phi3v.loading import load_target
from phi3v.model.configuration_phi3_v import CLIP_VIT_LARGE_336
from phi3v.run_folder import RunFolder
from phi3v.targets import tensor_shapes

HUB = shared_folder() / "phi3v" / "hub" / "Phi-3-vision-128k-instruct"
LAYERS = 2
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
NARROW = {
    "hidden_size": 192,
    "intermediate_size": 256,
    **HEADS,
    "img_processor": {"name": "clip_vision_model", "image_dim_out": 32, "num_img_tokens": 144},
    "vision_config": {**CLIP_VIT_LARGE_336, **TOWER},
}
"""What is smaller in the narrow one: two heads of 96, and a tower of all its 24 layers."""
# Processors without bfloat16 units emulate them: the full tower then takes minutes instead of seconds.
COMPUTE = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def published_config() -> dict[str, Any]:
    """The fields of Microsoft's config.json that shape the model; the rope factors are made up."""
    if HUB.is_dir():
        return json.loads((HUB / "config.json").read_text())
    factors = [1.0 + place / 100 for place in range(48)]
    return {
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"},
        "model_type": "phi3_v",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors},
        "rope_theta": 10000.0,
        "sliding_window": 131072,
        "rms_norm_eps": 1e-05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "image_token_id": BASE_SIZE + 44,
        "_attn_implementation": "flash_attention_2",
    }


def write_checkpoint(folder: Path, changes: dict[str, Any]) -> Path:
    """The model folder, as a download of the hub's would be; `changes` are fields of its configuration."""
    from phi3v.model.configuration_phi3_v import Phi3VConfig
    from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

    folder.mkdir()
    config = {**published_config(), "num_hidden_layers": LAYERS, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    if HUB.is_dir():
        for name in (
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        ):
            shutil.copyfile(HUB / name, folder / name)
        listed = json.loads((HUB / "model.safetensors.index.json").read_text())["weight_map"]
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "num_crops": 16}))
        write_small_tokenizer(folder)
        listed = None
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Phi3VForCausalLM(Phi3VConfig(**config)).state_dict().items()}
    names = sorted(shapes)
    if listed is not None:
        kept = {name for name in listed if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS}
        assert set(names) == kept
    noise = torch.empty(2**22, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        tensors = {name: _cut(noise, name, shapes[name]) for name in part}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _cut(noise: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    """Weights of the size that a trained model's have, cut from noise at a place of their own; norms around one."""
    start = zlib.crc32(name.encode()) % 1_000_003
    repeats = -(-(start + shape.numel()) // len(noise))
    tensor = noise.repeat(repeats)[start : start + shape.numel()].view(shape).clone()
    return tensor + 1 if "norm" in name and name.endswith("weight") else tensor


def stored(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model folder."""
    return {name: file for file in folder.glob("*.safetensors") for name in tensor_shapes(file)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", [NARROW, pytest.param({}, marks=pytest.mark.slow)], ids=["narrow", "full"])
def test_train_ask_save_and_reload(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, photos = write_checkpoint(tmp_path / "model", changes), write_photos(tmp_path / "photos", 2)
    recipe = phi3v.Recipe.from_dict(
        {
            "model": {"name": str(model), "dtype": COMPUTE, "device": "cpu"},
            "data": {
                "train": str(photos),
                "prompt": "Which colour?",
                "answer": "It is {colour}.",
                "split": None,
                "max_rows": 1,
            },
            "image": {"num_crops": 1},
            "lora": {"r": 2},
            "training": {
                "samples_per_step": 1,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2 if changes else 1e-3,
            },
            "output": str(tmp_path / "run"),
        }
    )
    result = phi3v.train(recipe)
    run = RunFolder(recipe.output)
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert result.steps == 2 and len(losses) == 2 and losses[1] < losses[0]
    with safe_open(run.adapter / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert len(tensors) == LAYERS * 4 * 2
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (
        changes.get("hidden_size", 3072),
        2,
    )
    assert all(tensor.any() and tensor.isfinite().all() for tensor in tensors.values())

    chat = phi3v.ChatModel.from_target(recipe.output, dtype=COMPUTE)
    assert chat.model.get_base_model().dtype == getattr(torch, COMPUTE)
    assert isinstance(chat.ask(tmp_path / "photos" / "1.png", "Which colour?", max_new_tokens=3), str)
    del chat

    loaded = load_target(model, dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path / "saved", max_shard_size="10MB" if changes else "900MB")
    loaded.processor.save_pretrained(tmp_path / "saved")
    del loaded
    assert_same_checkpoint(tmp_path / "saved", model)
    assert ("vision_config" in json.loads((tmp_path / "saved" / "config.json").read_text())) == bool(changes)
    again = load_target(tmp_path / "saved", dtype="bfloat16")
    assert again.kind == "model" and again.processor.image_processor.num_crops == 16


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Equal names and tensors, whatever the shards, and a config that older readers understand."""
    here, there = stored(found), stored(expected)
    assert set(here) == set(there)
    for name in here:
        with safe_open(here[name], "pt") as one, safe_open(there[name], "pt") as other:
            assert torch.equal(one.get_tensor(name), other.get_tensor(name)), name
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (found, expected))
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "rope_scaling", "rope_theta"):
        assert config[key] == original[key]
    assert config["original_max_position_embeddings"] == original["original_max_position_embeddings"]
    assert "auto_map" not in config


@pytest.mark.skipif(not HUB.is_dir(), reason=f"needs the hub's own files, which are not at {HUB}")
def test_the_real_tokenizer_gives_microsofts_labels(tmp_path: Path) -> None:
    from phi3v.data.columns import RowOptions
    from phi3v.data.encode import encode
    from phi3v.data.sources import load_rows
    from phi3v.loading import load_processor

    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HUB / name, tmp_path / name)
    processor = load_processor(tmp_path, num_crops=1)
    options = RowOptions(prompt="Which colour?", answer="red")
    row = load_rows(str(write_photos(tmp_path / "photos", 1)), options=options)[0][0]
    example = encode(row, processor)
    trained = example["labels"][example["labels"] != -100].tolist()
    assert trained == [2654, 32007, 29871, 13, 32000]
    assert processor.stop_token_ids == [2, 32000, 32007]
