"""Generation about images: assistants that draft, Microsoft's ids."""

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, prompt, without


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
