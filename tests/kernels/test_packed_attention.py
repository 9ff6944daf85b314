"""A pack equals its samples padded and one by one, and which attention it went through is counted."""

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, batch_of, prompt, without
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from phi3v.data.collate import PackedCollator
from phi3v.kernels import packed_attention
from phi3v.kernels.packed_attention import (
    FLASH_4,
    SLICES,
    VARLEN,
    attach_packed_attention,
    fastest_kernel,
    varlen_kernel,
)

LAYERS = 3
ROWS = [([9, 12], [(1, 1)]), ([20],), ([90],), ([3, 2, 6], [(1, 2), (1, 1)]), ([1, 5], [(2, 1)]), ([2],)]
"""Crop grids of several shapes, and text alone; the original context of the model is 64 tokens, which the second and
the last row are within."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the calls of each path: sdpa on slices, and sdpa as transformers itself would call it."""
    counted: Counter = Counter()
    slices, plain = packed_attention.by_slices, packed_attention.sdpa_attention_forward

    def count_slices(*args: Any, **kwargs: Any) -> torch.Tensor:
        counted["slices"] += 1
        monkeypatch.setattr(packed_attention, "sdpa_attention_forward", plain)
        try:
            return slices(*args, **kwargs)
        finally:
            monkeypatch.setattr(packed_attention, "sdpa_attention_forward", count_plain)

    def count_plain(*args: Any, **kwargs: Any) -> Any:
        counted["plain"] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(packed_attention, "by_slices", count_slices)
    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", count_plain)
    return counted


def long_model(attn: str = "sdpa", **changes: Any) -> Any:
    return tiny_model("tiny_phi3v_long", attn=attn, image_token_id=IMAGE, **changes)


def rows() -> list[dict]:
    return [prompt(seed, *row, image_id=IMAGE) for seed, row in enumerate(ROWS)]


def pack_of(prompts: list[dict]) -> dict:
    """A pack of prompts, as the collator makes it of examples."""
    text = ("input_ids", "attention_mask", "labels")
    return PackedCollator()(
        [{key: value[0] if key in text else value for key, value in one.items()} for one in prompts]
    )


def learnt(model: Any, batches: list[dict], tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and all gradients of some micro-batches that are one step."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, trained_logits_only=True, num_items_in_batch=tokens, use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * max(float(gradient.abs().max()), 1.0))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_equals_padded_equals_one_by_one(attn: str, calls: Counter) -> None:
    model, prompts = long_model(attn), rows()
    tokens = sum(int((row["labels"][:, 1:] != -100).sum()) for row in prompts)
    alone = learnt(model, prompts, tokens)
    padded = learnt(model, [batch_of(prompts, "right")], tokens)
    assert not calls  # nothing is attached yet
    by_transformers = learnt(model, [pack_of(prompts)], tokens)
    assert not calls  # the mask that transformers makes of the positions
    assert attach_packed_attention(model) == attach_packed_attention(model) == {"sdpa": SLICES}.get(attn, attn)
    packed = learnt(model, [pack_of(prompts)], tokens)
    assert calls == ({"slices": LAYERS} if attn == "sdpa" else {})
    two = learnt(model, [pack_of(prompts[:2]), pack_of(prompts[2:])], tokens)
    for found in (padded, by_transformers, packed, two):
        assert_equal(found, alone)


def test_a_row_without_borders_goes_the_plain_way(calls: Counter) -> None:
    model, other = long_model(), long_model()
    attach_packed_attention(model)
    batch = without(batch_of(rows(), "left"), "labels")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, other(**batch).logits)
        assert calls == {"plain": LAYERS}
        one = without(rows()[0], "labels")
        options = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(**one, **options), other.generate(**one, **options))
        positions = torch.cat([torch.arange(20), torch.arange(90)])[None]  # packed, and nobody says where
        ids = torch.cat([rows()[1]["input_ids"], rows()[2]["input_ids"]], dim=1)
        there = model(ids, position_ids=positions, use_cache=False).logits
        assert_close(there, other(ids, position_ids=positions, use_cache=False).logits, rtol=0, atol=1e-5)
    assert calls["slices"] == 0
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    assert tower.config._attn_implementation == "sdpa" != model.config._attn_implementation


def test_no_mask_and_no_cache_of_a_pack(calls: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `use_cache` left alone transformers takes a pack for one sequence; the mask of one is never made."""
    from transformers import masking_utils

    model, prompts = long_model(), rows()[1:3]
    attach_packed_attention(model)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: pytest.fail("looked for borders"))
    with torch.no_grad():
        output = model(**without(pack_of(prompts), "labels"))
        assert output.past_key_values is None and calls == {"slices": LAYERS}
    monkeypatch.undo()
    with torch.no_grad():
        apart = [model(**without(one, "labels")).logits[0] for one in prompts]
    assert_close(output.logits[0], torch.cat(apart), rtol=0, atol=1e-4)


def test_checkpoints_go_the_same_way(calls: Counter) -> None:
    model, prompts = long_model(), rows()[:3]
    attach_packed_attention(model)
    expected = learnt(model, [pack_of(prompts)], 7)
    for reentrant in (False, True):
        calls.clear()
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_equal(learnt(model, [pack_of(prompts)], 7), expected)
        assert calls == {"slices": 2 * LAYERS}


@pytest.mark.parametrize("newer", [False, True])
def test_the_kernel_for_several_lengths_is_called_in_both_of_its_forms(
    newer: bool, calls: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.10 says `is_causal` and takes no scale, later ones a window and the scale; here sdpa answers for it."""
    seen: list[dict] = []

    def attend(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **how: Any) -> Any:
        seen.append({"borders": cu_q.tolist(), "longest": max_q, **how})
        assert cu_q is cu_k and max_q == max_k and query.dtype == key.dtype == value.dtype == torch.bfloat16
        parts = [part.split(cu_q.diff().tolist()) for part in (query, key, value)]
        scale = {"scale": how["scale"]} if "scale" in how else {}
        sdpa = torch.nn.functional.scaled_dot_product_attention
        made = [sdpa(*(p.transpose(0, 1) for p in one), is_causal=True, **scale) for one in zip(*parts, strict=True)]
        return torch.cat(made, dim=1).transpose(0, 1)

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal)

    def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), scale=None):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size, scale=scale)

    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = new if newer else old  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(packed_attention, "flash_operator", lambda: None)
    monkeypatch.setattr(packed_attention, "_runs_varlen", lambda device: True)
    model, pack = long_model().bfloat16(), pack_of(rows()[1:3])
    expected = model(**pack, use_cache=False)
    assert attach_packed_attention(model) == VARLEN
    found = model(**pack, use_cache=False)
    how = {"window_size": (-1, 0), "scale": 96**-0.5} if newer else {"is_causal": True}
    assert seen == [{"borders": pack["cu_seqlens"].tolist(), "longest": pack["max_seqlen"], **how}] * LAYERS
    assert not calls
    assert_close(found.loss, expected.loss, rtol=0, atol=2e-2)
    query, key, value = (torch.randn(1, 2, 5, 16, dtype=torch.bfloat16) for _ in range(3))
    layer, borders = model.model.layers[0].self_attn, torch.tensor([0, 3, 5], dtype=torch.int32)
    same = {"cu_seqlens": borders, "max_seqlen": 3, "scaling": 0.7}
    by = [
        packed_attention.packed_attention(layer, query, key, value, None, kernel=k, **same)
        for k in (varlen_kernel(), None)
    ]
    assert_close(by[0][0], by[1][0], rtol=0, atol=2e-2)
    model.float()
    calls.clear(), seen.clear()
    model(**pack, use_cache=False)
    assert calls == {"slices": LAYERS} and not seen  # the kernel knows half precision only


def test_flash_attention_4_is_taken_where_it_is_installed(calls: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself is not for CPUs: what it is handed is looked at, and computed plainly."""
    seen: list[dict] = []

    def attend(query: Any, key: Any, value: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, **how: Any) -> Any:
        assert cu_seqlens_q is cu_seqlens_k
        seen.append({"borders": cu_seqlens_q.tolist(), **how})
        parts = zip(*(part.split(cu_seqlens_q.diff().tolist()) for part in (query, key, value)), strict=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        scale = how["softmax_scale"]
        made = [sdpa(*(part.transpose(0, 1) for part in one), is_causal=True, scale=scale) for one in parts]
        return torch.cat(made, dim=1).transpose(0, 1), None  # and the logarithms of sums, as its newer versions do

    module = ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(packed_attention, "_runs_flash_4", lambda device: True)
    monkeypatch.setattr(packed_attention, "MANY", 1)  # the pack is small
    model, pack = long_model().bfloat16(), pack_of(rows()[1:3])
    expected = model(**pack, use_cache=False)
    assert fastest_kernel(torch.device("meta"), compiled=True)[0] != FLASH_4  # it would cut a compiled layer in two
    assert attach_packed_attention(model) == attach_packed_attention(model) == FLASH_4
    found = model(**pack, use_cache=False)
    longest = {"max_seqlen_q": pack["max_seqlen"], "max_seqlen_k": pack["max_seqlen"]}
    how = {"borders": pack["cu_seqlens"].tolist(), **longest, "softmax_scale": 96**-0.5, "causal": True}
    assert seen == [{**how, "deterministic": False}] * LAYERS and not calls
    assert_close(found.loss, expected.loss, rtol=0, atol=2e-2)
    model.float()
    seen.clear()
    model(**pack, use_cache=False)
    assert calls == {"slices": LAYERS} and not seen  # the kernel knows half precision only


def test_packs_of_few_tokens_take_the_kernel_that_is_launched_faster() -> None:
    told: list[tuple[str, Any]] = []
    few, many = (lambda *args, own=own: told.append((own, args[1])) or args[0] for own in ("few", "many"))
    attend = packed_attention.by_tokens(few, many)
    for tokens in (packed_attention.MANY - 1, packed_attention.MANY):
        query = torch.zeros(tokens, 1, 8)
        assert attend(query, "borders") is query
    assert told == [("few", "borders"), ("many", "borders")]


def test_without_flash_attention_4_torch_has_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    monkeypatch.setattr(packed_attention, "_runs_flash_4", lambda device: True)
    assert fastest_kernel(torch.device("cpu")) == (SLICES, None)
    name, _ = fastest_kernel(torch.device("meta"))
    assert name == (SLICES if varlen_kernel() is None else VARLEN)


def test_flash_attention_gets_the_borders_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        assert mask is None
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        return packed_attention.by_slices(module, query, key, value, lengths, dropout=0.0, scaling=None), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model, pack = long_model(), pack_of(rows()[1:3])
    expected = model(**pack).loss
    model.config._attn_implementation_internal = "flash_attention_2"  # the package itself need not be here
    assert attach_packed_attention(model) == "flash_attention_2"
    assert_close(model(**pack).loss, expected, rtol=0, atol=1e-5)
    assert len(seen) == LAYERS
    for kwargs in seen:
        assert kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"] is pack["cu_seqlens"]
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == pack["max_seqlen"]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_keeps_samples_apart_by_a_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here, and forward alone: torch has no backward pass of it for CPUs."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    seen: list[Any] = []

    def not_compiled(*parts: torch.Tensor, training: bool = False, **how: Any) -> Any:
        seen.append(how["block_mask"])
        return flex_attention(*parts, **how)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", not_compiled)
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **how: create_block_mask(**how | {"_compile": False})
    )
    model, prompts = long_model(), rows()[1:3]
    with torch.no_grad():
        apart = [model(**without(one, "labels")).logits[0] for one in prompts]
        model.model.set_attn_implementation({"": "flex_attention", "vision_config": "sdpa"})
        assert attach_packed_attention(model) == "flex_attention"
        found = model(**without(pack_of(prompts), "labels")).logits[0]
    assert len(seen) == LAYERS and all(isinstance(mask, BlockMask) for mask in seen)
    assert_close(found, torch.cat(apart), rtol=0, atol=1e-4)


def test_on_the_meta_device_the_kernel_stands_for_the_gpus(calls: Counter) -> None:
    """So that operations, bytes and launches can be counted without one."""
    kernel = varlen_kernel()
    if kernel is None:
        pytest.skip("needs torch 2.10: this one has no torch.nn.attention.varlen")
    assert packed_attention._runs_varlen(torch.device("meta")) and not packed_attention._runs_varlen(
        torch.device("cpu")
    )
    rows = [torch.empty(1, 2, 5, 96, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)]
    borders = {"cu_seqlens": torch.empty(3, dtype=torch.int32, device="meta"), "max_seqlen": 3}
    assert kernel.__qualname__.startswith("flash_operator."), (
        "torch's operator itself, without varlen's Python around it"
    )
    asked = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.aten._flash_attention_forward.default:
                names = [argument.name for argument in operator._schema.arguments]
                asked.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
            return operator(*args, **(kwargs or {}))

    with Seen():
        found, _ = packed_attention.packed_attention(
            torch.nn.Module(), *rows, None, kernel=kernel, scaling=0.7, **borders
        )
    (one,) = asked
    assert one["cum_seq_q"] is one["cum_seq_k"] is borders["cu_seqlens"] and one["max_q"] == one["max_k"] == 3
    assert (one["is_causal"], one["dropout_p"], one["scale"]) == (True, 0.0, 0.7)
    assert found.shape == (1, 5, 2, 96) and not calls
    found.sum().backward()
    assert all(row.grad.shape == row.shape for row in rows)


def test_a_window_over_part_of_the_context_stays_with_transformers(calls: Counter) -> None:
    model = long_model(sliding_window=16)
    assert attach_packed_attention(model) == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [FLASH_4, VARLEN, "flex_attention"])
def test_the_kernels_of_the_gpu_equal_transformers_mask(
    name: str, calls: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == VARLEN:
        monkeypatch.setattr(packed_attention, "_runs_flash_4", lambda device: False)
    if name in (FLASH_4, VARLEN) and fastest_kernel(torch.device("cuda"))[0] != name:
        pytest.skip("needs torch 2.10 and a GPU of compute capability 8.0, or phi3v[flash] and one of 9 or 10")
    monkeypatch.setattr(packed_attention, "MANY", 1)  # the pack is small
    slow, fast = long_model().cuda().bfloat16(), long_model().cuda().bfloat16()
    pack = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in pack_of(rows()).items()}
    expected = learnt(slow, [pack], 7)
    if name == "flex_attention":
        fast.model.set_attn_implementation({"": name, "vision_config": "sdpa"})
    assert attach_packed_attention(fast) == name
    found = learnt(fast, [pack], 7)
    assert not calls
    assert found[0] == pytest.approx(expected[0], rel=2e-2)
    largest = max(float(gradient.norm()) for gradient in expected[1].values())
    for weight, gradient in expected[1].items():  # some are zero but for rounding
        assert float((found[1][weight] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-3 * largest, weight
