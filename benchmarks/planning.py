"""How many rows a second are planned from JPEG headers and text, nothing decoded, and looked at before a training.

    python benchmarks/planning.py [--rows 2000] [--model FOLDER]

Paints JPEGs of many sizes into a temporary folder. Measured, five times each on one thread, the fastest told:

- lengths and packs: from rows to the image, text and trained tokens of each, by header and text, and to the packs of
  all steps of 16 samples.
- the whole look: from a recipe with a JSONL file of the same rows to rows to train on and held-out ones, as
  `phi3v train` does it: records read, files checked, hashed and split by content, lengths counted.

Then it prints what packs come to on rows of mixed crop grids: 3,200 rows whose images take 0, 313, 469, 757, 1,921 or
2,509 tokens, each as often, and their texts 10 to 300.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from PIL import Image

from phi3v.data.lengths import row_lengths
from phi3v.data.plan import MicroBatches, best_fit, packs_within, plan_steps
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.first_look import measured_rows, open_data
from phi3v.loading import load_config, load_processor
from phi3v.recipe import Recipe

SAMPLES = 16
"""Of a step."""

TINY = Path(__file__).resolve().parents[1] / "src" / "phi3v" / "demo" / "tiny"
QUESTION = "What is shown in this image?"


def make_rows(folder: Path, count: int) -> list[Row]:
    """Product photos with a question and an answer each, as a recipe's templates make them."""
    dice, rows = random.Random(0), []
    for index in range(count):
        size = (dice.randrange(300, 1600), dice.randrange(300, 1600))
        Image.new("RGB", size, (index % 256, 90, 120)).save(folder / f"{index}.jpg")
        question = Message("user", (ImagePart(0), TextPart(QUESTION)))
        answer = f"Product: Check Wool Scarf {index}, Category: SCARF, Full Price: {dice.randrange(1000)}"
        image = ImageRef(f"{index}.jpg", root=str(folder), confined=True)
        rows.append(Row((question, Message("assistant", (TextPart(answer),))), (image,), {}, "shop.csv", index))
    return rows


def plan(rows: list[Row], processor: Any) -> tuple[list[int], int]:
    """The tokens of each row, and the number of packs of an epoch."""
    lengths = [length.total for length in row_lengths(rows, processor)]
    how = MicroBatches(1, tokens=max(lengths))
    return lengths, sum(len(step) for step in plan_steps(lengths, range(len(rows)), SAMPLES, how))


def show_packs() -> None:
    """Prints a table: packs of a step, their floor, and tokens that go through the model with and without padding."""
    dice = random.Random(0)
    lengths = [dice.choice((0, 313, 469, 757, 1921, 2509)) + dice.randint(10, 300) for _ in range(3200)]
    steps = [lengths[start : start + SAMPLES] for start in range(0, len(lengths), SAMPLES)]
    print("size   budget  packs  floor  padded micro-batches  padded/real tokens  largest pack  by best fit alone")
    for size in (1, 2, 4):
        budget = size * max(lengths)
        packs = [tokens(packs_within(step, budget), step) for step in steps]
        fit = [tokens(best_fit(step, budget), step) for step in steps]
        padded = sum(size * max(step[first : first + size]) for step in steps for first in range(0, SAMPLES, size))
        floor = sum(-(-sum(step) // budget) for step in steps)
        means = [
            total / len(steps) for total in (sum(map(len, packs)), floor, sum(map(max, packs)), sum(map(max, fit)))
        ]
        print(
            f"{size:4} {budget:8,} {means[0]:6.2f} {means[1]:6.2f} {SAMPLES // size:21} {padded / sum(lengths):19.2f} "
            f"{means[2]:13,.0f} {means[3]:18,.0f}"
        )


def tokens(packs: list[list[int]], lengths: list[int]) -> list[int]:
    """Tokens of each pack."""
    return [sum(lengths[number] for number in pack) for pack in packs]


def make_recipe(folder: Path, rows: list[Row], model: str) -> Recipe:
    """A recipe whose set holds the same rows."""
    lines = [json.dumps({"image": row.images[0].path, "prompt": QUESTION, "answer": row.answer}) for row in rows]
    (folder / "shop.jsonl").write_text("\n".join(lines) + "\n")
    return Recipe.from_dict({"model": model, "data": str(folder / "shop.jsonl")})


def measure(name: str, rows: int, work: Callable[[], Any]) -> Any:
    """Does the same work five times and prints how fast the fastest was; gives back what it made."""
    seconds, cpu_seconds = [], []
    for _ in range(5):
        began, cpu_began = time.perf_counter(), time.process_time()
        made = work()
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    print(f"{name}: {rows / min(seconds):,.0f} rows/s, {rows / min(cpu_seconds):,.0f} rows a second of CPU time")
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="of the set that is looked at")
    parser.add_argument("--model", default=str(TINY), help="whose processor and tokenizer are used")
    chosen = parser.parse_args()
    processor = load_processor(chosen.model)
    context = load_config(chosen.model).max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder), chosen.rows)
        recipe = make_recipe(Path(folder), rows, chosen.model)
        lengths, packs = measure("lengths and packs", len(rows), lambda: plan(rows, processor))
        look = measure(
            "the whole look", len(rows), lambda: measured_rows(recipe, open_data(recipe), processor, context)
        )
    print(f"{len(rows):,} rows, {sum(lengths):,} tokens in {packs:,} packs")
    print(f"{len(look.train):,} to train on, {len(look.validation):,} held out")
    show_packs()


if __name__ == "__main__":
    main()
