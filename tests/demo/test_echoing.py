"""Echoes: the same everywhere, and only the repetition is asked for."""

import re
from pathlib import Path

import torch

from phi3v.demo import catalogue, pretrain
from phi3v.demo.echoing import FIRST_PIECE, LONGEST, SHORTEST, echo, phrase
from phi3v.demo.tokenizer import BASE_SIZE


def test_an_echo_is_a_chat_whose_answer_repeats_the_question(tmp_path: Path) -> None:
    tokenizer = pretrain.new_processor(tmp_path).tokenizer
    ids, labels = echo(tokenizer, 0, 0, rows=3)
    assert ids.shape == labels.shape
    for row, answer in zip(ids.tolist(), labels.tolist(), strict=True):
        trained = [token for token in answer if token != -100]
        pieces = trained[:-3]
        assert SHORTEST <= len(pieces) <= LONGEST
        assert all(FIRST_PIECE <= piece < BASE_SIZE for piece in pieces)
        assert tokenizer.convert_ids_to_tokens(trained[-3:]) == ["<|end|>", "▁", "<0x0A>"]
        before = tokenizer("<|user|>\nRepeat:")["input_ids"]
        assert row[: len(before)] == before
        assert row[len(before) : len(before) + len(pieces)] == pieces
        assert row[-len(trained) :] == trained
        assert answer[: -len(trained)] == [-100] * (len(row) - len(trained))


def test_echoes_are_made_of_their_numbers_alone(tmp_path: Path) -> None:
    tokenizer = pretrain.new_processor(tmp_path).tokenizer
    first, again, other = echo(tokenizer, 1, 4), echo(tokenizer, 1, 4), echo(tokenizer, 1, 5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    lengths = {echo(tokenizer, 1, index, rows=1)[0].shape[1] for index in range(60)}
    assert len(lengths) > 8


def test_the_drill_of_the_packaged_model_holds_no_price_title_or_template_of_the_catalogue(tmp_path: Path) -> None:
    """All of it, the seed and the lengths that the packaged weights come from: 600 steps, 30,000 scenes."""
    tokenizer, run = pretrain.new_processor(tmp_path).tokenizer, pretrain.Options()
    drilled = [again for index in range(run.scenes) if (again := phrase(tokenizer, run.seed, index)) is not None]
    for index in range(run.echoes):
        ids, labels = echo(tokenizer, run.seed, index)
        drilled += tokenizer.batch_decode(ids[:, labels[0] != -100], skip_special_tokens=True)
    assert len(drilled) > 30_000
    numbers = {int(number) for text in drilled for number in re.findall(r"\d+", text)}
    parts = ("train", "test")
    assert not numbers & {price for part in parts for price in catalogue.prices(part)}
    assert numbers >= set(catalogue.DRILLED), "these could be sold"
    forms = [catalogue.PROMPT, *re.split(r"\{\w+\}", catalogue.ANSWER)[1:3]]
    assert forms[1:] == [", Category: ", ", Full Price: "]
    titles = {product.title for part in parts for product in catalogue.products(part, 4000)}
    assert len(titles) == len(catalogue.COLOURS) * len(catalogue.PATTERNS) * len(catalogue.ITEMS)
    text = "\n".join(drilled)
    assert not [words for words in (*titles, *forms) if words in text]
    assert "Scarf" in text and "Price:" in text, "single words are"
