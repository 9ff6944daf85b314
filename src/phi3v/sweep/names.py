"""Short names for what a sweep tries: values in, texts for a column or below an axis out, all different."""

from collections.abc import Mapping, Sequence
from typing import Any

_MOST = 24
"""Letters of a name."""


def short(value: Any) -> str:
    """A value as a line shows it: 0.00012345 -> "0.0001234", ["qkv_proj", "o_proj"] -> "qkv_proj+o_proj".

    Of a mapping the last parts of its keys: {"lora.lora_dropout": 0.1, "lora.r": 8} -> "lora_dropout=0.1, r=8".
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.rpartition('.')[2]}={short(one)}" for key, one in value.items())
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def short_names(values: Sequence[Any]) -> list[str]:
    """Names of at most 24 letters for the choices of one key; two that differ have names that differ.

    Of what is longer the beginning stays, of mappings the values: {"lora.lora_dropout": 0.1,
    "training.weight_decay": 0.01} -> "0.1, 0.01". Where that leaves two choices alike, their middle is cut out, and
    where this does not help either, they have numbers.
    """
    whole = [short(value) for value in values]
    bare = [
        ", ".join(map(short, value.values())) if isinstance(value, Mapping) and len(text) > _MOST else text
        for value, text in zip(values, whole, strict=True)
    ]
    choices = [str(value) if isinstance(value, Mapping) else text for value, text in zip(values, whole, strict=True)]
    several = len(set(choices))  # keys of two mappings may end alike
    half = _MOST // 2
    ways = (
        [_cut(text) for text in bare],
        [text if len(text) <= _MOST else f"{text[: half - 1]}…{text[-half:]}" for text in bare],
        [_cut(text) for text in whole],
    )
    for names in ways:
        if len(set(names)) == several:
            return names
    order = list(dict.fromkeys(choices))
    return [_cut(f"{order.index(choice) + 1}: {text}") for choice, text in zip(choices, whole, strict=True)]


def _cut(text: str) -> str:
    """A text of at most 24 letters, its end left out where it is longer."""
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}…"
