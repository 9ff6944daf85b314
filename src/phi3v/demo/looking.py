"""The first minutes of the tiny model's pretraining: eyes before words.

`page(seed, index)` is a picture and the word for what is seen in each of its 12 x 12 cells: the digits of number
plates, the shapes of objects, one large digit. `looking_loss` asks every visual token for the word of its cell before
any layer of the decoder: a hundred answers a picture and no text, so a step costs the tower alone. Without it the way
from pixels to digits and shapes is found late, through answers of a few tokens.

Letters: B pictures.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from PIL import Image
from torch import nn

from phi3v.demo import glyphs, painting
from phi3v.demo.scenes import COLOURS, SHAPES, SIDE, SURFACES, draw_number, large_digit, put_object
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.vision_phi3_v import merge_patches

CELLS = 12  # cells, and visual tokens, on each side of a picture
NOTHING, UNSAID = "", "?"
WORDS = (NOTHING, *"0123456789", *SHAPES)
"""What a cell can hold; its place here is the cell's label."""
_UNSAID_LABEL = -100

Page = tuple[Image.Image, list[int]]


def page(seed: int, index: int) -> Page:
    """The page with this number in the stream of `seed`, and the label of each cell, row by row.

    A label is a place in `WORDS`, or -100 for a cell at the edge of an object, which is not asked for. Example: a page
    whose first row holds the plate 70 from its second cell on begins with the labels 0, 8, 1.
    """
    rng = Random(f"page {seed} {index}")
    kind = rng.random()
    image, words = _plates(rng) if kind < 0.3 else _objects(rng) if kind < 0.8 else _one_digit(rng)
    return image, [_UNSAID_LABEL if word == UNSAID else WORDS.index(word) for word in words]


def _ground(rng: Random) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), painting.vary(*COLOURS[rng.choice(("white", *COLOURS))], rng))


def _plates(rng: Random) -> tuple[Image.Image, list[str]]:
    """A page full of number plates."""
    image, words = _ground(rng), [NOTHING] * (CELLS * CELLS)
    for row in range(rng.randint(0, 1), CELLS, 2):
        column = rng.randint(0, 2)
        while column < CELLS - 1:
            text = draw_number(rng, min(rng.randint(1, 6), CELLS - column))
            paper = painting.vary(*COLOURS[rng.choice(("white", "white", *COLOURS))], rng)
            ink = painting.contrasting(paper, rng)
            corner = (glyphs.CELL * column, glyphs.CELL * row)
            frame = ink if rng.random() < 0.5 else None
            glyphs.paste_plate(image, text, rng.choice(glyphs.FACES), corner, paper, ink, frame)
            words[row * CELLS + column : row * CELLS + column + len(text)] = text
            column += len(text) + rng.randint(1, 3)
    return image, words


def _objects(rng: Random) -> tuple[Image.Image, list[str]]:
    """One large object, or two or four in rows and columns, as in scenes; its inner cells say its shape."""
    image, words = _ground(rng), [NOTHING] * (CELLS * CELLS)
    rows, columns = rng.choice(((1, 1), (1, 1), (1, 2), (2, 1), (2, 2)))
    single = rows * columns == 1
    for place in range(rows * columns):
        shape, size = rng.choice(tuple(SHAPES)), rng.randint(176, 206) if single else rng.randint(130, 156)
        x = 168 + rng.randint(-12, 12) if single else SIDE * (2 * (place % columns) + 1) // (2 * columns)
        y = (
            rng.choice((112, 168, 224)) + rng.randint(-8, 8)
            if single
            else SIDE * (2 * (place // columns) + 1) // (2 * rows)
        )
        put_object(image, rng, shape, rng.choice(tuple(COLOURS)), rng.choice(tuple(SURFACES)), size, (x, y))
        for cell in range(CELLS * CELLS):
            off_x = abs((cell % CELLS + 0.5) * glyphs.CELL - x)
            off_y = abs((cell // CELLS + 0.5) * glyphs.CELL - y)
            if max(off_x, off_y) < 0.35 * size:
                words[cell] = shape
            elif max(off_x, off_y) < 0.55 * size:
                words[cell] = UNSAID
    return image, words


def _one_digit(rng: Random) -> tuple[Image.Image, list[str]]:
    """One digit over the whole picture; its inner cells say which."""
    made = large_digit(rng)
    digit = next(answer for question, answer in made.turns if "digit" in question)
    inner = range(3, CELLS - 3)
    return made.image, [
        digit if row in inner and column in inner else UNSAID for row in range(CELLS) for column in range(CELLS)
    ]


def looking_loss(model: Phi3VForCausalLM, views: torch.Tensor, labels: torch.Tensor, names: list[int]) -> torch.Tensor:
    """How badly the visual tokens name what is in their cells.

    Args:
        model: the model; its tower, projector, last norm and head are used, its layers are not.
        views: `[B, 3, 336, 336]`, normalised.
        labels: `[B, 144]`, places in `WORDS`, -100 where nothing is asked.
        names: token ids of `WORDS`.

    Returns:
        The mean loss over cells that hold something plus the mean over empty ones.
    """
    embedding = model.model.vision_embed_tokens
    features = embedding.img_projection(merge_patches(embedding.img_processor(views)).flatten(0, 1))
    labels = labels.flatten()
    logits = model.lm_head(model.model.norm(features[labels != _UNSAID_LABEL]))
    labels = labels[labels != _UNSAID_LABEL]
    losses = nn.functional.cross_entropy(logits, torch.tensor(names, device=logits.device)[labels], reduction="none")
    empty = (labels == WORDS.index(NOTHING)).float()
    return (losses * (1 - empty)).sum() / (1 - empty).sum().clamp(min=1) + (losses * empty).sum() / empty.sum().clamp(
        min=1
    )


def word_ids(tokenizer: Any) -> list[int]:
    """The token id that stands for each of `WORDS`: the last piece of the word, the bare space for nothing.

    Raises: ValueError when two words end with the same piece.
    """
    ids = [tokenizer(word or " ")["input_ids"][-1] for word in WORDS]
    if len(set(ids)) < len(ids):
        raise ValueError("two words of pages end with the same token")
    return ids


class Pages(torch.utils.data.Dataset[Page]):
    """The pages `0 .. count - 1` of a seed, made when asked for."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        """How many pages there are."""
        return self.count

    def __getitem__(self, index: int) -> Page:
        """One page."""
        return page(self.seed, index)
