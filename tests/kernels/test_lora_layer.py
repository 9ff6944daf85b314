"""The hand-written layer against PEFT on transformers' layer: whole tensors, and which way was taken, each time."""

import copy
from typing import Any

import pytest
import torch
from lora_models import loss_and_gradients, relative_error, small_decoder, twice, with_lora
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.kernels.lora_layer import HandWrittenLayer, attach_fast_lora, detach_fast_lora, fast_lora_state

CLOSE = 1e-5
LAYERS = 3
on_each_device = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)


def embeddings(rows: int = 2, positions: int = 11, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Input embeddings of the small decoder."""
    return torch.randn(rows, positions, 48, generator=torch.Generator().manual_seed(2)).to(dtype)


def compare(plain: Any, fast: Any, *, calls: int = LAYERS, limit: float = CLOSE, **inputs: Any) -> None:
    """Output, input gradient and every adapter gradient are equal, and the fast model took the fast way."""
    before = fast_lora_state(fast).calls.get("fast", 0)
    hidden = embeddings().to(plain.device)
    torch.manual_seed(7)
    expected = loss_and_gradients(plain, hidden, **inputs)
    torch.manual_seed(7)
    found = loss_and_gradients(fast, hidden, **inputs)
    state = fast_lora_state(fast)
    assert state.calls == {"fast": before + calls}, state
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= limit, {name: error for name, error in errors.items() if error > limit}


OPTIONS = {
    "all projections": {},
    "attention alone": {"target_modules": ["qkv_proj", "o_proj"]},
    "one projection": {"target_modules": ["down_proj"]},
    "no qkv_proj": {"target_modules": ["o_proj", "gate_up_proj"]},
    "as wide as the columns": {"r": 16},
    "rslora": {"r": 20, "use_rslora": True},
    "ranks and alphas apart": {"rank_pattern": {"o_proj": 1, "down_proj": 70}, "alpha_pattern": {"qkv_proj": 3}},
    "one layer of three": {"layers_to_transform": [1]},
    "dropout": {"lora_dropout": 0.3},
}


@on_each_device
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_are_pefts(options: dict[str, Any], device: str) -> None:
    plain, fast = (model.to(device) for model in twice(**options))
    expected = 1 if "layers_to_transform" in options else LAYERS
    assert attach_fast_lora(fast, force=True) == expected
    compare(plain, fast, calls=expected)


def test_gradients_of_a_padded_batch() -> None:
    plain, fast = twice()
    attach_fast_lora(fast, force=True)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    compare(plain, fast, attention_mask=mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_packed_rows(attention: str) -> None:
    """Two samples in a row: positions restart, and attention is told apart by whatever interface the config names."""
    plain, fast = twice(sizes={"attn_implementation": attention})
    attach_fast_lora(fast, force=True)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]]).expand(2, -1)
    compare(plain, fast, position_ids=positions)


def test_arguments_reach_the_attention_interface() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[dict[str, Any]] = []

    def listening(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("listening_for_a_test", listening)
    plain, fast = twice()
    attach_fast_lora(fast, force=True)
    lengths = torch.tensor([0, 7, 11], dtype=torch.int32)
    for model in (plain, fast):
        model.base_model.model.config._attn_implementation = "listening_for_a_test"
        loss_and_gradients(model, embeddings(1), cu_seqlens=lengths, max_seqlen=7)
    assert fast_lora_state(fast).calls == {"fast": LAYERS}
    assert len(seen) == 2 * LAYERS
    assert seen[LAYERS]["cu_seqlens"] is lengths
    assert [sorted(call) for call in seen[:LAYERS]] == [sorted(call) for call in seen[LAYERS:]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant: bool) -> None:
    """Each layer runs twice; under dropout the second time must draw the same masks."""
    plain, fast = twice(lora_dropout=0.2)
    attach_fast_lora(fast, force=True)
    for model in (plain, fast):
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(plain, fast, calls=2 * LAYERS)


class TrimmedLayer(Phi3DecoderLayer):
    """A last layer that gives some positions alone, as the plain way to say it."""

    def forward(self, hidden_states, kept_positions=None, **kwargs):
        result = super().forward(hidden_states, **kwargs)
        return result if kept_positions is None else result.flatten(0, 1).index_select(0, kept_positions)[None]


def test_a_last_layer_works_at_kept_positions_alone() -> None:
    kept, results = torch.tensor([3, 10, 15]), []
    for model in twice():
        core = model.base_model.model.model
        layer = core.layers[-1]
        layer.__class__ = TrimmedLayer
        if results:
            assert attach_fast_lora(model, force=True) == LAYERS
        hidden = embeddings().requires_grad_(True)
        angles = core.rotary_emb(hidden, torch.arange(11)[None])
        result = layer(hidden, attention_mask=None, position_embeddings=angles, kept_positions=kept)
        result.sin().sum().backward()
        trained = [weight.grad for weight in layer.parameters() if weight.requires_grad]
        results.append([result.detach(), hidden.grad, *trained])
    assert results[0][0].shape == (1, 3, 48)
    assert fast_lora_state(model).calls == {"fast": 1}
    assert all(relative_error(found, expected) < CLOSE for found, expected in zip(*reversed(results), strict=True))
    assert detach_fast_lora(model) == LAYERS and type(layer) is TrimmedLayer


def test_adapters_in_float32_on_a_bfloat16_base_under_autocast() -> None:
    """As training does: both ways stay near the same weights in float32, the fast one no further off."""
    plain = with_lora(small_decoder(dtype=torch.bfloat16))
    for weight in plain.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).float()
    assert attach_fast_lora(fast, force=True) == LAYERS
    expected = loss_and_gradients(exact, embeddings())
    errors = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradients(model, embeddings(dtype=torch.bfloat16))
        errors.append([relative_error(found[name], expected[name]) for name in expected])
        assert all(found[name].dtype == torch.float32 for name in expected if "lora" in name)
    assert fast_lora_state(fast).calls == {"fast": LAYERS}
    assert max(errors[1]) < 0.05 and sum(errors[1]) <= 1.1 * sum(errors[0])


@on_each_device
@pytest.mark.parametrize("rank", [4, 16])
def test_ten_steps_end_with_the_same_adapter(rank: int, device: str) -> None:
    """Each step has other A and B; so have the steps of a copy that is made on the way."""
    plain, fast = (model.to(device) for model in twice(r=rank))
    attach_fast_lora(fast, force=True)
    loss_and_gradients(fast, embeddings().to(device))
    fast = copy.deepcopy(fast)
    for model in (plain, fast):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimiser = torch.optim.AdamW(weights, lr=1e-3)
        for _ in range(10):
            loss_and_gradients(model, embeddings().to(device))
            optimiser.step()
    assert fast_lora_state(fast).calls == {"fast": 11 * LAYERS}
    trained = {name: weight for name, weight in plain.named_parameters() if weight.requires_grad}
    for name, weight in fast.named_parameters():
        if weight.requires_grad:
            assert relative_error(weight.detach(), trained[name].detach()) < CLOSE, name


@on_each_device
@pytest.mark.parametrize("rank", [4, 16])
def test_weights_set_behind_autograds_back_are_used(rank: int, device: str) -> None:
    """Optimisers in other languages write where no version counter sees it, as `.data` does."""
    plain, fast = (model.to(device) for model in twice(r=rank))
    attach_fast_lora(fast, force=True)
    compare(plain, fast)
    together = fast.base_model.model.model.layers[0].lora_state.widened.together
    assert together.passes == 1 and len(together.filled or []) == 0  # what is new is scaled where it is made
    compare(plain, fast)
    assert together.passes == 2 and len(together.filled) == 4 * LAYERS and (together.table is None) == (device == "cpu")
    for model in (plain, fast):
        for name, weight in model.named_parameters():
            if "lora_" in name or "base_layer" in name:
                weight.data = weight.data * 0.5 if "base_layer" in name else weight.data.mul_(2)
    compare(plain, fast)


@on_each_device
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("again", [{1}, {0, 2}])
def test_they_are_used_whichever_layers_are_computed_again(again: set[int], reentrant: bool, device: str) -> None:
    """What a backward pass computes again is no forward pass: the next one scales B of all layers anew, and so does one
    behind a pass in which the first layer went the plain way.
    """
    plain, fast = (model.to(device) for model in twice(r=16))
    attach_fast_lora(fast, force=True)
    for model in (plain, fast):
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for number, layer in enumerate(model.base_model.model.model.layers):
            layer.gradient_checkpointing = number in again
    first = fast.base_model.model.model.layers[0]
    together = first.lora_state.widened.together
    for hooked, grown in ((False, 1.5), (False, 0.6), (True, 1.5), (False, 0.6), (False, 1.0)):
        handle = first.mlp.register_forward_hook(lambda *_: None) if hooked else None
        found, expected = (loss_and_gradients(model, embeddings().to(device)) for model in (fast, plain))
        worst = max(relative_error(found[name], expected[name]) for name in expected)
        assert worst < CLOSE, together.passes
        if handle is not None:
            handle.remove()
        for model in (plain, fast):
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.data.mul_(grown)
    assert together.passes == together.scaled == 5 and first.lora_state.calls["a hook on a part of the layer"] >= 1


def test_names_and_stored_adapter_stay(tmp_path: Any) -> None:
    plain, fast = twice()
    attach_fast_lora(fast, force=True)
    loss_and_gradients(fast, embeddings())
    assert isinstance(fast.base_model.model.model.layers[0], HandWrittenLayer)
    ours, theirs = fast.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    stored = [(tmp_path / way / "adapter_model.safetensors").read_bytes() for way in ("plain", "fast")]
    assert stored[0] == stored[1]


def test_detaching_gives_the_plain_model_back() -> None:
    plain, fast = twice()
    attach_fast_lora(fast, force=True)
    loss_and_gradients(fast, embeddings())
    assert detach_fast_lora(fast) == LAYERS
    assert fast_lora_state(fast).attached == 0
    assert all(weight.is_contiguous() for weight in fast.parameters())
    expected, found = loss_and_gradients(plain, embeddings()), loss_and_gradients(fast, embeddings())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_merged_and_disabled_adapters_take_the_plain_way() -> None:
    plain, fast = twice()
    attach_fast_lora(fast, force=True)
    loss_and_gradients(fast, embeddings())
    with torch.no_grad(), plain.disable_adapter(), fast.disable_adapter():
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(fast(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    reasons = fast_lora_state(fast).calls
    assert reasons == {"fast": LAYERS, "an adapter is disabled or merged": LAYERS}
    merged = [model.merge_and_unload() for model in (plain, fast)]
    torch.testing.assert_close(merged[1](ids, use_cache=False).logits, merged[0](ids, use_cache=False).logits)
    assert fast_lora_state(merged[1]).calls["no active adapter"] == LAYERS


def test_generation_takes_the_plain_way() -> None:
    _, fast = twice()
    attach_fast_lora(fast, force=True)
    fast.eval()
    fast.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert set(fast_lora_state(fast).calls) == {"generation"}


REFUSED = {
    "uses DoRA or another variant of LoRA": {"use_dora": True},
    "has a LoRA bias or a transposed weight": {"lora_bias": True},
    "no LoRA on it": {"target_modules": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@pytest.mark.parametrize(("reason", "options"), REFUSED.items(), ids=REFUSED.keys())
def test_what_is_not_served_says_why(reason: str, options: dict[str, Any]) -> None:
    model = with_lora(small_decoder(), **options)
    assert attach_fast_lora(model, force=True) == 0
    state = fast_lora_state(model, force=True)
    assert state.attached == 0 and state.layers == LAYERS
    assert [reason in text for text in state.reasons] == [True], state.reasons


def test_other_layers_say_why() -> None:
    """Trained bases, quantised bases, other activations, dropout on the residual, and the CPU without `force`."""
    model = with_lora(small_decoder())
    assert attach_fast_lora(model) == 0
    assert fast_lora_state(model).reasons == {"no CUDA device": LAYERS}
    model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)
    model.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    model.base_model.model.model.layers[2].self_attn.o_proj.base_layer.__class__ = type(
        "Linear4bit", (torch.nn.Linear,), {}
    )
    reasons = {
        "down_proj is trained itself": 1,
        "a norm is trained or of another kind": 1,
        "o_proj is a Linear4bit": 1,
    }
    assert fast_lora_state(model, force=True).reasons == reasons
    for changes, text in (
        ({"hidden_act": "gelu"}, "the MLP uses gelu"),
        ({"resid_pdrop": 0.1}, "the residual has dropout"),
    ):
        other = with_lora(small_decoder(layers=1, **changes))
        assert fast_lora_state(other, force=True).reasons == {text: 1}


def test_compiling_layer_by_layer_passes_hand_written_ones_by() -> None:
    plain, fast = twice(layers_to_transform=[0, 2])
    assert attach_fast_lora(fast, force=True) == 2
    layers = fast.base_model.model.model.layers
    for layer in layers:
        layer.compile(backend="eager")
    assert [layer._compiled_call_impl is not None for layer in layers] == [False, True, False]
    compare(plain, fast, calls=2)
    for layer in plain.base_model.model.model.layers:
        layer.compile(backend="eager")
    assert attach_fast_lora(plain, force=True) == 0
    assert fast_lora_state(plain, force=True).reasons == {"the layer is compiled": LAYERS}


def test_a_hook_on_a_part_is_called() -> None:
    _, fast = twice()
    attach_fast_lora(fast, force=True)
    heard = []
    fast.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *args: heard.append(1))
    loss_and_gradients(fast, embeddings())
    assert heard == [1]
    assert fast_lora_state(fast).calls == {"fast": LAYERS - 1, "a hook on a part of the layer": 1}


def test_less_is_kept_for_the_backward_pass() -> None:
    """Bytes that autograd keeps, counted where it keeps them."""
    kept = []
    for model in twice():
        attach_fast_lora(model, force=True) if kept else None
        seen: dict[int, int] = {}
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}

        def pack(tensor: torch.Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_and_gradients(model, embeddings(2, 64))
        kept.append(sum(seen.values()))
    assert kept[1] < 0.65 * kept[0], kept
