"""Takes many rows through the data path and says how much memory the process held on the way.

`python measured_memory.py KIND ROWS` prints a JSON list of resident kilobytes after each fiftieth of the rows. KIND is
`images` (headers looked at, then rows encoded with their pixels), `fast` (the same with `image.fast`), `headers` (path
and header of an image looked at) or `text` (rows without images encoded). `check text` and `check headers` look at a
whole set as `phi3v data check` does, and print the most that the process held.
"""

import gc
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_models import write_tiny_model
from tiny_tokenizer import build_tokenizer

from phi3v.data.cells import check_images
from phi3v.data.encode import encode
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.recipe import Recipe
from phi3v.training.data_check import check_recipe

FILES = 20


def write_images(folder: Path) -> None:
    """Images of different sizes and kinds."""
    dice = np.random.default_rng(0)
    for number in range(FILES):
        width, height = dice.integers(20, 200, 2)
        kind = ("JPEG", "PNG", "WEBP", "GIF", "TIFF")[number % 5]
        pixels = dice.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", kind)


def row(number: int, folder: Path | None) -> Row:
    """A row whose text no other row has."""
    images = () if folder is None else (ImageRef(f"{number % FILES}.png", root=str(folder), confined=True),)
    parts = (*(ImagePart(place) for place in range(len(images))), TextPart(f"what is this image {number}"))
    return Row((Message("user", parts), Message("assistant", (TextPart(f"the {number}"),))), images, {}, "set", number)


def worker(kind: str, folder: Path) -> Callable[[int], object]:
    """What is done with each row."""
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=1, fast=kind == "fast"), build_tokenizer())
    if kind == "text":
        return lambda number: encode(row(number, None), processor, max_length=1000)
    if kind == "headers":
        return lambda number: check_images(row(number, folder), 1_000_000)

    def look_and_encode(number: int) -> None:
        check_images(row(number, folder), 1_000_000)
        encode(row(number, folder), processor, max_length=1000)

    return look_and_encode


def resident() -> int:
    """Kilobytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def check(kind: str, rows: int, folder: Path) -> int:
    """The whole look at a set of rows, some of them held out; the most kilobytes held."""
    write_tiny_model(folder / "model")
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(rows):
            image = {} if kind == "check text" else {"image": f"{number % FILES}.png"}
            file.write(json.dumps({"prompt": f"question {number}", "answer": f"the {number}", **image}) + "\n")
    data = {"train": str(folder / "rows.jsonl"), "images": None if kind == "check text" else "image"}
    report = check_recipe(Recipe.from_dict({"model": str(folder / "model"), "data": data}), decode=False)
    assert report.passed and report.usable == rows and report.validation
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    kind, rows = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    samples = []
    if kind.startswith("check"):
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder))
            print(json.dumps([check(kind, rows, Path(folder))]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        work = worker(kind, Path(folder))
        for number in range(rows):
            work(number)
            if (number + 1) % (rows // 50) == 0:
                gc.collect()
                samples.append(resident())
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
