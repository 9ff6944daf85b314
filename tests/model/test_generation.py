"""Generation: across the original context, with every kind of cache and search, streamed.

The oracle is a full pass over the whole sequence at every step: `use_cache=False`, or `forward` called here.
"""

import copy

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, PAD, batch_of, prompt, without
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

TOLERANCE = 1e-4
LONG = ("tiny_phi3v_long", "tiny_phi35v_long")
LIMIT = 64  # the original context of both
GREEDY = {"do_sample": False, "max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module", params=LONG)
def model_name(request):
    return request.param


@pytest.fixture(scope="module")
def model(model_name):
    return tiny_model(model_name)


def words(*lengths: int) -> list[dict]:
    return [without(prompt(40 + number, [length]), "labels") for number, length in enumerate(lengths)]


def batched(prompts: list[dict], side: str = "left") -> dict:
    return without(batch_of([{**one, "labels": one["input_ids"]} for one in prompts], side), "labels")


def looked_at(model, one: dict) -> dict:
    """A prompt or batch with the features of its images for their pixels, so that the oracle looks at them once.

    That both give the same bits is shown in test_batches.
    """
    if "pixel_values" not in one:
        return one
    features = model.get_image_features(one["pixel_values"], one["image_sizes"]).last_hidden_state.detach()
    return {**without(one, "pixel_values"), "image_features": features}


def assert_every_step_is_a_full_pass(model, prompts, output, width):
    """The scores of each row equal those of `forward` over that row's whole sequence, computed alone, at every step."""
    for row, one in enumerate(looked_at(model, each) for each in prompts):
        new = output.sequences[row, width:]
        for step, scores in enumerate(output.scores):
            whole = torch.cat([one["input_ids"], new[None, :step]], dim=1)
            images = {key: one[key] for key in ("image_features", "image_sizes") if key in one}
            with torch.no_grad():
                expected = model(whole, use_cache=False, logits_to_keep=1, **images).logits[0, -1]
            sayable = torch.arange(len(expected)) != model.config.image_token_id
            assert_close(
                scores[row][sayable],
                expected[sayable],
                rtol=0,
                atol=TOLERANCE,
                msg=lambda text, at=(row, step): f"{at}: {text}",
            )


@pytest.fixture
def rebuilt(monkeypatch):
    """Rows whose cache was rebuilt, in order; checks that the caches of all other rows stay the same bit for bit."""
    log: list[int] = []
    full_pass, rebuild = Phi3VForCausalLM._full_pass, Phi3VForCausalLM._rebuild_long_rows

    def spy_pass(self, input_ids, row, pad, kwargs):
        log.append(row)
        return full_pass(self, input_ids, row, pad, kwargs)

    def spy_rebuild(self, input_ids, new, cache, mask, kwargs):
        before, seen = copy.deepcopy(cache), len(log)
        rebuild(self, input_ids, new, cache, mask, kwargs)
        others = [row for row in range(len(input_ids)) if row not in log[seen:]]
        for old, now in zip(before.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                if isinstance(getattr(old, name, None), torch.Tensor):
                    assert torch.equal(getattr(old, name)[others], getattr(now, name)[others])
        for row in log[seen:]:
            assert not any(
                torch.equal(o.keys[row], n.keys[row]) for o, n in zip(before.layers, cache.layers, strict=True)
            )

    monkeypatch.setattr(Phi3VForCausalLM, "_full_pass", spy_pass)
    monkeypatch.setattr(Phi3VForCausalLM, "_rebuild_long_rows", spy_rebuild)
    return log


@pytest.mark.parametrize("length", [53, 58, 63, 64, 65])
def test_crossing_equals_a_full_pass_at_every_step(model, rebuilt, length):
    prompts = words(length)
    output = model.generate(**prompts[0], **GREEDY)
    assert rebuilt == ([0] if length <= LIMIT < length + 11 else [])
    assert_every_step_is_a_full_pass(model, prompts, output, length)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_row_that_crosses_is_rebuilt(model, rebuilt, side, cache):
    prompts = words(30, 58, 80, 12)
    output = model.generate(**batched(prompts, side), **GREEDY, **cache)
    assert rebuilt == [1]
    assert_every_step_is_a_full_pass(model, prompts, output, 80)


def test_rows_cross_at_their_own_step_or_at_the_same(model, rebuilt):
    prompts = words(60, 55, 60)
    output = model.generate(**batched(prompts), **GREEDY)
    assert rebuilt == [0, 2, 1]
    assert_every_step_is_a_full_pass(model, prompts, output, 60)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_crossing_with_beams(model, rebuilt, cache):
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 12,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    batch = batched(words(58, 30))
    cached = model.generate(**batch, **options, **cache)
    assert sorted(rebuilt) == [0, 1, 2], "the three beams of the first row"
    recomputed = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    assert_close(cached.sequences_scores, recomputed.sequences_scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_crossing_while_sampling(model, rebuilt, cache):
    options = {**GREEDY, "do_sample": True, "top_k": 20, "num_return_sequences": 2}
    batch = batched(words(58, 30))
    set_seed(11)
    cached = model.generate(**batch, **options, **cache)
    assert rebuilt == [0, 1]
    set_seed(11)
    recomputed = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    assert len({tuple(row) for row in cached.sequences.tolist()}) == 4, "four different samples"
    for one, other in zip(cached.scores, recomputed.scores, strict=True):
        assert_close(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("carrier", [None, IMAGE])
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
def test_crossing_with_images_in_the_row(model_name, rebuilt, carrier, search):
    """Rows with two, no and one image around an original context of 640 tokens; the first and last one cross."""
    model = tiny_model(model_name, original_max_position_embeddings=640, image_token_id=carrier)
    rows = [([4, 3, 4], [(1, 1), (1, 1)]), ([30],), ([4, 178], [(1, 2)])]
    prompts = [without(prompt(seed, *row, image_id=carrier), "labels") for seed, row in enumerate(rows)]
    lengths = [one["input_ids"].shape[1] for one in prompts]
    assert lengths == [637, 30, 639]
    options = {**GREEDY, **search, "max_new_tokens": 6}
    if search:
        output = model.generate(**batched(prompts), **options)
        expected = model.generate(**looked_at(model, batched(prompts)), **options, use_cache=False)
        assert sorted(rebuilt) == [0, 1, 4, 5]
        assert torch.equal(output.sequences, expected.sequences)
        assert_close(output.sequences_scores, expected.sequences_scores, rtol=0, atol=TOLERANCE)
        return
    output = model.generate(**batched(prompts, "right"), **options)
    assert rebuilt == [2, 0]
    assert_every_step_is_a_full_pass(model, prompts, output, 639)


def test_crossing_with_image_features(rebuilt):
    model = tiny_model("tiny_phi3v_long", original_max_position_embeddings=320)
    one = without(prompt(0, [3, 3], [(1, 1)]), "labels")
    given = looked_at(model, one)
    for search in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = model.generate(**one, **GREEDY, **search)
        output = model.generate(**given, **GREEDY, **search)
        assert torch.equal(output.sequences, expected.sequences)
    assert len(rebuilt) == 2 * (1 + 2)


def test_a_conversation_continued_with_its_cache_crosses(model, rebuilt):
    """The second turn is a step of many tokens: it crosses with some of them."""
    first = words(50)[0]
    cache = DynamicCache(config=model.config)
    answer = model.generate(**first, max_new_tokens=5, do_sample=False, past_key_values=cache)
    whole = torch.cat([answer, words(20)[0]["input_ids"]], dim=1)
    ones = torch.ones_like(whole)
    output = model.generate(input_ids=whole, attention_mask=ones, past_key_values=cache, **GREEDY)
    assert rebuilt == [0]
    assert_every_step_is_a_full_pass(model, [{"input_ids": whole}], output, whole.shape[1])


def test_a_conversation_continued_without_its_ids_refuses_to_cross(model):
    first = words(50)[0]
    cache = DynamicCache(config=model.config)
    answer = model.generate(**first, max_new_tokens=5, do_sample=False, past_key_values=cache)
    turn = words(20)[0]["input_ids"]
    ones = torch.ones(1, answer.shape[1] + 20, dtype=torch.long)
    with pytest.raises(ValueError, match="pass the whole sequence as input_ids"):
        model.generate(input_ids=turn, attention_mask=ones, past_key_values=cache, max_new_tokens=3)


def test_a_prompt_in_chunks(model):
    """The ids before a chunk are not known to it: no matter within the limit, an error across it."""
    one = words(50)[0]
    expected = model.generate(**one, **GREEDY)
    chunked = model.generate(**one, **GREEDY, prefill_chunk_size=16)
    assert torch.equal(chunked.sequences, expected.sequences)
    for chunk, whole in zip(chunked.scores, expected.scores, strict=True):
        assert_close(chunk, whole, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="no prefill_chunk_size"):
        model.generate(**words(90)[0], **GREEDY, prefill_chunk_size=32)


def test_generation_with_embeddings_instead_of_ids():
    model = tiny_model()
    one = without(prompt(0, [4, 9], [(1, 1)]), "labels")
    with torch.no_grad():
        embeddings = model.model.embed(one["input_ids"], one["pixel_values"], one["image_sizes"])
    new = model.generate(
        inputs_embeds=embeddings, attention_mask=one["attention_mask"], max_new_tokens=6, do_sample=False
    )
    assert torch.equal(new, model.generate(**one, max_new_tokens=6, do_sample=False)[:, -6:])


# ---- caches, beams, streaming within the limit ----


@pytest.fixture(scope="module")
def mixed():
    """Rows with two, no and one image."""
    return [
        without(prompt(s, *row), "labels")
        for s, row in enumerate([([4, 2, 5], [(1, 1), (1, 2)]), ([17],), ([3, 6], [(2, 1)])])
    ]


@pytest.mark.parametrize("search", ["greedy", "sample", "beams", "beam sampling"])
def test_caches_and_searches_equal_recomputation(mixed, search):
    model, batch = tiny_model(), batched(mixed, "right")
    options = {
        "greedy": {},
        "sample": {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "beam sampling": {"num_beams": 2, "do_sample": True},
    }[search]
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    rows = 3 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    set_seed(5)
    recomputed = model.generate(**looked_at(model, batch), **options, use_cache=False)
    caches = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "given dynamic": {"past_key_values": DynamicCache(config=model.config)},
        "given static": {"past_key_values": StaticCache(config=model.config, max_batch_size=rows, max_cache_len=800)},
    }
    for kind, cache in caches.items():
        set_seed(5)
        assert torch.equal(model.generate(**batch, **options, **cache), recomputed), kind


def test_beams_with_several_images_a_row_equal_each_row_alone(mixed):
    model = tiny_model()
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    together = model.generate(**batched(mixed), **options)
    for number, one in enumerate(mixed):
        alone = model.generate(**one, **options)
        mine = slice(3 * number, 3 * number + 3)
        assert torch.equal(together.sequences[mine, -6:], alone.sequences[:, -6:])
        assert_close(together.sequences_scores[mine], alone.sequences_scores, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with a word for each of the tiny model's ids."""
    vocabulary = {f"w{number}": number for number in range(512)}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="w0", pad_token="w500")


def test_streaming(tokenizer, capsys):
    model, one = tiny_model(), without(prompt(0, [4, 9], [(1, 1)], image_id=IMAGE), "labels")
    model.config.image_token_id = IMAGE
    expected = tokenizer.decode(model.generate(**one, max_new_tokens=6, do_sample=False)[0, -6:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**one, max_new_tokens=6, do_sample=False, streamer=streamer)
    pieces = list(streamer)
    assert "".join(pieces).strip() == expected.strip() and len([piece for piece in pieces if piece]) > 2
    model.generate(**one, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected.strip()


def test_prompts_as_the_first_positional_argument_and_masks_of_booleans():
    model, prompts = tiny_model(), words(9, 14)
    batch = batched(prompts, "right")
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
    mask = batch["attention_mask"]
    assert torch.equal(
        model.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=5, do_sample=False), expected
    )
    as_bool = model.generate(**{**batch, "attention_mask": mask.bool()}, max_new_tokens=5, do_sample=False)
    assert torch.equal(as_bool, expected)
    assert expected[0, :5].tolist() == [PAD] * 5
