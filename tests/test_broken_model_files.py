"""Model folders and adapters with one broken file: the line names the file, what is wrong, and the way out."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from phi3v import loading, tuning
from phi3v.errors import CheckpointError

Break = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole model, and an adapter on it."""
    folder = tmp_path_factory.mktemp("sound")
    write_tiny_model(folder / "model")
    tuned = tuning.attach_lora(loading.load_base(folder / "model"), {"r": 2})
    tuned.save_pretrained(folder / "adapter")
    return folder


def fields(name: str, **values: Any) -> Break:
    """Other values for some fields of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return change


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def header(content: bytes) -> Break:
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)


BROKEN: list[tuple[Break, str]] = [
    (
        fields("config.json", vocab_size=100),
        "config.json: pad_token_id is .*, which needs a larger vocab_size than 100",
    ),
    (fields("config.json", hidden_act="bogus"), "config.json: hidden_act is 'bogus', which transformers does not have"),
    (fields("config.json", rope_theta="x"), "config.json: rope_theta is 'x', allowed is a number above 0"),
    (
        fields("config.json", original_max_position_embeddings=0),
        "config.json: original_max_position_embeddings is 0, allowed is a whole number, 1 or more",
    ),
    (
        fields("config.json", img_processor={"layer_idx": -9}),
        "config.json: img_processor.layer_idx is -9, allowed is -4 to 3: the tower has 3 layers",
    ),
    (
        fields("config.json", vision_config={"image_size": 224, "hidden_size": 16}),
        "config.json: vision_config.image_size is 224 and patch_size 14, allowed are 336 and 14: .*; restore",
    ),
    (cut("tokenizer.json"), "tokenizer.json is not valid JSON"),
    (text("tokenizer.json", "{}"), "tokenizer.json holds no tokenizer .*: download it again"),
    (text("tokenizer_config.json", "[]"), "tokenizer_config.json holds a list where a JSON object belongs"),
    (text("preprocessor_config.json", "[]"), "preprocessor_config.json holds a list where a JSON object belongs"),
    (fields("preprocessor_config.json", num_crops="x"), "preprocessor_config.json.*num_crops.*'x'.*published"),
    (fields("preprocessor_config.json", num_crops=0), "preprocessor_config.json: num_crops is 0, allowed is a whole"),
    (fields("preprocessor_config.json", image_mean=[0.5]), "preprocessor_config.json: image_mean is .* three numbers"),
    (
        text("chat_template.jinja", "{% for part.type %}"),
        "chat_template.jinja: the chat template is broken, line 1: .*; download it again",
    ),
    (header(b'{"a": 5}'), "model.safetensors is not a whole safetensors file .*: copy it again"),
    (header(b"[5]"), "model.safetensors is not a whole safetensors file .*: copy it again"),
    (
        text("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": 5}}'),
        "model.safetensors.index.json places lm_head.weight in 5, which is no file: restore the file",
    ),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_file_of_a_model_is_named(sound: Path, tmp_path: Path, number: int) -> None:
    spoil, words = BROKEN[number]
    folder = tmp_path / "bad"
    shutil.copytree(sound / "model", folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        loading.load_target(folder, device="cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["BOGUS", None, 5])
def test_an_adapter_of_no_known_kind_is_named(sound: Path, tmp_path: Path, kind: Any) -> None:
    shutil.copytree(sound / "adapter", tmp_path / "adapter")
    fields("adapter_config.json", peft_type=kind)(tmp_path / "adapter")
    with pytest.raises(CheckpointError) as error:
        loading.load_target(tmp_path / "adapter", device="cpu")
    assert str(error.value) == (
        f"{tmp_path}/adapter/adapter_config.json: peft_type is {kind!r}, which is no kind of adapter that peft has "
        "(LORA for instance): copy the file again"
    )


def renamed(change: Callable[[str], str]) -> Break:
    """Other names for the tensors of an adapter."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            fields("adapter_config.json", r=4),
            "of two kinds: .* says r: 4, and the tensors of .* are of rank 2; copy both",
        ),
        (
            fields("adapter_config.json", r="2"),
            "config.json: r is '2', and a whole number belongs there: write one without q",
        ),
        (
            fields("adapter_config.json", lora_alpha=None),
            "lora_alpha is None, and a number belongs there: write one, o",
        ),
        (
            fields("adapter_config.json", rank_pattern={"o_proj": "2"}),
            "rank_pattern says '2' of 'o_proj', and a whole n",
        ),
        (
            fields("adapter_config.json", rank_pattern={"o_proj(": 2}),
            r"rank_pattern names .o_proj\(., which is no regular expression",
        ),
        (fields("adapter_config.json", use_dora=True), "says use_dora: true, and the tensors of .* are LoRA's; copy"),
        (
            fields("adapter_config.json", r=3, rank_pattern={"o_proj": 2}),
            r"says rank 3 of model.layers.0.*_proj \(r, rank_pattern\), and the tensors of .* are of rank 2 there",
        ),
        (fields("adapter_config.json", target_modules=5), "adapter does not fit .*model: 'int' object is not iterable"),
        (fields("adapter_config.json", peft_type="IA3"), "says peft_type: IA3, and the tensors of .* are LoRA's; copy"),
        (renamed(lambda name: f"module.{name}"), r"than PEFT \(module.base_model.*, where base_model.* as a raw state"),
        (
            renamed(lambda name: name.removeprefix("base_model.model.")),
            r"than PEFT \(model.layers.0.*, where base_model",
        ),
        (
            renamed(lambda name: name.replace(".weight", ".default.weight")),
            r"lora_A.default.weight, where .*_A.weight bel",
        ),
    ],
)
def test_an_adapter_whose_files_contradict_each_other_is_named(
    sound: Path, tmp_path: Path, spoil: Break, words: str
) -> None:
    shutil.copytree(sound / "adapter", tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=words) as error:
        loading.load_target(tmp_path / "adapter", device="cpu")
    assert str(tmp_path / "adapter") in str(error.value) and "\n" not in str(error.value)


def test_learned_prompts_answer_and_are_not_trained_on(sound: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(loading.load_base(sound / "model"), config).save_pretrained(tmp_path)
    assert loading.load_target(tmp_path, device="cpu").kind == "adapter"
    with pytest.raises(
        CheckpointError, match="of type PROMPT_TUNING: its learned prompts answer, and cannot be trained"
    ):
        loading.load_target(tmp_path, device="cpu", trainable=True)


def test_the_sound_ones_load(sound: Path) -> None:
    for name in ("model", "adapter"):
        assert loading.load_target(sound / name, device="cpu").kind == name
