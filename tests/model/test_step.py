"""A training step's batch: the plain loss and gradients, the last layer at trained positions alone, no waiting."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from golden_models import tiny_model
from no_waiting import Waited, no_waiting
from tiny_prompts import IMAGE, batch_of, prompt, without
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

from phi3v.data.collate import Collator
from phi3v.data.step_batch import step_batch

MIXES = {
    "images_and_text": [([4, 9], [(1, 1)]), ([2, 5, 21], [(1, 2), (1, 1)]), ([17],)],
    "one_row": [([3, 6], [(2, 1)])],
    "text_alone": [([5],), ([9],)],
}


def rows_of(mix: str) -> list[dict]:
    return [prompt(seed, *row, image_id=IMAGE) for seed, row in enumerate(MIXES[mix])]


def gradients_of(model: Any, batch: dict, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def rows_seen(model: Any, batch: dict) -> dict[str, list[int]]:
    """Rows of positions that the parts of the first and last layer and the head are given."""
    seen: dict[str, list[int]] = {}
    parts = {"lm_head": model.lm_head, "norm": model.model.norm}
    for number in (0, -1):
        layer = model.model.layers[number]
        parts |= {f"{number} qkv": layer.self_attn.qkv_proj, f"{number} o": layer.self_attn.o_proj}
        parts |= {f"{number} norm": layer.post_attention_layernorm, f"{number} mlp": layer.mlp}
    hooks = [
        part.register_forward_hook(
            lambda module, given, made, name=name: seen.setdefault(name, []).append(given[0].flatten(0, -2).shape[0])
        )
        for name, part in parts.items()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_steps_loss_and_gradients_are_the_plain_ones(mix: str, attn: str) -> None:
    model = tiny_model(attn=attn, image_token_id=IMAGE)
    batch = batch_of(rows_of(mix), "right")
    plain_loss, plain = gradients_of(model, batch)
    loss, lean = gradients_of(model, step_batch(batch, IMAGE))
    assert_close(loss, plain_loss, rtol=1e-6, atol=1e-6)
    assert lean.keys() == plain.keys()
    for name, gradient in plain.items():
        limit = 1e-5 * max(float(gradient.abs().max()), 1e-2)  # biases of keys have none but rounding
        assert_close(lean[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_is_divided_by_the_steps_tokens() -> None:
    model, batch = tiny_model(image_token_id=IMAGE), batch_of(rows_of("text_alone"), "right")
    plain, lean = model(**batch, num_items_in_batch=100).loss, model(**step_batch(batch, IMAGE), num_items_in_batch=100)
    assert_close(lean.loss, plain, rtol=1e-6, atol=0)
    assert len(lean.logits) == 4 + 8  # the last words of each row less the first of them


def test_the_last_layer_works_at_trained_positions_alone() -> None:
    model = tiny_model(image_token_id=IMAGE)
    batch = batch_of(rows_of("images_and_text"), "right")
    everywhere, trained = batch["labels"].numel(), int((batch["labels"][:, 1:] != -100).sum())
    seen = rows_seen(model, step_batch(batch, IMAGE))
    few, many = [trained], [everywhere]
    assert seen == {
        "0 qkv": many, "0 o": many, "0 norm": many, "0 mlp": many,
        "-1 qkv": many, "-1 o": few, "-1 norm": few, "-1 mlp": few, "norm": few, "lm_head": few,
    }  # fmt: skip
    assert set(map(tuple, rows_seen(model, without(batch, "labels")).values())) == {(everywhere,)}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_prompts_beside_a_cache_pass_the_last_layer_at_few_positions(attn: str) -> None:
    model = tiny_model(attn=attn, image_token_id=IMAGE)
    batch = batch_of(rows_of("images_and_text"), "right")
    plain, lean = DynamicCache(), DynamicCache()
    made = {name: value for name, value in step_batch(batch, IMAGE).items() if name not in ("labels", "position_ids")}
    seen: list[int] = []
    hook = model.model.layers[-1].mlp.register_forward_hook(lambda _, given, made: seen.append(given[0].shape[1]))
    with torch.inference_mode():
        expected = model(**batch, past_key_values=plain, use_cache=True, trained_logits_only=True).logits
        output = model(**made, past_key_values=lean, use_cache=True)
    hook.remove()
    assert seen == [batch["labels"].shape[1], len(expected)] and output.loss is None
    assert_close(output.logits, expected, rtol=0, atol=2e-5)
    real = batch["attention_mask"].bool()[:, None, :, None]
    for one, other in zip(plain.layers, output.past_key_values.layers, strict=True):  # behind padding nothing is read
        assert_close(one.keys * real, other.keys * real, rtol=0, atol=2e-5)
        assert_close(one.values * real, other.values * real, rtol=0, atol=2e-5)


@pytest.mark.parametrize("trains", ["everything", "projector", "adapters"])
def test_a_step_waits_for_nothing(trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.model.vision_phi3_v.seen_twice", lambda *crops: [])  # CPUs alone compare crops
    model = tiny_model(image_token_id=IMAGE).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_(
            {"everything": True, "projector": "img_projection" in name, "adapters": "qkv" in name}[trains]
        )
    batch = step_batch(batch_of(rows_of("images_and_text"), "right"), IMAGE)
    with no_waiting():
        model(**batch, num_items_in_batch=30).loss.backward()
    assert all((one.grad is not None) or not one.requires_grad or "vision_model" in name
               for name, one in model.named_parameters())  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_nothing_on_a_gpu() -> None:
    model = tiny_model(image_token_id=IMAGE).train().cuda()
    batch = step_batch(batch_of(rows_of("images_and_text"), "right"), IMAGE)
    moved = {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in batch.items()}
    model(**moved, num_items_in_batch=30).loss.backward()  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**moved, num_items_in_batch=30).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plain_batch_would_wait() -> None:
    model, batch = tiny_model(image_token_id=IMAGE), batch_of(rows_of("images_and_text"), "right")
    with pytest.raises(Waited), no_waiting():
        model(**batch, trained_logits_only=True)


def test_text_alone_waits_for_nothing_either() -> None:
    model, batch = tiny_model(image_token_id=IMAGE), step_batch(batch_of(rows_of("text_alone"), "right"), IMAGE)
    with no_waiting():
        model(**batch)


def test_a_short_row_beside_a_long_one_keeps_its_rope() -> None:
    """The original context ends at 64 tokens: padding must not count for the shorter row."""
    model = tiny_model("tiny_phi3v_long", image_token_id=IMAGE)
    rows = [prompt(0, [80]), prompt(1, [20])]
    together = model(**step_batch(batch_of(rows, "right"), IMAGE)).logits
    alone = [model(**step_batch(one, IMAGE)).logits for one in rows]
    assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    longer = step_batch(batch_of(rows, "right"), IMAGE)
    longer["position_ids"] = torch.arange(80)[None].expand(2, -1)
    assert (model(**longer).logits - together).abs().max() > 1e-3  # the test would see it


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_rows_stay_apart(attn: str) -> None:
    model = tiny_model(attn=attn, image_token_id=IMAGE)
    rows = [step_batch(one, IMAGE) for one in rows_of("images_and_text")]
    lengths = [one["input_ids"].shape[1] for one in rows]
    packed = {name: torch.cat([one[name] for one in rows], 1) for name in ("input_ids", "labels", "position_ids")}
    slots = [
        Collator(0, image_token_id=IMAGE)([unbatched(one)])["pixel_values"] for one in rows_of("images_and_text")[:2]
    ]
    packed |= {"pixel_values": torch.cat(slots), "image_sizes": rows[0]["image_sizes"] + rows[1]["image_sizes"]}
    packed |= {"cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), "max_seqlen": max(lengths)}
    with torch.no_grad():
        together = model(**step_batch(packed, IMAGE)).logits
        alone = torch.cat([model(**one).logits for one in rows])
        assert_close(together, alone, rtol=0, atol=1e-4)
        leaking = model(**without(step_batch(packed, IMAGE), "cu_seqlens", "max_seqlen")).logits
    assert (leaking - alone).abs().max() > 1e-3  # the test would see it


def unbatched(row: dict) -> dict:
    """A prompt of one row as an example of the data."""
    return {
        name: value[0] if name in ("input_ids", "labels", "attention_mask") else value for name, value in row.items()
    }


def something_cached() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 1, 8), 0)
    return cache


def test_checkpointing_reaches_the_last_layer_too() -> None:
    model = tiny_model(image_token_id=IMAGE).train()
    batch = step_batch(batch_of(rows_of("images_and_text"), "right"), IMAGE)
    plain_loss, plain = gradients_of(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(lambda *given: calls.append(1))
    loss, again = gradients_of(model, batch)
    hook.remove()
    assert len(calls) == 2 and torch.equal(loss, plain_loss)
    for name, gradient in plain.items():  # sums over several threads may come in another order
        assert_close(again[name], gradient, rtol=0, atol=1e-6 * max(float(gradient.abs().max()), 1e-2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: {"image_positions": batch["image_positions"][1:]}, "do not match"),
        (lambda batch: {"attention_mask": torch.ones_like(batch["input_ids"])}, "no attention_mask"),
        (lambda batch: {"past_key_values": something_cached()}, "no attention_mask, nothing cached"),
        (lambda batch: {"pixel_values": None}, "answer blindly"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Any, message: str) -> None:
    model, batch = tiny_model(image_token_id=IMAGE), step_batch(batch_of(rows_of("images_and_text"), "right"), IMAGE)
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change(batch)})
