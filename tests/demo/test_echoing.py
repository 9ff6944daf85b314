"""Echoes: the same everywhere, and only the repetition is asked for."""

from pathlib import Path

import torch

from phi3v.demo import pretrain
from phi3v.demo.echoing import FIRST_PIECE, LONGEST, SHORTEST, echo
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
