"""Checkpoints in Microsoft's layout: read tensor by tensor without their code, written back as they were."""

import builtins
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from golden_models import FROZEN, golden_set, tiny_model
from safetensors.torch import load_file, save_file
from tiny_prompts import prompt
from tiny_tokenizer import build_tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from phi3v.model.configuration_phi3_v import CLIP_VIT_LARGE_336, Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.model.register import register

HUB = ("Phi-3-vision-128k-instruct", "Phi-3.5-vision-instruct")
AUTO_MAP = {
    "AutoConfig": "configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
}
PROCESSOR_MAP = {
    "AutoImageProcessor": "image_processing_phi3_v.Phi3VImageProcessor",
    "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def registered_and_never_asked(monkeypatch):
    """Registers, and makes a question at the terminal a failure."""
    register()

    def refuse(*args):
        raise AssertionError(f"the user was asked: {args}")

    monkeypatch.setattr(builtins, "input", refuse)


def poison(folder: Path) -> None:
    """Remote code that fails when it is imported, in place of Microsoft's."""
    for name in ("configuration", "modeling", "processing", "image_processing", "image_embedding"):
        (folder / f"{name}_phi3_v.py").write_text("raise RuntimeError('remote code was run')\n")


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], name: str = "tiny_phi3v") -> Path:
    """A folder as on the hub: flat config with `auto_map`, two shards and their index, processor files, remote code."""
    folder.mkdir(parents=True)
    fields = json.loads((FROZEN / "models" / name / "config.json").read_text())
    vision = json.loads((FROZEN / "models" / name / "vision_config.json").read_text())
    flash = {"auto_map": AUTO_MAP, "torch_dtype": "bfloat16", "experts_implementation": "somebody/kernel"}
    flash |= {"_attn_implementation": "flash_attention_2", "attn_implementation": "somebody/kernel"}
    vision |= {"attn_implementation": "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps({**fields, **flash, "vision_config": vision}))
    names = sorted(weights)
    weight_map = {key: SHARDS[position * 2 // len(names)] for position, key in enumerate(names)}
    for shard in SHARDS:
        save_file({key: weights[key] for key in names if weight_map[key] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    poison(folder)
    build_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoProcessor": PROCESSOR_MAP["AutoProcessor"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    preprocessor = {"image_processor_type": "Phi3VImageProcessor", "num_crops": 4, "auto_map": PROCESSOR_MAP}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return golden_set().weights("tiny_phi3v")


@pytest.fixture
def folder(tmp_path, weights) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", weights)


def assert_equal_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_loaded_weights_equal_the_files_and_remote_code_is_never_run(folder, weights, auto, trust):
    options = {} if trust is None else {"trust_remote_code": trust}
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert type(model) is Phi3VForCausalLM and type(model.config) is Phi3VConfig
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_equal_tensors(model.state_dict(), weights)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"


def test_an_attention_is_the_callers_choice_and_not_a_files(folder):
    """The folder names flash attention and a kernel of the hub, for itself and for its tower."""
    for loaded in (AutoConfig.from_pretrained(folder), Phi3VConfig.from_json_file(folder / "config.json")):
        assert loaded._attn_implementation is None and loaded.vision_config._attn_implementation is None
    chosen = AutoConfig.from_pretrained(folder, attn_implementation={"": "eager"})
    assert (chosen._attn_implementation, chosen.vision_config._attn_implementation) == ("eager", None)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, attn_implementation="eager")
        tower = model.model.vision_embed_tokens.img_processor.vision_model
        assert model.config._attn_implementation == tower.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_weights_in_the_dtype_that_was_asked_for(folder, weights, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_equal_tensors(model.state_dict(), {key: value.to(dtype) for key, value in weights.items()})
    reference = tiny_model()
    buffers = dict(model.named_buffers())
    for key, value in reference.named_buffers():
        assert torch.equal(buffers[key].to(value.dtype), value.to(buffers[key].dtype).to(value.dtype)), key
    assert model.model.rotary_emb.long_inv_freq.dtype == torch.float32, "rope stays in float32"


@pytest.mark.parametrize("trust", [None, True])
def test_config_and_processors_load_without_remote_code(folder, trust):
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(folder, **options)) is Phi3VConfig
    processor = AutoProcessor.from_pretrained(folder, **options)
    assert type(processor) is Phi3VProcessor
    image_processor = AutoImageProcessor.from_pretrained(folder, **options)
    assert type(image_processor) is type(processor.image_processor) and image_processor.num_crops == 4
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    probe = "<|user|>\nwhat is  this?<|end|>\n<|assistant|>\n"
    expected = build_tokenizer()(probe)["input_ids"]
    assert tokenizer(probe)["input_ids"] == processor.tokenizer(probe)["input_ids"] == expected


@pytest.mark.parametrize("trust", [None, True])
def test_pipelines_ask_nothing_and_run_nothing(folder, monkeypatch, trust):
    """transformers swallows what goes wrong with an optional part, so questions and planted code leave a trace here."""
    asked: list[tuple] = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "n")
    (folder / "custom_generate").mkdir()
    for planted in ("processing_phi3_v", "image_processing_phi3_v", "pipeline_phi3_v", "custom_generate/generate"):
        trace = f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\nraise RuntimeError\n"
        (folder / f"{planted}.py").write_text(trace)
    config = json.loads((folder / "config.json").read_text())
    own = {"image-text-to-text": {"impl": "pipeline_phi3_v.P", "pt": ["AutoModelForCausalLM"], "type": "multimodal"}}
    (folder / "config.json").write_text(json.dumps({**config, "custom_pipelines": own}))
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=trust)
    assert type(pipe).__module__ == "transformers.pipelines.image_text_to_text"
    assert type(pipe.model) is Phi3VForCausalLM and type(pipe.processor) is Phi3VProcessor
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert model.generate.__func__ is Phi3VForCausalLM.generate, "the folder has a generate of its own"
    with pytest.raises(OSError, match="code of a repository is not run .*; pass the function itself$"):
        model.generate(torch.tensor([[1]]), custom_generate=str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match="it has no video processor$"):
        AutoVideoProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert not asked and not (folder / "ran").exists()


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize("name", HUB)
def test_the_hub_files_load_without_remote_code(shared, tmp_path, name, trust):
    """The real small files, with code that would fail beside them; the ids are those of the real tokenizer."""
    folder = tmp_path / name
    shutil.copytree(shared / "phi3v" / "hub" / name, folder)
    folder.chmod(0o755)
    poison(folder)
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(folder, **options)) is Phi3VConfig
    processor = AutoProcessor.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    ids = [1, 32010, 29871, 13, 1576, 29973, 32007, 29871, 13, 32001]
    probe = "<|user|>\nThe?<|end|>\n<|assistant|>\n"
    assert tokenizer(probe)["input_ids"] == processor.tokenizer(probe)["input_ids"] == ids
    assert AutoImageProcessor.from_pretrained(folder, **options).num_crops == (4 if "3.5" in name else 16)


def test_saved_and_loaded_again(folder, weights, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert_equal_tensors(load_file(tmp_path / "saved" / "model.safetensors"), weights)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert_equal_tensors(again.state_dict(), weights)
    one = prompt(0, [3, 4], [(1, 1)])
    with torch.no_grad():
        assert torch.equal(model(**one).logits, again(**one).logits)


def test_saved_in_shards(folder, weights, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys() and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in weights.values())
    assert_equal_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), weights)


# ---- what does not fit ----


def test_missing_surplus_and_misshapen_weights_are_named(tmp_path, weights):
    del weights["model.layers.1.mlp.down_proj.weight"]
    weights["model.surplus.weight"] = torch.zeros(3)
    weights["model.vision_embed_tokens.sub_GN"] = torch.zeros(1, 1, 1, 255, dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "checkpoint", weights)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    _, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert set(info["missing_keys"]) == {"model.layers.1.mlp.down_proj.weight"}
    assert set(info["unexpected_keys"]) == {"model.surplus.weight"}
    assert [entry[0] for entry in info["mismatched_keys"]] == ["model.vision_embed_tokens.sub_GN"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_second_name_of_the_embeddings_is_ignored(tmp_path, weights, caplog):
    """Fine-tunes saved with shared tensors hold `wte`, old CLIP files `position_ids`: neither is a surplus weight."""
    expected = dict(weights)
    weights["model.vision_embed_tokens.wte.weight"] = weights["model.embed_tokens.weight"].clone()
    tower = "model.vision_embed_tokens.img_processor.vision_model"
    weights[f"{tower}.embeddings.position_ids"] = torch.arange(577)[None]
    folder = write_checkpoint(tmp_path / "checkpoint", weights)
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert "wte" not in caplog.text and "position_ids" not in caplog.text
    assert_equal_tensors(model.state_dict(), expected)


def test_missing_weights_alone_are_initialised(tmp_path, weights):
    """Init is guarded: what came from the file stays, what is missing is drawn, and nothing is left uninitialised."""
    removed = [key for key in weights if "layers.0" in key or key.endswith("_GN") or "class_embedding" in key]
    kept = {key: value for key, value in weights.items() if key not in removed}
    folder = write_checkpoint(tmp_path / "checkpoint", kept)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded = model.state_dict()
    assert set(info["missing_keys"]) == set(removed)
    assert_equal_tensors({key: loaded[key] for key in kept}, kept)
    for key in removed:
        assert loaded[key].isfinite().all(), key
        assert loaded[key].float().std() < 1.0 if "norm" not in key else True, key
    for key in ("glb_GN", "sub_GN"):
        assert 0.01 < loaded[f"model.vision_embed_tokens.{key}"].float().std() < 0.03


def test_a_new_model_is_initialised_throughout():
    torch.manual_seed(0)
    model = Phi3VForCausalLM(golden_set().config("tiny_phi3v"))
    for key, value in model.state_dict().items():
        assert value.isfinite().all() and value.abs().max() < 5, key
        if not key.endswith("bias"):
            assert value.abs().max() > 0, key
    assert torch.equal(model.model.rotary_emb.short_inv_freq, tiny_model().model.rotary_emb.short_inv_freq)


# ---- the real models ----


def published_config() -> dict:
    """The fields of the published files (one shape for both siblings); the tiny model has real rope factors."""
    tiny = json.loads((FROZEN / "models" / "tiny_phi3v" / "config.json").read_text())
    sizes = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "pad_token_id": 32000,
    }
    sizes |= {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "sliding_window": 131072,
    }
    sizes["img_processor"] = {**tiny["img_processor"], "image_dim_out": 1024}
    return {**tiny, **sizes, "original_max_position_embeddings": 4096}


def test_the_published_architecture_has_the_published_size():
    config = Phi3VConfig.from_dict(published_config())
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 592
    assert sum(value.numel() for value in model.state_dict().values()) == 4_146_621_440
    assert shapes["model.layers.31.self_attn.qkv_proj.weight"] == [9216, 3072]
    assert shapes["model.vision_embed_tokens.sub_GN"] == [1, 1, 1, 4096]
    assert config.image_token_id == 32044 and config.eos_token_id == 2


@pytest.mark.parametrize("name", HUB)
def test_real_names_and_shapes_one_to_one(shared, name):
    config = AutoConfig.from_pretrained(shared / "phi3v" / "hub" / name)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    recorded = json.loads((shared / "phi3v" / "real_param_shapes.json").read_text())["shapes"]
    assert shapes == recorded
    index = shared / "phi3v" / "hub" / name / "model.safetensors.index.json"
    if name == HUB[0]:  # the sibling's folder has no index; its names are the same
        weight_map = json.loads(index.read_text())
        assert shapes.keys() == weight_map["weight_map"].keys()
        assert 2 * sum(value.numel() for value in model.state_dict().values()) == weight_map["metadata"]["total_size"]
    assert model.config._attn_implementation == "sdpa"


LOST = {"auto_map", "_attn_implementation", "_name_or_path"}  # remote code, a kernel, somebody's path
GAINED = {"image_token_id", "pad_token_id", "embd_pdrop", "resid_pdrop", "vision_config"}


def assert_same_file(original: dict, written: dict) -> None:
    for key, value in original.items():
        if key not in LOST | {"transformers_version"}:
            assert written[key] == value, key
    assert not LOST & written.keys()
    assert written.keys() - original.keys() <= GAINED | {"torch_dtype", "transformers_version"}
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}


@pytest.mark.parametrize("name", HUB)
def test_the_real_configs_survive_a_round_trip(shared, tmp_path, name):
    folder = shared / "phi3v" / "hub" / name
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    original = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert_same_file(original, written)
    assert "vision_config" not in written and written["rope_scaling"]["type"] == "su"
    assert written["sliding_window"] == (262144 if "3.5" in name else 131072)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("name", ["tiny_phi3v", "tiny_phi3v_long", "tiny_phi35v_long", "published"])
def test_configs_survive_a_round_trip(tmp_path, name):
    if name == "published":
        original = published_config()
    else:
        original = json.loads((FROZEN / "models" / name / "config.json").read_text())
        original["vision_config"] = json.loads((FROZEN / "models" / name / "vision_config.json").read_text())
    config = Phi3VConfig.from_dict(original)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    small = {key: written.get("vision_config", {}).get(key) for key in original.pop("vision_config", {})}
    assert_same_file(original, written)
    assert ("vision_config" in written) == (name != "published")
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    for key in CLIP_VIT_LARGE_336:
        expected = small.get(key) if small.get(key) is not None else CLIP_VIT_LARGE_336[key]
        assert getattr(again.vision_config, key) == expected, key
    assert again.rope_parameters == config.rope_parameters
    assert again.rope_parameters["rope_type"] == "longrope"
