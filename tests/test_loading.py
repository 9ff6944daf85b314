"""Loading: what is strict, what a TARGET may be, and that an adapter comes back tensor by tensor."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from phi3v import adapters, loading, targets, tuning
from phi3v.demo import tiny_model_path
from phi3v.errors import CheckpointError, ConfigError, DeviceError, MissingPackageError
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_every_weight_equals_the_file(model_folder: Path) -> None:
    model = loading.load_base(model_folder, device="cpu")
    stored = load_file(model_folder / "model.safetensors")
    loaded = model.state_dict()
    assert set(stored) == set(loaded)
    for name, tensor in stored.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert not model.training and model.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "1 missing (model.norm.weight)"),
        (lambda weights: weights.update({"model.extra": torch.zeros(2)}), "1 surplus (model.extra)"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(7)}),
            "1 misshapen (model.norm.weight (7,) for (32,))",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(model_folder: Path, change, expected: str) -> None:
    weights = load_file(model_folder / "model.safetensors")
    change(weights)
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        loading.load_base(model_folder)
    assert expected in one_line(error)


def test_another_model_type_is_refused_before_its_weights_are_read(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="of model type 'llama', phi3v loads 'phi3_v'") as error:
        loading.load_base(model_folder)
    one_line(error)


def test_a_shard_cut_short_and_a_missing_shard_are_one_line(model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:30], "model-00002-of-00002.safetensors": names[30:]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, model_folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_folder / "model.safetensors").unlink()
    loading.load_base(model_folder)

    second = model_folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for size in (len(whole) - 10, 100, 4, 0):
        second.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="00002-of-00002.*copy it again"):
            loading.load_base(model_folder)
    second.unlink()
    with pytest.raises(CheckpointError, match="cannot read .*00002-of-00002"):
        loading.load_base(model_folder)
    save_file({names[30]: weights[names[30]]}, second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks"):
        loading.load_base(model_folder)


def test_places_that_hold_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist .looked in "):
        targets.resolve_target(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run"):
        targets.resolve_target(tmp_path)
    with pytest.raises(CheckpointError, match="^no-such-model does not exist .* a hub id .OWNER/NAME.$"):
        targets.resolve_target("no-such-model")  # without asking the hub, whose names are OWNER/NAME
    with pytest.raises(CheckpointError, match="could not be read from the hub"):
        loading.load_base("somebody/no-such-model-anywhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        loading.load_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3_v"}')
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor"):
        loading.load_base(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_line(model_folder: Path) -> None:
    with pytest.raises(DeviceError, match="sees no GPU") as error:
        loading.load_base(model_folder, device="cuda")
    one_line(error)
    with pytest.raises(ConfigError, match="names no device"):
        loading.load_base(model_folder, device="gpu")
    assert loading.resolve_device("auto") == torch.device("cpu")


def test_quantization_options_are_checked_and_the_package_is_named(model_folder: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="did you mean load_in_4bit"):
        loading.quantization_config({"load_in_4bits": True}, torch.float32)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "phi3v\[quantization\]"'):
        loading.load_base(model_folder, quantization={"load_in_4bit": True})


def test_lora_sits_on_the_language_model_alone(model_folder: Path) -> None:
    tuned = tuning.attach_lora(loading.load_base(model_folder), {"r": 4})
    names = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    wanted = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.default.weight"
        for layer in range(2)
        for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        for side in "AB"
    }
    assert set(names) == wanted
    report = tuning.trainable_report(tuned)
    # A [4, in] and B [out, 4] of 32->96, 32->32, 32->128 and 64->32, in two layers
    assert report.parts["language model"].trainable == 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (64 + 32))
    assert report.parts["projector"].trainable == report.parts["vision tower"].trainable == 0
    assert report.share == pytest.approx(report.trainable / report.total)


def test_an_adapter_names_its_base_by_a_path_that_holds_anywhere(
    model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    tuned = tuning.attach_lora(loading.load_base(model_folder.name), {"r": 4})
    tuned.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model_folder.resolve())


def test_whole_parts_trained_under_lora_are_counted_once(model_folder: Path) -> None:
    base = loading.load_base(model_folder)
    sizes = {part: count.total for part, count in tuning.trainable_report(base).parts.items()}
    report = tuning.trainable_report(tuning.attach_lora(base, {"r": 4}, tower="train", projector="train"))
    for part in ("projector", "vision tower"):
        assert report.parts[part].total == sizes[part]
        assert 0 < report.parts[part].trainable < sizes[part]  # separators, and what the tower holds behind its output


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_base_in_four_bits_trains_lora() -> None:
    # the test models' matrices are smaller than a block of the 4-bit kernels; the demo's model is large enough
    base = loading.load_base(
        tiny_model_path(), quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, device="cpu"
    )
    tuned = tuning.attach_lora(base, {"r": 4})
    kinds = {name: type(module).__name__ for name, module in tuned.named_modules()}
    quantized = {name for name, kind in kinds.items() if "4bit" in kind}
    assert any("qkv_proj" in name for name in quantized)
    assert not any("vision_embed_tokens" in name or "lm_head" in name for name in quantized)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.inference_mode():  # from which on some CPUs' own layout of the weights lets no gradient through
        expected = tuned.eval()(input_ids=ids, labels=ids).loss
    loss = tuned.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.clone(), rtol=1e-5, atol=0)
    gradients = [weight.grad for name, weight in tuned.named_parameters() if "lora_" in name and "lora_A" not in name]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("targets_given", "expected"),
    [
        (["q_proj", "v_proj"], r"'q_proj' and 'v_proj' hit only the vision part \(\d+ modules\); "),
        (["qkv_proj", "query"], "'query' hits no module; "),
        (["query", "foo", "q_proj"], r"'foo' and 'query' hit no module, 'q_proj' hits only the vision part \(\d+ mod"),
        (".*proj", "hits also the vision part"),
    ],
)
def test_lora_targets_that_miss_the_language_model_name_the_real_ones(
    model_folder: Path, targets_given, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        tuning.attach_lora(loading.load_base(model_folder), {"target_modules": targets_given})
    assert "qkv_proj, o_proj, gate_up_proj, down_proj" in one_line(error)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(
            ({"init_lora_weights": way}, f"lora.init_lora_weights is '{way}', which needs a pass over the rows before")
            for way in ("eva", "EVA", "lora_ga", "corda")
        ),
        ({"use_qalora": True}, "lora.use_qalora is for bases in GPTQ's format, .*: take it out"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "lora.layer_replication makes a model that answers otherwise"),
        ({"megatron_config": {"a": 1}}, "lora.megatron_config is for Megatron-LM's parallel layers"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "lora.runtime_config is for one that calls peft himself"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, ".*: write model.embed_tokens"),
        ({"rank_pattern": ["o_proj"]}, r"lora.rank_pattern is \['o_proj'\], allowed is a mapping .*, {o_proj: 8}"),
        ({"rank_pattern": {"o_proj": 0}}, "lora.rank_pattern: that of 'o_proj' is 0, allowed is a whole number"),
    ],
)
def test_what_would_do_nothing_is_refused_before_anything_is_loaded(options: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}") as error:
        tuning.lora_config(options)
    one_line(error)
    tuning.lora_config({"use_qalora": False, "megatron_config": None, "init_lora_weights": "olora"})


def test_what_fits_no_module_is_refused(model_folder: Path) -> None:
    base, first = loading.load_base(model_folder), "layers.0.self_attn.o_proj"
    for options, expected in (
        (
            {"alpha_pattern": {"o_proj": 1, "q_proj": 8}},
            "alpha_pattern: 'q_proj' fits no module; LoRA is on down_proj, ",
        ),
        (
            {"rank_pattern": {"o_proj": 2, first: 8}},
            f"rank_pattern: '{first}' fits no module that an entry before it le",
        ),
        (
            {"rank_pattern": {"layers.1.mlp": 2}, "layers_to_transform": 0},
            "rank_pattern: 'layers.1.mlp' fits no module;",
        ),
        (
            {"layers_to_transform": [0, 2]},
            "layers_to_transform: 2 is no layer of the language model, which has 2: from 0",
        ),
        ({"layers_to_transform": ["last"]}, "layers_to_transform: 'last' is no layer of the language model"),
        ({"layers_to_transform": [0], "layers_pattern": "block"}, "layers_pattern: 'block' is no list of layers; take"),
    ):
        with pytest.raises(ConfigError, match=f"^lora.{expected}") as error:
            tuning.attach_lora(base, options)
        one_line(error)
    fitting = {"r": 4, "rank_pattern": {"fc1": 3, "layers.0.mlp.*": 2}, "layers_to_transform": 0}
    tuned = tuning.attach_lora(base, fitting, tower="lora")
    ranks = {name: len(weight) for name, weight in tuned.named_parameters() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "layers.0.mlp" in name and "vision" not in name} == {2}
    assert {rank for name, rank in ranks.items() if "fc1" in name} == {3}
    assert {rank for name, rank in ranks.items() if "self_attn" in name} == {4}


def test_an_unknown_lora_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="lora.lora_alfa is no option: did you mean lora_alpha"):
        tuning.lora_config({"lora_alfa": 4})


def test_full_tuning_leaves_what_nobody_reads_frozen(model_folder: Path) -> None:
    model = loading.load_base(model_folder)
    tuning.freeze(model, language_model=True, tower="train", projector="frozen")
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    tower = "model.vision_embed_tokens.img_processor.vision_model"
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith((f"{tower}.encoder.layers.2.", f"{tower}.post_layernorm."))
        or ("vision_embed_tokens" in name and "img_processor" not in name)
    }
    assert frozen == expected and len(expected) == 16 + 2 + 6


@pytest.mark.parametrize("vision", ["frozen", "train"])
def test_an_adapter_comes_back_and_goes_off(model_folder: Path, tmp_path: Path, vision: str) -> None:
    from peft import get_peft_model_state_dict

    tuned = tuning.attach_lora(loading.load_base(model_folder, device="cpu"), {"r": 4}, tower=vision, projector=vision)
    torch.manual_seed(3)
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder.resolve())

    place = targets.resolve_target(tmp_path / "adapter")
    assert (place.kind, place.base) == ("adapter", str(model_folder.resolve()))
    again = adapters.load_adapter(loading.load_base(place.base, device="cpu"), place)
    stored = get_peft_model_state_dict(tuned)
    for name, tensor in get_peft_model_state_dict(again).items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)

    pixels, sizes = torch.randn(1, 2, 3, 336, 336), torch.tensor([[336, 336]])
    ids = torch.tensor([[1, *[754] * 313, 20, 21]])
    batch = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
    base = loading.load_base(model_folder, device="cpu")
    with torch.no_grad():
        expected, with_adapter, direct = base(**batch).logits, again(**batch).logits, tuned.eval()(**batch).logits
        with adapters.base_weights(again):
            without = again(**batch).logits
    torch.testing.assert_close(with_adapter, direct, rtol=0, atol=0)
    torch.testing.assert_close(without, expected, rtol=0, atol=0)
    assert not torch.allclose(with_adapter, expected, atol=1e-3)
    with pytest.raises(CheckpointError, match="does not hold its base"), adapters.base_weights(base):
        pass


def test_an_adapter_that_does_not_fit_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    tuned = tuning.attach_lora(loading.load_base(model_folder), {"r": 4})
    tuned.save_pretrained(tmp_path / "adapter")
    weights_file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(weights_file)
    weights.pop(sorted(weights)[0])
    save_file(weights, weights_file)
    place = targets.resolve_target(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not fit .*missing in the file") as error:
        adapters.load_adapter(loading.load_base(place.base, device="cpu"), place)
    one_line(error)
    wider = write_tiny_model(tmp_path / "wider", intermediate_size=128)
    with pytest.raises(CheckpointError, match="does not fit"):
        adapters.load_adapter(loading.load_base(wider), place)
    config_file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/folder"}))
    with pytest.raises(CheckpointError, match="which is not here"):
        targets.resolve_target(tmp_path / "adapter")


def test_a_run_resolves_to_what_it_holds(model_folder: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(Recipe.from_dict({"model": str(model_folder), "data": "rows.jsonl", "output": str(run.path)}))
    with pytest.raises(CheckpointError, match="holds no tuned weights yet"):
        targets.resolve_target(run.path)
    tuned = tuning.attach_lora(loading.load_base(model_folder), {"r": 2})
    run.write_adapter(tuned.save_pretrained)
    place = targets.resolve_target(run.path)
    assert (place.kind, place.adapter, place.base) == ("run", run.adapter, str(model_folder.resolve()))


def test_a_budget_of_tokens_decides_the_number_of_crops(model_folder: Path) -> None:
    def crops(**options: object) -> int:
        return loading.load_processor(model_folder, **options).image_processor.num_crops

    assert crops(num_crops=16, max_image_tokens=781) == 4 and crops(num_crops=16, max_image_tokens=780) == 3
    assert crops(num_crops=2, max_image_tokens=2653) == 2 and crops(num_crops=16, max_image_tokens=5000) == 16
    assert crops() == 1 and crops(max_image_tokens=2653) == 16 and crops(max_image_tokens=469) == 2
    with pytest.raises(ConfigError, match="image.max_tokens is 312, and no image costs less than 313 tokens"):
        crops(max_image_tokens=312)


def test_fast_is_kept_with_the_processor_until_it_is_replaced(model_folder: Path) -> None:
    options = Recipe.from_dict({"model": "m", "data": "d", "image": {"fast": True}}).image.processor_options
    assert options == {"num_crops": None, "max_image_tokens": None, "fast": True}
    processor = loading.load_processor(model_folder, **options)
    assert processor.image_processor.fast is True
    processor.save_pretrained(model_folder)
    assert json.loads((model_folder / "preprocessor_config.json").read_text())["fast"] is True
    assert loading.load_processor(model_folder).image_processor.fast is True
    assert loading.load_processor(model_folder, fast=False).image_processor.fast is False
