"""Generation about images: conversations that go on with their cache, assistants that draft, Microsoft's ids.

The oracle is a full pass at every step: `use_cache=False`.
"""

import copy

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, batch_of, prompt, without
from torch.testing import assert_close
from transformers import DynamicCache

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

TOLERANCE = 1e-4
GREEDY = {"do_sample": False, "max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}


def assert_recomputed(model, inputs, output):
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(output.sequences, expected.sequences)
    for one, other in zip(output.scores, expected.scores, strict=True):
        assert_close(one, other, rtol=0, atol=TOLERANCE)


@pytest.fixture
def rebuilt(monkeypatch):
    """Rows whose cache was rebuilt, in order."""
    log: list[int] = []
    full_pass = Phi3VForCausalLM._full_pass

    def spy(self, input_ids, row, pad, kwargs):
        fresh = full_pass(self, input_ids, row, pad, kwargs)
        log.append(row)
        return fresh

    monkeypatch.setattr(Phi3VForCausalLM, "_full_pass", spy)
    return log


@pytest.mark.parametrize(
    ("limit", "carrier"), [(660, "negative ids"), (340, "image_token_id")], ids=["within", "crosses"]
)
def test_a_conversation_about_images_continues_with_its_cache(rebuilt, limit, carrier):
    """Turn 1 shows an image, turn 2 asks on, turn 3 shows another: all images go along, and are seen once."""
    model = tiny_model("tiny_phi3v_long", original_max_position_embeddings=limit, image_token_id=IMAGE)
    one = without(prompt(0, [3, 4], [(1, 1)], image_id=None if carrier == "negative ids" else IMAGE), "labels")
    images = {key: one[key] for key in ("pixel_values", "image_sizes")}
    cache = DynamicCache(config=model.config)
    answer = model.generate(**one, max_new_tokens=5, do_sample=False, past_key_values=cache)
    whole = torch.cat([answer, prompt(5, [20])["input_ids"]], dim=1)
    turn = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if limit == 340:
        with pytest.raises(ValueError, match="pass pixel_values and image_sizes of all images in input_ids") as caught:
            model.generate(**turn, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert "\n" not in str(caught.value)
    else:
        free = model.generate(**turn, past_key_values=copy.deepcopy(cache), **GREEDY)
    calls: list[int] = []
    hook = model.model.vision_embed_tokens.register_forward_hook(lambda *call: calls.append(1))
    output = model.generate(**turn, **images, past_key_values=cache, **GREEDY)
    hook.remove()
    assert (len(calls), rebuilt) == ((1, [0]) if limit == 340 else (0, []))
    if limit == 660:
        assert torch.equal(output.sequences, free.sequences)
    assert_recomputed(model, {**turn, **images}, output)

    other = without(prompt(1, [3, 4], [(1, 1)], image_id=IMAGE if carrier == "image_token_id" else None), "labels")
    shown = other["input_ids"] - (other["input_ids"] < 0).long()  # -1, its first image, is the second of the whole
    whole = torch.cat([output.sequences, shown], dim=1)
    both = {key: torch.cat([images[key], other[key]]) for key in images}
    turn = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **both}
    output = model.generate(**turn, past_key_values=cache, **GREEDY)
    assert rebuilt == [0], "the third turn finds a long cache, or crosses"
    assert_recomputed(model, turn, output)


def test_images_given_again_beside_a_cache():
    """Without image tokens among the new columns they are ignored; with some, only whole images count."""
    model = tiny_model(image_token_id=IMAGE)
    one = without(prompt(0, [3, 4], [(1, 1)], image_id=IMAGE), "labels", "attention_mask")
    images = {key: one[key] for key in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        expected = model(**one).logits[:, -2:]
        cache = model(one["input_ids"][:, :-2], **images).past_key_values
        again = model(one["input_ids"][:, -2:], past_key_values=cache, **images).logits
        assert_close(again, expected, rtol=0, atol=TOLERANCE)
        cache = model(one["input_ids"][:, :3]).past_key_values
        with pytest.raises(ValueError, match="do not match: 300 tokens, 313 features"):
            model(one["input_ids"][:, 3:303], past_key_values=cache, **images)


@pytest.mark.parametrize("assistant", ["a model", "early exit"])
def test_assisted_decoding_about_an_image(assistant):
    model = tiny_model()
    one = without(prompt(0, [4, 9], [(1, 1)]), "labels")
    options = {
        "a model": {"assistant_model": tiny_model(image_token_id=IMAGE)},
        "early exit": {"assistant_early_exit": 1},
    }[assistant]
    layers: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: layers.append(output.shape[1]))
    expected = model.generate(**one, max_new_tokens=8, do_sample=False)
    assert layers == [one["input_ids"].shape[1]] + [1] * 7
    layers.clear()
    assert torch.equal(model.generate(**one, max_new_tokens=8, do_sample=False, **options), expected)
    assert max(layers[2:]) > 1, "guesses are looked at together"


@pytest.mark.parametrize("source", ["a model", "early exit", "prompt lookup"])
def test_guesses_end_at_the_original_context(source):
    """Every step of an assisted generation that crosses the limit of 64 equals a full pass; beyond it they go on."""
    model, other = tiny_model("tiny_phi3v_long"), tiny_model("tiny_phi3v_long")
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    for weight in other.parameters():
        weight.data += torch.randn_like(weight) * 0.02 * weight.abs().mean()
    options = {"a model": {"assistant_model": other}, "early exit": {"assistant_early_exit": 1}}
    options["prompt lookup"] = {"prompt_lookup_num_tokens": 5}
    inputs = {"input_ids": torch.nn.functional.pad(prompt(2, [30])["input_ids"], (2, 0))}
    inputs["attention_mask"] = (torch.arange(32) >= 2).long()[None]
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: passes.append(output.shape[1]))
    choices = {"do_sample": False, "max_new_tokens": 44, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **choices, **options[source])
    assert max(passes[1:]) > 1, "guesses are looked at together"
    for step, logits in enumerate(output.logits):
        with torch.no_grad():
            expected = model(output.sequences[:, 2 : 32 + step], use_cache=False).logits[:, -1]
        assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("beams", [1, 2])
def test_negative_ids_are_no_words_to_logits_processors(beams):
    """They are looked up as the image token; images go by their numbers, and the caller's ids come back."""
    model = tiny_model(image_token_id=IMAGE)
    swapped = without(prompt(3, [4, 2, 9], [(1, 1), (1, 2)], image_id=None), "labels")
    carried = {**swapped, "input_ids": swapped["input_ids"].masked_fill(swapped["input_ids"] < 0, IMAGE)}
    swapped["input_ids"] = torch.where(swapped["input_ids"] < 0, -3 - swapped["input_ids"], swapped["input_ids"])
    swapped |= {key: swapped[key].flip(0) for key in ("pixel_values", "image_sizes")}
    before = swapped["input_ids"].clone()
    options = {"repetition_penalty": 1.3, "num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 6}
    expected = model.generate(**carried, **options, do_sample=False)
    got = model.generate(**swapped, **options, do_sample=False, return_dict_in_generate=True).sequences
    assert torch.equal(got[:, -6:], expected[:, -6:]) and torch.equal(swapped["input_ids"], before)
    assert torch.equal(got[:, :-6], before.expand(beams, -1))
    assert torch.equal(model.generate(**swapped, **options, do_sample=False), got)


def test_image_tensors_without_images_are_no_images():
    model, one = tiny_model(image_token_id=IMAGE), without(prompt(1, [9]), "labels")
    none = {"pixel_values": torch.zeros(0, 2, 3, 336, 336), "image_sizes": torch.zeros(0, 2, dtype=torch.long)}
    expected = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **none, **GREEDY, num_beams=1).sequences, expected.sequences)
    with torch.no_grad():
        assert torch.equal(model(**one, **none).logits, model(**one).logits)
        with pytest.raises(ValueError, match="blindly"):
            model(prompt(0, [3], [(1, 1)], image_id=IMAGE)["input_ids"], **none)


@pytest.mark.parametrize(
    ("side", "options"),
    [("right", {}), ("left", {"num_beams": 2}), ("right", {"cache_implementation": "static"})],
    ids=["greedy", "beams", "static"],
)
def test_embeddings_of_a_padded_batch_equal_its_ids_also_across_the_limit(rebuilt, side, options):
    """Alone, as the whole prompt, and beside the ids; the first of both rows passes the limit at its fifth token."""
    model = tiny_model("tiny_phi3v_long", original_max_position_embeddings=340, image_token_id=IMAGE)
    rows = [prompt(0, [3, 20], [(1, 1)], image_id=IMAGE), prompt(1, [17])]
    batch = without(batch_of(rows, side), "labels")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        embeddings = model.model.embed(**without(batch, "attention_mask"))
    given, length = embeddings.clone(), ids.shape[1]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 500, **options}
    expected = model.generate(**batch, **options)[:, length:]
    crossed = rebuilt[:]
    assert set(crossed) == ({0, 1} if "num_beams" in options else {0})
    alone = model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
    assert torch.equal(alone, expected) and rebuilt == crossed * 2
    beside = model.generate(input_ids=ids, inputs_embeds=embeddings, attention_mask=mask, **options)
    assert torch.equal(beside[:, length:], expected) and rebuilt == crossed * 3
    assert torch.equal(embeddings, given)
