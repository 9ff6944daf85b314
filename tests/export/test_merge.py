"""Merged weights answer as the adapter on its base does, whatever kind of adapter it is, and nothing else changes."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported_logits import logits
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model
from tiny_runs import make_recipe, make_run

from phi3v.demo import tiny_model_path
from phi3v.errors import CheckpointError, ConfigError
from phi3v.export.layout import plan_shards
from phi3v.export.run import export
from phi3v.loading import load_base, load_processor, load_target
from phi3v.tuning import attach_lora

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"options": {"r": 4}},
    "dora, rank-stabilised, ranks of their own": {
        "options": {"r": 4, "use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 2}}
    },
    "tower and projector under lora": {"options": {"r": 2}, "tower": "lora", "projector": "lora"},
    "tower, projector, head and embeddings whole": {
        "options": {"r": 2, "modules_to_save": ["lm_head", "embed_tokens"]},
        "tower": "train",
        "projector": "train",
    },
    "head and embeddings under lora": {"options": {"r": 2, "target_modules": ["qkv_proj", "lm_head", "embed_tokens"]}},
    "rows of the embedding": {
        "options": {"r": 2, "target_modules": ["qkv_proj"], "trainable_token_indices": {"model.embed_tokens": [5, 6]}}
    },
    "what it began with taken out of the base": {"options": {"r": 2, "init_lora_weights": "pissa"}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("merge") / "model")


def random_adapter(base: Path, folder: Path, quantization: dict[str, Any] | None = None, **choices: Any) -> Path:
    """An adapter on `base` none of whose weights is as it began."""
    model = load_base(base, device="cpu", quantization=quantization)
    tuned = attach_lora(model, choices.pop("options"), **choices)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    tuned.save_pretrained(folder)
    return folder


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Apart by what float32 rounds on the way: less than 1e-5 of the largest logit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_answer_as_the_adapter(kind: str, tmp_path: Path) -> None:
    """On trained weights: the logits of random ones are below 1, where a bound that is no share holds by itself.

    The weights are compared with a merge in float64, so that an error of the merge is not lost in that of the sums.
    """
    base = tiny_model_path()
    adapter = random_adapter(base, tmp_path / "adapter", **json.loads(json.dumps(ADAPTERS[kind])))
    export(adapter, tmp_path / "merged", to="merged", shard_bytes=500_000)
    tuned, merged = load_target(adapter, device="cpu"), load_target(tmp_path / "merged", device="cpu")
    expected = logits(tuned.model, tuned.processor)
    untuned = logits(load_base(base, device="cpu"), tuned.processor)
    assert expected.abs().max() > 20 and (expected - untuned).abs().max() > 1
    assert_same_logits(logits(merged.model, merged.processor), expected)
    exact = tuned.model.double().merge_and_unload().state_dict()
    for name, weight in merged.model.state_dict().items():
        most = 5e-7 * float(exact[name].abs().max())
        torch.testing.assert_close(weight.double(), exact[name], rtol=0, atol=most, msg=name)


def test_an_adapter_on_a_matrix_that_is_head_and_embedding_is_not_merged(tmp_path: Path) -> None:
    """Microsoft's configs tie nothing. Merged, one change would be two; an adapter beside the matrix merges as ever."""
    base = write_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    for module in ("lm_head", "embed_tokens"):
        adapter = random_adapter(base, tmp_path / module, options={"r": 2, "target_modules": [module]})
        with pytest.raises(CheckpointError, match=rf"changes (model\.)?{module} .*tie_word_embeddings.*--to adapter"):
            export(adapter, tmp_path / "merged", to="merged")
    adapter = random_adapter(base, tmp_path / "beside", options={"r": 2})
    export(adapter, tmp_path / "merged", to="merged")
    tuned, merged = load_target(adapter, device="cpu"), load_target(tmp_path / "merged", device="cpu")
    expected = logits(tuned.model, tuned.processor)
    assert_same_logits(logits(merged.model, merged.processor), expected)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_after_training_in_4_bits_the_base_is_merged_as_its_files_have_it(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "model")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    adapter = random_adapter(base, tmp_path / "adapter", quantization=options, options={"r": 4})
    export(adapter, tmp_path / "merged", to="merged")
    tuned, merged = load_target(adapter, device="cpu"), load_target(tmp_path / "merged", device="cpu")
    found = logits(merged.model, merged.processor)
    assert_same_logits(found, logits(tuned.model, tuned.processor))
    in_4_bits = load_target(adapter, device="cpu", quantization=options)
    assert (found - logits(in_4_bits.model, in_4_bits.processor)).abs().max() > 1e-4


def test_a_bfloat16_base_is_rounded_once_where_the_adapter_changes_it(base: Path, tmp_path: Path) -> None:
    """And each other weight is the base's, bit for bit."""
    half = tmp_path / "half"
    shutil.copytree(base, half)
    weights = {name: weight.bfloat16() for name, weight in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    adapter = random_adapter(half, tmp_path / "adapter", options={"r": 4})
    export(adapter, tmp_path / "merged", to="merged")
    export(adapter, tmp_path / "single", to="merged", dtype="float32")
    found, single = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "single"))
    exact = load_target(adapter, device="cpu", dtype="float32").model.merge_and_unload().state_dict()
    changed = [name for name in found if not torch.equal(found[name], weights[name])]
    assert len(changed) == 2 * 4 and all("_proj" in name for name in changed)
    for name, weight in found.items():
        torch.testing.assert_close(single[name], exact[name], rtol=0, atol=1e-6, msg=name)
        assert torch.equal(weight, single[name].bfloat16()), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_fully_tuned_run_goes_out_in_shards_as_it_is(tmp_path: Path) -> None:
    """Separators, tower and projector with it."""
    write_tiny_model(tmp_path / "model")
    run = make_run(tmp_path, make_recipe(tmp_path, lora=None))
    found = export(run.path, tmp_path / "merged", to="merged", shard_bytes=40_000)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = sorted({*index["weight_map"].values()})
    assert len(shards) == found.facts["files"] > 3
    stored = {}
    for shard in shards:
        part = load_file(tmp_path / "merged" / shard)
        assert sum(weight.nbytes for weight in part.values()) <= 40_000 or len(part) == 1
        assert {name for name, place in index["weight_map"].items() if place == shard} == {*part}
        stored |= part
    tuned = load_file(run.model / "model.safetensors")
    assert {*stored} == {*tuned} and all(torch.equal(stored[name], tuned[name]) for name in tuned)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in tuned.values())
    load_target(tmp_path / "merged", device="cpu")


def test_which_weights_share_a_file() -> None:
    assert plan_shards({"a": 3, "b": 2, "c": 4, "d": 9}, 5) == [["a", "b"], ["c"], ["d"]]


def spoil_base(folder: Path) -> None:
    """Another base than the adapter's, in its place."""
    shutil.rmtree(folder)
    write_tiny_model(folder, intermediate_size=96)


def lose_a_tensor(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(max(weights))
    save_file(weights, adapter / "adapter_model.safetensors")


def test_what_does_not_fit_is_one_line_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(base, own)
    adapter = random_adapter(own, tmp_path / "adapter", options={"r": 4})
    huge = load_file(own / "model.safetensors")
    save_file({**huge, "model.norm.weight": huge["model.norm.weight"] + 1e6}, own / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds numbers that float16 cannot"):
        export(adapter, tmp_path / "merged", to="merged", dtype="float16")
    lose_a_tensor(adapter)
    with pytest.raises(CheckpointError, match="does not fit .*is missing in the file"):
        export(adapter, tmp_path / "merged", to="merged")
    adapter = random_adapter(own, tmp_path / "adapter", options={"r": 4})
    spoil_base(own)
    with pytest.raises(CheckpointError, match="does not fit"):
        export(adapter, tmp_path / "merged", to="merged")
    config = json.loads((own / "config.json").read_text())
    quantised = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (own / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(CheckpointError, match="quantised weights"):
        export(own, tmp_path / "merged", to="merged")
    with pytest.raises(ConfigError, match="whole model and no adapter: use --to merged"):
        export(base, tmp_path / "merged", to="adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_numbers_that_are_none_are_not_exported(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(base, own)
    adapter = random_adapter(own, tmp_path / "adapter", options={"r": 4})
    for file, kinds in (
        (adapter / "adapter_model.safetensors", ("adapter", "merged")),
        (own / "model.safetensors", ("merged",)),
    ):
        whole = load_file(file)
        name = max(whole)
        whole[name].view(-1)[1] = float("nan") if "adapter" in file.name else float("-inf")
        save_file(whole, file, metadata={"format": "pt"})
        for to in kinds:
            with pytest.raises(CheckpointError, match=rf"{file}: .+ holds NaN or infinity") as error:
                export(file.parent, tmp_path / "out", to=to)
            assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_adapter_that_changes_no_weight_is_refused(base: Path, tmp_path: Path) -> None:
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = load_base(base, device="cpu")
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "prompt")
    with pytest.raises(CheckpointError, match=r"PROMPT_TUNING.*use --to adapter"):
        export(tmp_path / "prompt", tmp_path / "merged", to="merged")
    export(tmp_path / "prompt", tmp_path / "adapter", to="adapter")
    alora = peft.LoraConfig(r=2, target_modules=["qkv_proj"], alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    peft.get_peft_model(load_base(base, device="cpu"), alora).save_pretrained(tmp_path / "alora")
    with pytest.raises(CheckpointError, match=r"aLoRA.*use --to adapter"):
        export(tmp_path / "alora", tmp_path / "merged", to="merged")


def test_the_processor_goes_out_as_the_run_sees_images(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    run = make_run(tmp_path, make_recipe(tmp_path, image={"num_crops": 7}))
    for to in ("merged", "adapter"):
        export(run.path, tmp_path / to, to=to)
        assert load_processor(tmp_path / to).image_processor.num_crops == 7
