"""What lies in a folder of merged weights is what readers of Microsoft's checkpoints ask for, and answers the same."""

import json
import re
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_models import tiny_config, write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

import phi3v
from phi3v.demo import tiny_model_path
from phi3v.export import vllm
from phi3v.export.run import export
from phi3v.generate import ChatModel
from phi3v.image_tokens import num_image_tokens
from phi3v.loading import load_processor
from phi3v.model.configuration_phi3_v import CLIP_VIT_LARGE_336, Phi3VConfig
from phi3v.targets import tensor_shapes

MODELS = ("Phi-3-vision-128k-instruct", "Phi-3.5-vision-instruct")
NARROW = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 24, "long_factor": [2.0] * 24},
    "img_processor": {"image_dim_out": 16},
    "vision_config": {**CLIP_VIT_LARGE_336, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
}
"""What is smaller than in Microsoft's models: the tower has all its 24 layers, each tensor its name."""
VLLM = {
    "model.vision_embed_tokens.wte": "embed_tokens",
    "model.vision_embed_tokens.": "vision_embed_tokens.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
"""`Phi3VForCausalLM.hf_to_vllm_mapper` of vLLM 0.33.0 (Apache 2.0), vllm/model_executor/models/phi3v.py."""


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A tuned model of Microsoft's names, narrow, exported in bfloat16."""
    folder = tmp_path_factory.mktemp("layout")
    write_tiny_model(folder / "model", **NARROW)
    run = make_run(folder, make_recipe(folder))
    export(run.path, folder / "merged", to="merged", dtype="bfloat16", shard_bytes=200_000)
    return folder / "merged"


def names_of(folder: Path) -> list[str]:
    return sorted(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def test_the_names_are_microsofts(merged: Path, shared: Path) -> None:
    """Those of the published index, but for the number of layers."""
    published = json.loads((shared / "phi3v" / "hub" / MODELS[0] / "model.safetensors.index.json").read_text())
    beyond = re.compile(r"model\.layers\.(?!0\.|1\.)")
    assert names_of(merged) == sorted(name for name in published["weight_map"] if not beyond.match(name))


@pytest.mark.parametrize("name", MODELS)
def test_config_and_processor_are_microsofts_flat_files(name: str, shared: Path, tmp_path: Path) -> None:
    """Of a base with the published files and few, narrow layers: every published value that is no matter of size."""
    hub = shared / "phi3v" / "hub" / name
    published = json.loads((hub / "config.json").read_text())
    sizes = {key: value for key, value in NARROW.items() if key != "rope_scaling"}
    base = tmp_path / name  # by which the repository is known
    transformers.utils.logging.disable_progress_bar()
    own = {**published, **sizes, "hidden_size": 96, "vision_config": NARROW["vision_config"]}
    for key in ("auto_map", "_name_or_path", "_attn_implementation", "transformers_version"):
        own.pop(key, None)
    own["img_processor"] = {**published["img_processor"], "image_dim_out": 16}
    torch.manual_seed(0)
    module = import_module("phi3v.model.modeling_phi3_v")
    module.Phi3VForCausalLM(module.Phi3VConfig(**own)).bfloat16().save_pretrained(base)
    for file in hub.iterdir():
        if file.name not in ("config.json", "model.safetensors.index.json"):
            (base / file.name).write_bytes(file.read_bytes())
    (base / "config.json").write_text(json.dumps({**own, "auto_map": published["auto_map"]}))
    found = export(base, tmp_path / "merged", to="merged")
    assert found.base == f"microsoft/{name}" and found.facts["dtype"] == "bfloat16"
    assert vllm.Serving.of(published, {}) == vllm.Serving() and found.vllm is None  # which is narrow here
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    differ = {key for key in published if config.get(key) != published[key]}
    assert differ == {
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
        *("img_processor", "transformers_version", "auto_map"),
        *({"_name_or_path", "_attn_implementation"} & {*published}),
    }
    assert config["rope_scaling"]["type"] == "su" and config["architectures"] == ["Phi3VForCausalLM"]
    code = f"microsoft/{name}--"
    assert config["auto_map"] == {auto: code + value for auto, value in published["auto_map"].items()}
    images = json.loads((hub / "preprocessor_config.json").read_text())
    written = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert written == {**written, **images, "auto_map": {auto: code + at for auto, at in images["auto_map"].items()}}
    pieces = [load_processor(place).tokenizer("A  red scarf, 470 €\n<|end|>").input_ids for place in (base, found.out)]
    assert pieces[0] == pieces[1]
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, 32000, 32007]
    phi3v.register()
    for auto in (transformers.AutoProcessor, transformers.AutoConfig):
        assert type(auto.from_pretrained(found.out)).__module__.startswith("phi3v.")  # nobody asks for remote code


def vllm_name(name: str) -> str:
    """As vLLM's mapper does: the first prefix that fits."""
    start = next(start for start in VLLM if name.startswith(start))
    return VLLM[start] + name.removeprefix(start)


def test_the_names_are_those_that_vllm_loads(merged: Path) -> None:
    """Modules of vLLM 0.33.0's Phi3VForCausalLM: Llama's layers with fused projections, CLIP with all its layers."""
    layer = ["input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"]
    layer += ["mlp.gate_up_proj", "mlp.down_proj"]
    text = ["embed_tokens.weight", "norm.weight", *(f"layers.{at}.{one}.weight" for at in (0, 1) for one in layer)]
    both = [f"img_projection.{at}.{kind}" for at in (0, 2) for kind in ("weight", "bias")]
    tower = ["embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    norms = [
        "pre_layrnorm",
        "post_layernorm",
        *(f"encoder.layers.{at}.layer_norm{n}" for at in range(24) for n in "12"),
    ]
    parts = [*(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    norms += [f"encoder.layers.{at}.{part}" for at in range(24) for part in parts]
    tower += [f"{name}.{kind}" for name in norms for kind in ("weight", "bias")]
    wanted = {"language_model.lm_head.weight", *(f"language_model.model.{name}" for name in text)}
    wanted |= {f"vision_embed_tokens.{name}" for name in ("glb_GN", "sub_GN", *both)}
    wanted |= {f"vision_embed_tokens.img_processor.vision_model.{name}" for name in tower}
    assert {vllm_name(name) for name in names_of(merged)} == wanted
    width = NARROW["hidden_size"]
    shapes = {name: shape for file in merged.glob("*.safetensors") for name, shape in tensor_shapes(file).items()}
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (3 * width, width)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (2 * NARROW["intermediate_size"], width)
    assert shapes["model.vision_embed_tokens.glb_GN"] == (1, 1, 64)
    assert shapes["model.vision_embed_tokens.sub_GN"] == (1, 1, 1, 64)


def test_config_and_processor_hold_what_vllm_reads(merged: Path) -> None:
    """What vLLM 0.33.0's phi3v.py takes from the configuration, and asks of the processor, in its own words."""
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["Phi3VForCausalLM"] and config["rope_scaling"]["type"] == "su"
    assert {*config["img_processor"]} >= {"image_dim_out", "num_img_tokens"}
    assert config["img_processor"].get("layer_idx", -2) == -2
    assert config["img_processor"].get("type_feature", "patch") == "patch"
    assert config["embd_layer"]["use_hd_transform"] and config["embd_layer"]["with_learnable_separator"]
    assert config["embd_layer"]["hd_transform_order"] == "sub_glb"
    processor = load_processor(merged)
    assert processor.img_tokens[:2] == ["<|image_1|>", "<|image_2|>"] and processor.img_tokens[7] == "<|image_8|>"
    for width, height in ((50, 8000), (336, 336), (640, 480)):  # the first is the image that it plans memory with
        count = processor.calc_num_image_tokens_from_image_size(width=width, height=height)
        made = processor(text=processor.img_tokens[0], images=[Image.new("RGB", (width, height))], return_tensors="pt")
        assert count == num_image_tokens(width, height, processor.image_processor.num_crops)
        assert (made["input_ids"] == processor.image_token_id).sum() == count
        assert {*made} == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
        assert made["pixel_values"].shape[2:] == (3, 336, 336) and made["image_sizes"].shape == (1, 2)


def test_vllm_finds_the_registration_by_itself() -> None:
    """The entry point of the project, and what it names."""
    root = Path(phi3v.__file__).parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    point = metadata.EntryPoint("phi3v", points["phi3v"], "vllm.general_plugins")
    assert point.load() is phi3v.register


@pytest.mark.parametrize(
    ("there", "says"),
    [(None, "not run here"), ("0.33.0", "0.33, which is installed"), ("0.9.1", "0.9.1 is installed: it may ask for")],
)
def test_the_command_for_vllm_says_which_version_was_read(there: str | None, says: str, monkeypatch) -> None:
    def version(name: str) -> str:
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(vllm.metadata, "version", version)
    assert says in vllm.version_note()
    original = Phi3VConfig().original_max_position_embeddings  # beyond it vLLM gives every request rope's long factors
    assert vllm.Serving().command("a b").startswith(f"vllm serve 'a b' --max-model-len {original} ")


def test_a_pipeline_answers_as_phi3v_ask_does(tmp_path: Path) -> None:
    """Of merged weights, greedily: one image, several, several turns, none; and the run itself says the same."""
    write_photos(tmp_path / "photos", 4)
    recipe = make_recipe(tmp_path, model=str(tiny_model_path()))
    run = make_run(tmp_path, recipe)
    export(run.path, tmp_path / "merged", to="merged")
    chat, tuned = ChatModel.from_target(tmp_path / "merged"), ChatModel.from_target(run.path)
    phi3v.register()
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path / "merged"))
    photos = [str(tmp_path / "photos" / f"{number}.png") for number in range(3)]
    longest: dict[str, Any] = {"max_new_tokens": 12}
    for images in (photos[:1], photos, []):
        said = chat.ask(images, "What is shown?", **longest)
        parts = [{"type": "image", "path": image} for image in images] + [{"type": "text", "text": "What is shown?"}]
        turns = [{"role": "user", "content": parts}]
        assert piped(pipe, turns) == said == tuned.ask(images, "What is shown?", **longest)
        turns += [{"role": "assistant", "content": [{"type": "text", "text": said}]}]
        turns += [{"role": "user", "content": [{"type": "text", "text": "And its price?"}]}]
        opened = [
            {**turn, "content": [_opened(part) for part in turn["content"]]}  # as phi3v takes them
            for turn in turns
        ]
        assert [piped(pipe, turns)] == chat.answer([opened], **longest) == tuned.answer([opened], **longest)


def test_a_pipeline_answers_beyond_the_original_context_as_phi3v_ask_does(tmp_path: Path) -> None:
    """A prompt in rope's long factors, and an answer that crosses into them; the context here is short, for speed."""
    limit = 400
    write_tiny_model(tmp_path / "model", original_max_position_embeddings=limit)
    write_photos(tmp_path / "photos", 1)
    export(tmp_path / "model", tmp_path / "merged", to="merged")
    chat, photo = ChatModel.from_target(tmp_path / "merged"), tmp_path / "photos" / "0.png"
    phi3v.register()
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path / "merged"))
    shown = {"type": "image", "image": Image.open(photo)}
    lengths = []
    for repeats in (60, 35):
        asked = {"type": "text", "text": "a " * repeats}
        lengths.append(len(chat.encode([{"role": "user", "content": [shown, asked]}])["input_ids"]))
        turns = [{"role": "user", "content": [{"type": "image", "path": str(photo)}, asked]}]
        answer = chat.ask(photo, asked["text"], max_new_tokens=12)
        assert piped(pipe, turns) == answer and len(answer) > 12, lengths
    assert limit < lengths[0] and limit - 8 < lengths[1] <= limit


def _opened(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": Image.open(part["path"])} if part["type"] == "image" else part


def piped(pipe: Any, turns: list[dict[str, Any]]) -> str:
    """Its answer; it cuts the prompt off a text of both, so the space in front of the first word stays."""
    answer = pipe(text=turns, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    return answer.removeprefix(" ")


def test_a_config_stays_in_this_form() -> None:
    """The tiny one of the tests has an su rope to begin with."""
    assert tiny_config().to_dict()["rope_scaling"]["type"] == "su"
