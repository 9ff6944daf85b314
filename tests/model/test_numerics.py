"""One model, many ways to run it: attention kernels, checkpointing, half precision, offloading, compilation."""

import pytest
import torch
from golden_models import golden_set, tiny_model
from tiny_prompts import batch_of, prompt, without
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.register import register

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def batch():
    """Three rows: an image, two images, none; padded on the right."""
    return batch_of([prompt(0, [4, 9], [(1, 1)]), prompt(1, [3, 2, 6], [(1, 2), (1, 1)]), prompt(2, [15])], "right")


def gradients(model) -> dict[str, torch.Tensor]:
    return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


def assert_close_gradients(actual: dict, expected: dict, share: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        limit = share * max(float(value.abs().max()), 1e-3)  # the floor: rounding noise of the tower's key biases
        assert_close(actual[key], value, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def eager(batch):
    """Logits, loss and gradients with the plainest attention."""
    model = tiny_model(attn="eager")
    output = model(**batch, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), gradients(model)


def test_sdpa_equals_eager(batch, eager):
    model = tiny_model(attn="sdpa")
    assert model.config._attn_implementation == "sdpa"
    output = model(**batch, use_cache=False)
    output.loss.backward()
    real = batch["attention_mask"].bool()
    assert_close(output.logits[real], eager[0][real], rtol=0, atol=TOLERANCE)
    assert_close(output.loss, eager[1], rtol=0, atol=1e-5)
    assert_close_gradients(gradients(model), eager[2], 1e-4)


@pytest.mark.slow  # the kernel is compiled first
def test_flex_attention_equals_eager(batch, eager):
    model = tiny_model(attn="flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert_close(logits[real], eager[0][real], rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_flash_attn_2_available()), reason="needs a GPU and the package flash-attn"
)
def test_flash_attention_is_close_to_eager(batch):
    on_gpu = {key: value.cuda() for key, value in batch.items()}
    flash = tiny_model(attn="flash_attention_2").cuda().bfloat16()
    plain = tiny_model(attn="eager").cuda().bfloat16()
    real = on_gpu["attention_mask"].bool()
    with torch.no_grad():
        difference = (flash(**on_gpu).logits - plain(**on_gpu).logits)[real].float()
    assert difference.abs().mean() < 0.05


def test_the_attention_is_the_callers_choice(batch):
    """Asking for a kernel changes the tower too, and can be changed later."""
    model = tiny_model(attn="eager")
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    assert tower.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == tower.config._attn_implementation == "sdpa"
    with torch.no_grad():
        model(**batch)


@pytest.mark.parametrize("at_labels", [False, True])
def test_gradient_checkpointing_changes_no_gradient(batch, at_labels):
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        calls = []
        tower = model.model.vision_embed_tokens.img_processor.vision_model
        tower.encoder.layers[0].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append("tower"))
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append("decoder"))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        output = model(**batch, trained_logits_only=at_labels)
        output.loss.backward()
        assert calls.count("tower") == calls.count("decoder") == (2 if checkpointing else 1), (
            "forward, and again backward"
        )
        results.append((output.loss.detach(), gradients(model)))
    assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    assert_close_gradients(results[1][1], results[0][1], 1e-6)


def test_gradient_checkpointing_with_a_frozen_tower_and_frozen_embeddings(batch):
    """What LoRA does: nothing before the decoder learns, and the tower is then not run twice."""
    model = tiny_model().train()
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    calls = []
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    tower.encoder.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append("tower"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert calls == ["tower"]
    assert model.model.layers[1].mlp.down_proj.weight.grad.abs().max() > 0


def test_bfloat16_is_close_and_keeps_its_rope(batch, eager):
    model = tiny_model().bfloat16()
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    reference = tiny_model().model.rotary_emb
    assert torch.equal(model.model.rotary_emb.short_inv_freq, reference.short_inv_freq)
    assert torch.equal(model.model.rotary_emb.long_inv_freq, reference.long_inv_freq)
    output = model(**batch)
    output.loss.backward()
    real = batch["attention_mask"].bool()
    assert output.logits.dtype == torch.bfloat16
    # Random weights give logits of size 9 or so; 8 bits of mantissa over three layers leave an error of a few per cent.
    assert (output.logits.float() - eager[0])[real].abs().mean() < 0.05
    assert output.loss.item() == pytest.approx(eager[1].item(), abs=0.05)
    alike = [
        torch.cosine_similarity(a.float().flatten(), eager[2][key].flatten(), dim=0)
        for key, a in gradients(model).items()
        if eager[2][key].norm() > 1e-2
    ]
    assert min(alike) > 0.97
    one = without(prompt(0, [4, 9], [(1, 1)]), "labels")  # processors without bfloat16 units emulate them, slowly
    assert model.generate(**one, max_new_tokens=4, do_sample=False).shape[1] == one["input_ids"].shape[1] + 4


def test_autocast_trains_float32_weights():
    """The original fails here: it places bfloat16 features into float32 embeddings."""
    one = prompt(0, [4, 9], [(1, 1)])
    model = tiny_model().train()
    with torch.no_grad():
        plain = model(**one).loss.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**one).loss
        loss.backward()
        if step == 0:
            assert loss.item() == pytest.approx(plain, abs=0.05)
            assert all(value.dtype == torch.float32 for value in gradients(model).values())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(**one, trained_logits_only=True).loss, model(**one).loss, rtol=0, atol=0.02)


def test_device_map_with_offload_to_cpu_and_disk(tmp_path, batch):
    """A memory limit that fits half the model: the rest waits on the disk, and the answers are the same."""
    register()
    tiny_model().save_pretrained(tmp_path / "model")
    options = {
        "device_map": "auto",
        "max_memory": {"cpu": 3_000_000},
        "offload_folder": tmp_path / "disk",
        "dtype": torch.float32,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}, model.hf_device_map
    on_disk = [name for name, place in model.hf_device_map.items() if place == "disk"]
    assert any("layers" in name or "vision" in name for name in on_disk)
    reference = tiny_model()
    with torch.no_grad():
        assert_close(model(**batch).logits, reference(**batch).logits, rtol=0, atol=TOLERANCE)
    one = without(batch, "labels")
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**one, **options), reference.generate(**one, **options))


@pytest.mark.parametrize("split", ["vision on disk", "decoder on disk"])
def test_device_map_by_hand(tmp_path, batch, split):
    register()
    tiny_model().save_pretrained(tmp_path / "model")
    vision, decoder = ("disk", "cpu") if split == "vision on disk" else ("cpu", "disk")
    device_map = {"model.vision_embed_tokens": vision, "model.layers": decoder, "model.embed_tokens": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": decoder}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk", dtype=torch.float32
    )
    with torch.no_grad():
        assert_close(model(**batch).logits, tiny_model()(**batch).logits, rtol=0, atol=TOLERANCE)


def test_generation_across_the_limit_with_offload(tmp_path):
    register()
    reference = tiny_model("tiny_phi3v_long")
    reference.save_pretrained(tmp_path / "model")
    options = {
        "device_map": "auto",
        "max_memory": {"cpu": 3_000_000},
        "offload_folder": tmp_path / "disk",
        "dtype": torch.float32,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert "disk" in model.hf_device_map.values()
    one = without(prompt(0, [60]), "labels")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**one, **options), reference.generate(**one, **options))


@pytest.fixture
def compiler():
    """A clean compiler before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_decoder_layer_compiles_in_one_piece(compiler, batch, backend):
    model = tiny_model()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
        logits = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert_close(logits[real], expected[real], rtol=0, atol=TOLERANCE)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_decoder_layer_trains(compiler, batch, eager):
    model = tiny_model()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    model(**batch, use_cache=False).loss.backward()
    assert_close_gradients(gradients(model), eager[2], 1e-4)


def test_outputs_on_request():
    model, one = tiny_model(attn="eager"), prompt(0, [12])
    with torch.no_grad():
        output = model(**one, output_hidden_states=True, output_attentions=True)
        plain = model(**one, return_dict=False)
    assert len(output.hidden_states) == 4 and output.hidden_states[0].shape == (1, 12, 192)
    assert len(output.attentions) == 3 and output.attentions[0].shape == (1, 2, 12, 12)
    assert torch.equal(plain[1], output.logits), "a tuple begins with the loss"


@pytest.mark.parametrize("window", [8, 131072])
def test_a_window_that_bites_hides_keys_and_the_published_one_does_not(window):
    """As transformers counts: a query sees `window` keys, itself included."""
    model, one = tiny_model(attn="eager", sliding_window=window), prompt(0, [40])
    with torch.no_grad():
        output = model(**one, output_attentions=True, use_cache=False)
    query, key = torch.arange(40)[:, None], torch.arange(40)[None]
    seen = (key <= query) & (query - key < window)
    for attention in output.attentions:
        assert torch.equal(attention[0].min(0).values > 0, seen)
    with torch.no_grad():
        new = model.generate(**without(one, "labels"), max_new_tokens=4, do_sample=False)
        again = model.generate(**without(one, "labels"), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(new, again)


def test_dropout_and_training_mode_follow_the_config():
    """Both checkpoints have no dropout: train() equals eval(). A config with one drops image features as well."""
    one = prompt(0, [4, 9], [(1, 1)])
    model = tiny_model()
    with torch.no_grad():
        expected = model(**one).logits
        assert torch.equal(model.train()(**one).logits, expected)
        dropping = tiny_model(embd_pdrop=0.5)
        assert torch.equal(dropping(**one).logits, expected)
        assert not torch.allclose(dropping.train()(**one).logits, expected)


def test_the_embeddings_of_padding_learn_nothing_and_can_be_resized():
    model, one = tiny_model(), prompt(0, [12])
    one["input_ids"][0, 0] = model.config.pad_token_id
    model(**one).loss.backward()
    assert not model.model.embed_tokens.weight.grad[model.config.pad_token_id].any()
    model.resize_token_embeddings(520)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 520
    assert model(**one).logits.shape[-1] == 520


def test_models_can_be_made_from_a_config_alone():
    with torch.device("meta"):
        model = Phi3VForCausalLM(golden_set().config("tiny_phi3v"))
    assert {value.device.type for value in model.parameters()} == {"meta"}
