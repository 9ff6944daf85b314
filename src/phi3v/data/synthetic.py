"""Generated rows of a stated shape: photos of one or more sizes, a question and an answer, to try a training's speed.

In come numbers, out come files below a folder and the values of a recipe's section `data` that read them. The photos
are smooth noise with grain, so a JPEG is about as large as one of a photo, and takes a decoder as long.
"""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUESTION = "What is shown in this image?"


def write_synthetic_rows(
    folder: Path, rows: int, sizes: Sequence[Sequence[tuple[int, int]]], words: int, *, lines: int = 0
) -> dict[str, Any]:
    """Writes photos and `rows.jsonl`; returns the section `data` for them.

    Args:
        folder: is made.
        rows: how many; each has photos of its own.
        sizes: width and height in pixels of each photo of a row, for the rows in turn.
        words: of an answer, about as many tokens and somewhat more.
        lines: of `rows.jsonl` at least; where that is more than `rows`, they come again in the same order.
    Example: 2 rows and 5 lines: rows 0, 1, 0, 1, 0; with the sizes [(90, 60)] and [(60, 60), (60, 60)] row 0 has one
    photo and row 1 two square ones.
    """
    folder.mkdir(parents=True)
    written = []
    for row in range(rows):
        names = []
        for place, size in enumerate(sizes[row % len(sizes)]):
            names.append(f"{row}_{place}.jpg")
            draw_photo(97 * row + place, size).save(folder / names[-1], quality=88)
        answer = " ".join(
            f"{'number' if word % 2 else 'product'} {(row * 31 + word) % 100}" for word in range(words // 2)
        )
        written.append(json.dumps({"images": names, "answer": answer or "product"}))
    told = islice(cycle(written), max(rows, lines))
    (folder / "rows.jsonl").write_text("\n".join(told) + "\n", encoding="utf-8")
    return {
        "train": str(folder / "rows.jsonl"),
        "images": "images",
        "split": None,
        "prompt": QUESTION,
        "answer": "{answer}",
    }


def draw_photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth noise at four scales, and grain."""
    width, height = size
    dice = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((8, 60), (32, 40), (128, 20), (400, 8)):
        shape = (cells, max(2, cells * width // height), 3)
        noise = Image.fromarray(dice.integers(0, 256, shape, dtype=np.uint8))
        smooth = np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32)
        total += (smooth - 128) / 128 * strength
    total += dice.normal(0, 4, (height, width, 1))
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))
