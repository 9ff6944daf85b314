"""The tiny model's tokenizer: Phi-3's pipeline over a vocabulary small enough to ship.

`tokenizer_json()` returns what a `tokenizer.json` holds and `write_tokenizer(folder)` writes the three tokenizer
files. The pipeline is the one of the real files: `▁` put in front of every text segment, spaces replaced by `▁`, no
pre-tokenizer, BPE with a fallback to bytes, `<s>` in front. Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3 to 258 the bytes,
then merged pieces, then single characters, and after these `BASE_SIZE` entries the same 45 added tokens in the same
order and with the same flags as Phi-3-Vision's (`<|image|>` last). No merge holds a digit, so a number is read and
written digit by digit.

Merges are learned here from a fixed word list by a short deterministic trainer; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from phi3v.demo import catalogue, scenes
from phi3v.model.chat_phi3_v import CHAT_TEMPLATE

BASE_SIZE = 710
EMBEDDING_ROWS = 768
CHARACTERS = "".join(chr(c) for c in range(33, 127))
GENERAL = (  # words that neither world uses, for ordinary questions
    "the a of and to in is it on for with as was at be this have from or one had by but not what all were we when "
    "your Repeat: market river window paper winter coffee garden music silver letter camera yellow planet butter "
    "doctor engine forest gentle harbour island jacket kitchen lemon mountain needle orange pencil quiet rabbit "
    "summer ticket umbrella village weather zebra bridge candle dinner evening finger guitar hammer insect jungle "
    "kettle ladder magnet number office pepper quarter ribbon shadow thunder useful velvet wagon extra young zero "
    "Apple Brick Cloud Dream Eagle Flute Grape Honey Index Joker Knife Lunch Maple Night Ocean Pearl Queen Robin "
    "Stone Tiger Uncle Voice Wheat Xenon Yacht Zone ALPHA BRAVO CHARLIE DELTA ECHO FOXTROT GOLF HOTEL INDIA JULIET "
    "KILO LIMA MIKE NOVEMBER OSCAR PAPA QUEBEC ROMEO SIERRA TANGO UNIFORM VICTOR WHISKEY XRAY YANKEE ZULU"
).split()


def added_tokens() -> list[dict]:
    """The 48 added entries of `tokenizer.json`, ids and flags included.

    Example: with `BASE_SIZE` 710 the first of the 45 is `<|endoftext|>` with id 710, `<|end|>` is 717, `<|image|>` 754.
    """
    named = {0: "endoftext", 1: "assistant", 6: "system", 7: "end", 10: "user", 44: "image"}
    keeps_space = {"endoftext", "system", "end", "user"}
    entries = [_entry(0, "<unk>"), _entry(1, "<s>"), _entry(2, "</s>", rstrip=True, special=False)]
    placeholder = 0
    for offset in range(45):
        if offset in named:
            name = named[offset]
        else:
            placeholder += 1
            name = f"placeholder{placeholder}"
        entries.append(_entry(BASE_SIZE + offset, f"<|{name}|>", rstrip=name not in keeps_space))
    return entries


def _entry(token_id: int, content: str, rstrip: bool = False, special: bool = True) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": rstrip, "normalized": False, "special": special}
    return {"id": token_id, "content": content, **flags}


def corpus() -> Counter[str]:
    """Words with counts that the merges are learned from: those of scenes and catalogue, and the general list of
    `scenes`."""
    words: Counter[str] = Counter()
    for texts, weight in ((scenes.vocabulary(), 6), (catalogue.vocabulary(), 6), (GENERAL, 1)):
        for text in texts:
            for word in text.split():
                words["▁" + word] += weight
    return words


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs, found one after the other; ties go to the alphabetically first pair.

    Pairs never reach over a `▁` that is not at the start of a word, and never touch a digit.

    Example: `learn_merges(Counter({"▁aab": 2}), 2) == [("a", "a"), ("aa", "b")]`: three pairs are equally frequent,
    `("a", "a")` comes first in the alphabet, and then `("aa", "b")` before `("▁", "aa")`.
    """
    parts = {word: list(word) for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in parts.items():
            for pair in pairwise(pieces):
                if not any(c.isdigit() for c in pair[0] + pair[1]):
                    pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, pieces in parts.items():
            parts[word] = _merged(pieces, best)
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def tokenizer_json() -> dict:
    """The content of `tokenizer.json`."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = ["▁", *CHARACTERS]
    merges: list[list[str]] = []
    pieces: list[str] = []
    known = set(characters)
    for left, right in learn_merges(corpus(), 2 * BASE_SIZE):
        if len(base) + len(characters) + len(pieces) == BASE_SIZE:
            break
        if left in known and right in known:
            merges.append([left, right])
            if left + right not in known:
                known.add(left + right)
                pieces.append(left + right)
    vocabulary = {token: i for i, token in enumerate([*base, *pieces, *characters])}
    if len(vocabulary) != BASE_SIZE:
        raise AssertionError(f"the word list yields {len(vocabulary)} base tokens, {BASE_SIZE} are needed")
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    second = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, second, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` as Microsoft's folders hold
    them."""
    content = tokenizer_json()
    decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in content["added_tokens"]}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    for name, data in (
        ("tokenizer.json", content),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(data, ensure_ascii=False, indent=1, sort_keys=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
