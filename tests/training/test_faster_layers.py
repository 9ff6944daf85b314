"""Faster forms of the layers: compiled once for all lengths, Liger's kernels, what is missing said in a line."""

import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, batch_of, prompt
from transformers.models.phi3 import modeling_phi3

import phi3v
from phi3v.data.step_batch import step_batch
from phi3v.errors import ConfigError, DeviceError, MissingPackageError
from phi3v.kernels.packed_attention import SLICES, attach_packed_attention
from phi3v.training import faster_layers
from phi3v.training import train as training
from phi3v.training.faster_layers import check_faster_layers, compile_layers, compiles, use_faster_layers
from phi3v.training.master_weights import shorten_weights
from phi3v.tuning import attach_lora

MakeRecipe = Callable[..., phi3v.Recipe]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def compiler() -> Iterator[None]:
    """A clean compiler before and after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def batches() -> list[dict[str, Any]]:
    """Steps of three lengths, with one to three crops an image, of one and of two rows."""
    rows = [
        [([4, 9], [(1, 1)]), ([12, 7], [(1, 2)])],
        [([2, 5, 21], [(1, 2), (1, 1)]), ([17, 30], [(1, 1)])],
        [([40, 11], [(2, 1)]), ([5],)],
    ]
    made = [[prompt(number, *row, image_id=IMAGE) for number, row in enumerate(step)] for step in rows]
    return [step_batch(batch_of(step, "right"), IMAGE) for step in made]


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def lora_model() -> Any:
    model = attach_lora(tiny_model(image_token_id=IMAGE), {"r": 4, "init_lora_weights": False})
    return model.train()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_plain_gradients_and_compile_once(compiler: None, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = lora_model()
    plain = [gradients(model, batch) for batch in batches()]
    if checkpointing:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    assert compile_layers(model.get_base_model(), backend="aot_eager") == 3 + 2  # the tower's third is never run
    found = [gradients(model, batches()[0])]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 3 <= compiled <= 4  # decoder layer, the last one, tower layer: one graph a kind
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [gradients(model, batch) for batch in batches()[1:]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(found, plain, strict=True):
        assert one.keys() == other.keys() and one
        for name, gradient in other.items():
            limit = 1e-5 * max(float(gradient.abs().max()), 1e-2)  # some are zero but for rounding
            torch.testing.assert_close(one[name], gradient, rtol=0, atol=limit)


def pack(lengths: list[int]) -> dict[str, Any]:
    """One row of samples of such lengths."""
    rows = [prompt(number, [length], image_id=IMAGE) for number, length in enumerate(lengths)]
    packed = {name: torch.cat([row[name] for row in rows], 1) for name in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    packed |= {"cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), "max_seqlen": max(lengths)}
    return step_batch(packed, IMAGE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_take_packs_of_any_number_of_samples(compiler: None) -> None:
    """Slices alone are not compiled; where they were, each number of samples was compiled again."""
    torch.manual_seed(0)
    model = lora_model()
    assert attach_packed_attention(model) == SLICES
    packs = [pack(lengths) for lengths in ([5, 9, 4], [7, 8], [11], [4, 4, 4, 4, 5], [40, 3])]
    plain = [gradients(model, batch) for batch in packs]
    compile_layers(model.get_base_model(), backend="eager")
    found = [gradients(model, packs[0])]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [gradients(model, batch) for batch in packs[1:]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 3
    (broken,) = torch._dynamo.utils.counters["graph_break"]
    assert "_uncompiled_slices" in broken
    for one, other in zip(found, plain, strict=True):
        for name, gradient in other.items():
            limit = 1e-5 * max(float(gradient.abs().max()), 1e-2)
            torch.testing.assert_close(one[name], gradient, rtol=0, atol=limit)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_train_weights_with_masters(compiler: None) -> None:
    """Gradients of bfloat16 weights still arrive in float32."""
    torch.manual_seed(0)
    model = lora_model().bfloat16()
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
        assert weight.requires_grad == ("lora_" in name)
    shorten_weights(model, torch.bfloat16)
    plain = gradients(model, batches()[0])
    compile_layers(model.get_base_model(), backend="aot_eager")
    found = gradients(model, batches()[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert {one.dtype for one in found.values()} == {torch.float32}
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0.02 * float(gradient.abs().max()))


def test_names_of_weights_do_not_change() -> None:
    model = lora_model()
    before = list(model.state_dict())
    compile_layers(model.get_base_model(), backend="eager")
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("choice", "device", "quantized", "triton", "expected"),
    [
        ("auto", CUDA, False, True, True),
        ("auto", CUDA, False, False, False),
        ("auto", CUDA, True, True, False),
        ("auto", CPU, False, True, False),
        (True, CPU, False, False, True),
        (False, CUDA, False, True, False),
    ],
)
def test_who_compiles(
    choice: Any, device: torch.device, quantized: bool, triton: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faster_layers, "_installed", lambda package: triton)
    assert compiles(choice, device, quantized=quantized) is expected


def test_what_is_missing_is_said_before_anything_is_loaded(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster_layers, "_installed", lambda package: False)
    liger = make(training={"use_liger_kernel": True})
    with pytest.raises(DeviceError, match=r"use_liger_kernel needs a GPU, and this run is on cpu"):
        phi3v.train(liger)
    assert not Path(liger.output).exists()
    with pytest.raises(MissingPackageError, match=r'pip install "phi3v\[liger\]"'):
        check_faster_layers(liger, CUDA)
    with pytest.raises(MissingPackageError, match=r"Triton"):
        check_faster_layers(make(training={"compile_layers": True}), CUDA)
    check_faster_layers(make(), CUDA)


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A stand-in for Liger that notes how it is called; its own kernels need a GPU."""
    package = tmp_path / "packages" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "transformers.py").write_text(
        "calls = []\n"
        "def apply_liger_kernel_to_phi3(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True,"
        " swiglu=True, model=None):\n"
        "    calls.append(dict(locals()))\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "liger_kernel"}
    import liger_kernel.transformers

    yield liger_kernel.transformers.calls
    for name in ("liger_kernel", "liger_kernel.transformers"):
        del sys.modules[name]
    sys.modules.update(real)


def test_liger_is_handed_its_options_and_not_the_loss(make: MakeRecipe, liger: list[dict[str, Any]]) -> None:
    options = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}, "compile_layers": False}
    model = lora_model()
    assert use_faster_layers(model, make(training=options), CPU) == {"liger": 3, "compiled": 0}
    (call,) = liger
    assert call.pop("model") is model.get_base_model()
    assert call == {
        "rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True, "swiglu": True
    }  # fmt: skip
    assert use_faster_layers(model, make(), CPU) == {"liger": 0, "compiled": 0} and len(liger) == 1


def test_what_liger_does_not_have_is_refused_before_anything_is_made(
    make: MakeRecipe, liger: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"use_liger_kernel": True, "compile_layers": False}
    monkeypatch.setattr(training, "training_device", lambda name: CUDA)
    monkeypatch.setattr(training, "load_processor", lambda *args, **options: pytest.fail("loaded"))
    for config, expected in (
        ({"rms_nrom": True}, "training.liger_kernel_config.rms_nrom is no option: did you mean rms_norm?"),
        ({"model": None}, "training.liger_kernel_config.model is no option"),
        ("rope", "training.liger_kernel_config is 'rope', allowed is a mapping, {rope: false} for instance"),
        (
            {"fused_linear_cross_entropy": True},
            "training.liger_kernel_config: the loss is phi3v's own, take (fused_linear_)cross_entropy out",
        ),
    ):
        recipe = make(training={**options, "liger_kernel_config": config})
        with pytest.raises(ConfigError) as error:
            phi3v.train(recipe)
        assert str(error.value) == expected and not Path(recipe.output).exists()
    check_faster_layers(make(training={**options, "liger_kernel_config": {"rope": False}}), CUDA)
    assert not liger


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
def test_ligers_kernels_give_the_plain_gradients_on_a_gpu(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    for name in ("apply_rotary_pos_emb", "Phi3RMSNorm", "Phi3MLP"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_phi3, name, getattr(modeling_phi3, name))
    torch.manual_seed(0)
    model = lora_model().cuda()
    moved = {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in batches()[0].items()}
    plain = gradients(model, moved)
    recipe = make(training={"use_liger_kernel": True, "compile_layers": False})
    assert use_faster_layers(model, recipe, CUDA)["liger"] == 3
    for name, gradient in gradients(model, moved).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-3 * max(float(plain[name].abs().max()), 1e-3))
