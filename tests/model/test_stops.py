"""Where generation stops, and what it never says: the ends of the published models, the caller's, the image token."""

import pytest
import torch
from golden_models import tiny_model
from transformers import GenerationConfig

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM


class Puppet:
    """Makes a model say given tokens: adds to the logits of step k those of `wanted[k]`."""

    def __init__(self, model, wanted: list[int]):
        self.wanted, self.step = wanted, 0
        self.handle = model.lm_head.register_forward_hook(self.speak)

    def speak(self, module, args, output):
        output = output.clone()
        output[..., self.wanted[min(self.step, len(self.wanted) - 1)]] += 1e4
        self.step += 1
        return output


@pytest.fixture
def published():
    """A tiny model with the vocabulary and the end-of-sequence id (2) of the published ones, random weights."""
    config = tiny_model().config.to_dict() | {"vocab_size": 32064, "hidden_size": 96, "num_attention_heads": 1}
    config |= {"num_key_value_heads": 1, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 32000}
    torch.manual_seed(0)
    return Phi3VForCausalLM(type(tiny_model().config).from_dict(config)).eval()


@pytest.mark.parametrize("own", [2, [32000, 2]], ids=["published", "made by a trainer"])
@pytest.mark.parametrize("stop", [2, 32000, 32007])
def test_published_models_stop_at_all_three_ends(published, stop, own):
    assert published.config.eos_token_id == 2
    published.generation_config.eos_token_id = own
    Puppet(published, [100, 101, stop, 102])
    new = published.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)
    assert new[0, 2:].tolist() == [100, 101, stop]


@pytest.mark.parametrize("how", ["argument", "generation config"])
def test_the_callers_end_wins(published, how):
    Puppet(published, [100, 32007, 102, 103, 104])
    prompt_ids = torch.tensor([[5, 6]])
    if how == "argument":
        new = published.generate(prompt_ids, max_new_tokens=8, do_sample=False, eos_token_id=103)
    else:
        chosen = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=103, pad_token_id=32000)
        new = published.generate(prompt_ids, generation_config=chosen)
    assert new[0, 2:].tolist() == [100, 32007, 102, 103]


def test_the_callers_end_wins_where_it_is_the_published_one(published):
    Puppet(published, [100, 32007, 32000, 2, 104])
    new = published.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False, eos_token_id=2)
    assert new[0, 2:].tolist() == [100, 32007, 32000, 2]


@pytest.mark.parametrize("own", [2, [32000, 2]])
@pytest.mark.parametrize("end", [None, 2, "the model's"])
def test_settings_that_choose_no_end_stop_at_all_three(published, end, own):
    published.generation_config.eos_token_id = own
    Puppet(published, [100, 32007, 102])
    settings = GenerationConfig(max_new_tokens=8, pad_token_id=32000, eos_token_id=own if isinstance(end, str) else end)
    assert published.generate(torch.tensor([[5, 6]]), generation_config=settings)[0, 2:].tolist() == [100, 32007]


def test_the_image_token_is_never_generated(published):
    assert published.config.image_token_id == 32044
    Puppet(published, [32044])
    new = published.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, suppress_tokens=None)
    assert 32044 in new.tolist()[0], "the puppet works where the caller allows every token"
    published.generation_config.suppress_tokens = [7]
    new = published.generate(
        torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    assert 32044 not in new.sequences.tolist()[0]
    assert all(step[0, 7] == -torch.inf for step in new.scores), "tokens suppressed by the model's own settings stay so"


def test_a_model_with_another_end_keeps_it():
    model = tiny_model(eos_token_id=[490, 491])
    Puppet(model, [5, 491, 6])
    new = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert new[0, 2:].tolist() == [5, 491]
