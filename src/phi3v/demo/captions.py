"""What the small model could do before the demo tuned it: captions of scenes, as a data set of rows to keep.

`write_captions(folder)` writes pictures and `rows.jsonl` with the columns image, question and answer; the scenes are of
a seed that the model never saw.
"""

from __future__ import annotations

import json
from pathlib import Path

from phi3v.demo.scenes import scene
from phi3v.whole_files import replace_file

CAPTIONS = ("Describe the picture.", "Describe the picture in reverse.", "List what you see.")
SEED = 79
SCENES = (
    5,
    14,
    31,
    41,
    46,
    57,
    83,
    107,
    109,
    154,
    155,
    173,
    185,
    188,
    199,
    201,
    202,
    237,
    275,
    278,
    283,
    288,
    290,
    295,
)
"""Scenes of that seed that have a caption: one in ten, and to paint the others would take seconds."""


def write_captions(folder: Path) -> Path:
    """Writes the captions, 24 of them, and returns the table; one that is there stays as it is.

    Example of a line: {"image": "14.png", "question": "Describe the picture.", "answer": "a plain black tree with the
    number 9"}.
    """
    table = folder / "rows.jsonl"
    if table.is_file():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in SCENES:
        made = scene(SEED, index)
        question, answer = next(turn for turn in made.turns if turn[0] in CAPTIONS)
        made.image.save(folder / f"{index}.png", compress_level=1)
        lines.append(json.dumps({"image": f"{index}.png", "question": question, "answer": answer}) + "\n")
    replace_file(table, "".join(lines))
    return table
