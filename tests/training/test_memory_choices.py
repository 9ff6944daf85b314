"""Checkpoints of activations by recipe: full, of some layers, offloaded; each gives the plain gradients."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.modeling_utils as library
from safetensors.torch import load_file
from torch.autograd.graph import save_on_cpu

import phi3v
from phi3v.errors import DeviceError
from phi3v.model.vision_phi3_v import Phi3VVisionTransformer
from phi3v.run_folder import RunFolder
from phi3v.training.arguments import training_arguments
from phi3v.training.faster_layers import without_effect

MakeRecipe = Callable[..., phi3v.Recipe]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CHOICES: dict[str, dict[str, Any]] = {
    "full": {},
    "every second layer": {"every_n_layers": 2},
    "offloaded": {"offload": True},
}


def run(recipe: phi3v.Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """One step of training: the adapter, and how often layers ran."""
    from transformers.models.clip.modeling_clip import CLIPMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    calls = {"decoder": 0, "tower": 0, "offloads": 0}

    def counted(name: str, original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(self, *args, **kwargs)

        return forward

    class OnThisMachine(save_on_cpu):
        """Pinned memory, which transformers asks for, is a GPU's."""

        def __init__(self, **settings: Any) -> None:
            assert settings["pin_memory"]
            calls["offloads"] += 1
            super().__init__(pin_memory=False)

    with monkeypatch.context() as patched:
        patched.setattr(Phi3MLP, "forward", counted("decoder", Phi3MLP.forward))
        patched.setattr(CLIPMLP, "forward", counted("tower", CLIPMLP.forward))
        patched.setattr(library, "save_on_cpu", OnThisMachine)
        patched.setattr("phi3v.training.train.check_faster_layers", lambda *given: None)
        phi3v.train(recipe)
    return load_file(RunFolder(recipe.output).adapter / "adapter_model.safetensors"), calls


@pytest.mark.parametrize("tower", ["frozen", "train"])
def test_each_choice_gives_the_plain_gradients(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tower: str) -> None:
    """Two decoder layers and two of the tower that are read; a step of four samples in two micro-batches."""
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    vision = {"tower": tower}
    plain, calls = run(make("plain", training=step, vision=vision), monkeypatch)
    assert calls == {"decoder": 2 * 2, "tower": 2 * 2, "offloads": 0}
    for name, kwargs in CHOICES.items():
        options = {**step, "activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
        found, calls = run(make(name.replace(" ", "_"), training=options, vision=vision), monkeypatch)
        again = 1 if name == "every second layer" else 2
        assert calls["decoder"] == 2 * (2 + again), name
        assert calls["tower"] == 2 * (2 + (again if tower == "train" else 0)), name
        assert bool(calls["offloads"]) == (name == "offloaded")
        assert found.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_choices_without_effect_are_told_with_the_way_of_a_step(make: MakeRecipe) -> None:
    lines: list[str] = []
    twice = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 99}}
    recipe = make(training={"max_steps": 1, "tokens_per_micro_batch": 10, **twice})
    phi3v.train(recipe, on_event=lambda event: lines.append(event.line) if event.kind == "way" else None)
    (line,) = lines
    assert re.search(
        r"; training.tokens_per_micro_batch is 10 and the shortest sample has \d+: each sample goes al", line
    )
    assert line.endswith("; every_n_layers is 99 and the decoder has 2 layers: one is computed twice at most")
    assert without_effect(recipe.training, 10, 99) == without_effect(make().training, 500, 2) == []


def test_offloading_needs_another_memory_to_offload_from(make: MakeRecipe) -> None:
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    with pytest.raises(DeviceError, match=r"offload moves checkpoints from a GPU"):
        phi3v.train(make(training=options))


def test_batches_travel_pinned_and_without_waiting_to_a_gpu_alone(make: MakeRecipe) -> None:
    def arguments(device: torch.device, **training: Any) -> Any:
        recipe = make(training=training)
        return training_arguments(recipe, RunFolder(recipe.output), device=device, autocast=None, validated=False)

    found = arguments(CUDA)
    assert found.dataloader_pin_memory and found.accelerator_config.non_blocking
    found = arguments(CPU)
    assert not found.dataloader_pin_memory and not found.accelerator_config.non_blocking
    assert not arguments(CUDA, accelerator_config={"non_blocking": False}).accelerator_config.non_blocking
    assert arguments(CUDA, use_liger_kernel=True).use_liger_kernel is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_sends_pinned_batches(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Phi3VVisionTransformer.forward, set()

    def spy(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.add(pixels.device.type)
        return original(self, pixels)

    monkeypatch.setattr(Phi3VVisionTransformer, "forward", spy)
    pinned: list[bool] = []
    to = torch.Tensor.to

    @functools.wraps(to)
    def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.uint8 and self.device.type == "cpu" and self.ndim == 4:
            pinned.append(self.is_pinned() and kwargs.get("non_blocking", False))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    phi3v.train(make(model={"device": "cuda"}, training={"max_steps": 1}))
    assert seen == {"cuda"} and pinned and all(pinned)
