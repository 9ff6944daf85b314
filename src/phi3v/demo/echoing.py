"""The second part of the tiny model's pretraining: repeating what was said, without a picture.

`echo(seed, index, rows)` is a batch of random pieces of the vocabulary to be repeated. To find the
same piece again and say what followed it is how a number is read off a picture too, and here the skill is learned
reliably, from hundreds of answers a step instead of a handful. `phrase(tokenizer, seed, index)` is what some scenes ask
for again.

Any piece may be drawn, so single words of the catalogue's titles and answers are among them. No whole title, no
template and no price is (a test walks the drill of the packaged model; the one price that it held is not sold).

Letters: B rows, S positions.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from phi3v.demo import tokenizer as tiny_tokenizer

ROWS, SHORTEST, LONGEST = 32, 4, 16
FIRST_PIECE = 259  # below are control tokens and single bytes


def echo(tokenizer: Any, seed: int, index: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of chats that ask for some pieces again, and its labels: both `[B, S]`.

    All rows repeat the same number of pieces, 4 to 16. The labels are -100 up to the answer. Example: with the pieces
    `7 a` the row is the chat `Repeat:` `7 a` answered by `7 a`, and the labels of the last five positions are those of
    `7`, `a`, `<|end|>`, `▁` and the newline.
    """
    rng = Random(f"echo {seed} {index}")
    count = rng.randint(SHORTEST, LONGEST)
    pieces = [[rng.randrange(FIRST_PIECE, tiny_tokenizer.BASE_SIZE) for _ in range(count)] for _ in range(rows)]
    before = tokenizer("<|user|>\nRepeat:")["input_ids"]
    between = tokenizer("<|end|>\n<|assistant|>\n")["input_ids"][1:]
    after = tokenizer("<|end|>\n")["input_ids"][1:]
    ids = torch.tensor([[*before, *row, *between, *row, *after] for row in pieces])
    labels = ids.clone()
    labels[:, : len(before) + count + len(between)] = -100
    return ids, labels


def phrase(tokenizer: Any, seed: int, index: int) -> str | None:
    """What the scene with this number asks for again, 3 to 8 random pieces as text; None for every second, by lot."""
    rng = Random(f"repeat {seed} {index}")
    if rng.random() >= 0.5:
        return None
    pieces = [rng.randrange(FIRST_PIECE, tiny_tokenizer.BASE_SIZE) for _ in range(rng.randint(3, 8))]
    return tokenizer.decode(pieces).strip() or "x"
