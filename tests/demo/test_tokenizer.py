"""The tiny tokenizer has Phi-3's pipeline, order of added tokens and flags."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from phi3v import demo
from phi3v.demo import tokenizer as tiny
from phi3v.demo.tokenizer import BASE_SIZE, added_tokens, learn_merges, tokenizer_json, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_ids_are_laid_out_as_in_the_real_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 13, 258]) == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0x0A>",
        "<0xFF>",
    ]
    names = {
        0: "endoftext",
        1: "assistant",
        2: "placeholder1",
        6: "system",
        7: "end",
        10: "user",
        43: "placeholder39",
        44: "image",
    }
    for offset, name in names.items():
        assert tokenizer.convert_tokens_to_ids(f"<|{name}|>") == BASE_SIZE + offset
    assert len(tokenizer) == BASE_SIZE + 45


def test_flags_are_those_of_the_real_added_tokens() -> None:
    entries = {entry["content"]: entry for entry in added_tokens()}
    assert len(entries) == 48
    stripping = {name for name, entry in entries.items() if entry["rstrip"]}
    assert {"<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|end|>", "<|user|>"} == set(entries) - stripping
    assert [name for name, entry in entries.items() if not entry["special"]] == ["</s>"]
    assert not any(entry["normalized"] or entry["lstrip"] or entry["single_word"] for entry in entries.values())


def test_the_pipeline_prepends_at_every_segment_and_falls_back_to_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens(tokenizer, "<|user|>\n") == ["<s>", "<|user|>", "▁", "<0x0A>"]
    assert tokens(tokenizer, "<|end|>\n<|assistant|>\n7")[1:] == ["<|end|>", "▁", "<0x0A>", "<|assistant|>", "▁", "7"]
    assert tokens(tokenizer, "é")[1:] == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer("")["input_ids"] == [1]


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens(tokenizer, "Full Price: 1299")[-5:] == ["▁", "1", "2", "9", "9"]
    vocabulary = tokenizer_json()["model"]["vocab"]
    with_digits = [piece for piece in vocabulary if any(c.isdigit() for c in piece) and not piece.startswith("<0x")]
    assert sorted(with_digits) == list("0123456789")


@pytest.mark.parametrize("text", ["Navy Check Scarf", "two  spaces", "naïve 漢字 🙂", "a\nb", "price 108, 115"])
def test_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_merges_are_learned_as_documented() -> None:
    assert learn_merges(Counter({"▁aab": 2}), 2) == [("a", "a"), ("aa", "b")]
    assert learn_merges(Counter({"▁a1": 5, "▁ab": 1}), 9) == [("▁", "a"), ("▁a", "b")]


def test_the_packaged_files_are_what_the_script_writes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    packaged = json.loads((demo.tiny_model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    assert packaged == json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) == tiny.tokenizer_json()
