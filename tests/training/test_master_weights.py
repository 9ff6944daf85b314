"""Weights in bfloat16 whose float32 masters the optimiser steps: nothing small is lost, resuming is exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from safetensors.torch import load_file
from torch import nn

import phi3v
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.master_weights import precise_state, same_in, shorten_weights, step_masters

MakeRecipe = Callable[..., phi3v.Recipe]
OPTIMISERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-4, momentum=0.9),
}


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_masters_move_as_float32_weights_do(name: str) -> None:
    short, plain = layer(), layer()
    optimiser = OPTIMISERS[name](short.parameters())
    masters = shorten_weights(short, torch.bfloat16)
    step_masters(optimiser, short, masters)
    reference = OPTIMISERS[name](plain.parameters())
    for step in range(20):
        torch.manual_seed(step)
        for (_, one), (_, other) in zip(short.named_parameters(), plain.named_parameters(), strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        optimiser.step()
        reference.step()
    for key, weight in plain.named_parameters():
        assert torch.equal(masters[key], weight)
        assert (
            torch.equal(short.get_parameter(key), weight.bfloat16())
            and short.get_parameter(key).dtype == torch.bfloat16
        )


def test_an_update_too_small_for_bfloat16_is_kept() -> None:
    """Above 1 bfloat16 has steps of 1/128: 1/1024 is lost each time, and eight of them are one step."""

    def trained(with_masters: bool) -> torch.Tensor:
        one = nn.Linear(1, 1, bias=False)
        one.weight.data.fill_(1.0)
        if not with_masters:
            one.bfloat16()
        optimiser = torch.optim.SGD(one.parameters(), lr=2.0**-10)
        if with_masters:
            step_masters(optimiser, one, shorten_weights(one, torch.bfloat16))
        for _ in range(8):
            one.weight.grad = torch.full((1, 1), -1.0, dtype=one.weight.grad_dtype)
            optimiser.step()
        return one.weight.detach()

    assert trained(with_masters=True).item() == 1 + 2.0**-7 and trained(with_masters=False).item() == 1.0


def test_gradients_of_many_micro_batches_add_up_in_float32() -> None:
    one = nn.Linear(1, 1, bias=False)
    shorten_weights(one, torch.bfloat16)
    for _ in range(1000):
        one(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert one.weight.grad.dtype == torch.float32 and one.weight.grad.item() == 1000  # bfloat16 would stop at 256


def test_what_is_saved_is_the_master_unless_the_weight_was_loaded_anew() -> None:
    one = layer()
    values = {name: weight.detach().clone() for name, weight in one.named_parameters()}
    assert precise_state(one, {}) is None
    masters = shorten_weights(one, torch.bfloat16)
    state = precise_state(one, masters)
    assert state is not None and all(torch.equal(state[name], value) for name, value in values.items())
    with torch.no_grad():
        one.weight.add_(1)
    again = precise_state(one, masters)
    assert again is not None and again["weight"].dtype == torch.bfloat16 and torch.equal(again["bias"], values["bias"])


def test_frozen_weights_and_others_types_stay() -> None:
    model = nn.Sequential(layer(), layer().double())
    model[0].bias.requires_grad_(False)
    assert set(shorten_weights(model, torch.bfloat16)) == {"0.weight"}
    assert (model[0].bias.dtype, model[1].weight.dtype) == (torch.float32, torch.float64)


def test_only_weights_that_bfloat16_holds_are_shortened() -> None:
    assert same_in(torch.bfloat16, [torch.tensor([1.0, 0.5]), torch.tensor([-3.0])])
    assert not same_in(torch.bfloat16, [torch.tensor([1.0]), torch.tensor([1.001])])


BFLOAT16 = {"model": {"dtype": "bfloat16"}, "lora": {"r": 4, "lora_dropout": 0.1}}
STEPS = {"save_steps": 2, "max_steps": 6, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "learning_rate": 1e-3}


def test_a_bfloat16_run_computes_in_it_and_resumes_exactly(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {**BFLOAT16["model"], "name": make().model.name}
    sections = {**BFLOAT16, "model": model, "training": STEPS, "vision": {"projector": "train"}}
    seen: set[tuple[torch.dtype, ...]] = set()
    original = peft_layer.Linear.forward

    def spy(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = original(self, x, *args, **kwargs)
        if self.training:
            down = self.lora_A["default"].weight
            seen.add((x.dtype, down.dtype, down.grad_dtype, made.dtype))
            assert not torch.is_autocast_enabled("cpu")
        return made

    monkeypatch.setattr(peft_layer.Linear, "forward", spy)
    undisturbed = make("undisturbed", **sections)
    phi3v.train(undisturbed)
    short = torch.bfloat16
    assert seen == {(short, short, torch.float32, short)}

    def interrupt(event: TrainingEvent) -> None:
        if event.kind == "step" and event.step == 5:
            raise KeyboardInterrupt

    recipe = make("interrupted", **sections)
    with pytest.raises(KeyboardInterrupt):
        phi3v.train(recipe, on_event=interrupt)
    assert phi3v.train(recipe).resumed_from == 4
    weights = [load_file(RunFolder(one.output).adapter / "adapter_model.safetensors") for one in (recipe, undisturbed)]
    assert weights[0].keys() == weights[1].keys() and any("img_projection" in name for name in weights[0])
    for name, value in weights[0].items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[1][name]), name
        assert not torch.equal(value, value.bfloat16().float()), f"{name}: masters are finer than bfloat16"


def test_bfloat16_losses_follow_those_of_float32(make: MakeRecipe) -> None:
    """Without masters, updates of 1e-5 would leave weights of bfloat16 where they are."""
    model = make().model.name
    plain, short = (
        make("plain", training=STEPS),
        make("short", model={"name": model, "dtype": "bfloat16"}, training=STEPS),
    )
    losses = []
    for recipe in (plain, short):
        phi3v.train(recipe)
        losses.append([line["loss"] for line in RunFolder(recipe.output).read_metrics() if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
