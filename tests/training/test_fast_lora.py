"""Training with hand-written layers: the same adapter as without, and the run says which way it went."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import phi3v
from phi3v.kernels.lora_layer import attach_fast_lora


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_ends_with_the_same_adapter_either_way(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, six steps of two micro-batches, a dropout that must draw the same masks."""
    settings = {"lora": {"r": 4, "lora_dropout": 0.1}, "training": {"max_steps": 6}}
    told: list[str] = []
    plain = phi3v.train(make("plain", **settings), on_event=lambda event: told.append(event.line))
    monkeypatch.setattr(
        "phi3v.training.prepare.attach_fast_lora", lambda model, force: attach_fast_lora(model, force=True)
    )
    fast = phi3v.train(make("fast", **settings), on_event=lambda event: told.append(event.line))
    assert plain.fast_lora == {"layers": 2, "attached": 0, "reasons": {"no CUDA device": 2}, "calls": {}}
    assert fast.fast_lora == {"layers": 2, "attached": 2, "reasons": {}, "calls": {"fast": 2 * 6 * 2}}
    lines = [line.split(", ", 1) for line in told if line]
    assert [line[0].split(" of ")[0] for line in lines] == ["each step: packs"] * 2
    assert [line[1] for line in lines] == [
        "attention phi3v_packed_slices, 0 of 2 decoder layers hand-written (no CUDA device), none compiled",
        "attention phi3v_packed_slices, 2 of 2 decoder layers hand-written, none compiled",
    ]
    expected, found = adapter(plain.folder), adapter(fast.folder)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((found[name] - weight).norm()) <= 1e-5 * float(weight.norm()), name


def test_the_setting_turns_it_off(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "phi3v.training.prepare.attach_fast_lora", lambda model, force: attach_fast_lora(model, force=True)
    )
    result = phi3v.train(make(training={"fast_lora": "off", "max_steps": 1}))
    assert result.fast_lora["attached"] == 0 and result.fast_lora["calls"] == {}


def test_the_reason_is_told_of_layers_that_are_compiled_too(make) -> None:
    with torch.compiler.set_stance("force_eager"):  # the layers are marked as compiled, and nothing is
        recipe = make(lora={"r": 4, "use_dora": True}, training={"max_steps": 1, "compile_layers": True})
        phi3v.train(recipe)
    told = json.loads((Path(recipe.output) / "finished.json").read_text())["fast_lora"]
    assert told["reasons"] == {"qkv_proj uses DoRA or another variant of LoRA": 2} and told["attached"] == 0
