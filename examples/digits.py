"""Pictures nobody here drew: phi3v on scikit-learn's scans of handwritten digits.

The 1,797 scans of `load_digits` (8 x 8 grey levels) are enlarged to 336 pixels and the small model that comes with
phi3v learns to answer "The digit is N.", once with all its weights and once with LoRA on the decoder alone. 300 scans
are never trained on; a nearest-neighbour classifier on the raw pixels says what they are worth.

    python examples/digits.py [FOLDER]

On two CPU cores the two runs take a few minutes each. Needs scikit-learn (pip install "phi3v[test]").
"""

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import phi3v
from phi3v.demo import tiny_model_path

UNSEEN = 300
PROMPT, ANSWER = "Which digit is it?", "The digit is {digit}."

FULL = {
    "lora": None,
    "vision": {"tower": "train", "projector": "train"},
    "training": {"samples_per_step": 16, "micro_batch_size": 16, "epochs": 4.0, "learning_rate": 1e-3},
}
LORA = {
    "lora": {"r": 32, "lora_alpha": 64},
    "vision": {"cache": "memory"},
    "training": {"samples_per_step": 16, "micro_batch_size": 16, "epochs": 4.0, "learning_rate": 3e-3},
}


def write_scans(folder: Path) -> dict[str, Path]:
    """Writes all scans as PNG files and two tables, `train.csv` and `unseen.csv` (300 rows drawn with seed 0)."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(digits.images))
    tables = {}
    for name, rows in (("unseen", order[:UNSEEN]), ("train", order[UNSEEN:])):
        tables[name] = folder / f"{name}.csv"
        with open(tables[name], "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "digit"])
            for row in rows:
                scan = Image.fromarray((digits.images[row] * 255 / 16).astype(np.uint8))
                scan.resize((336, 336), Image.Resampling.BICUBIC).save(folder / "images" / f"{row:04}.png")
                table.writerow([f"images/{row:04}.png", digits.target[row]])
    return tables


def nearest_neighbour() -> float:
    """Share of the unseen scans that their nearest training scan names rightly."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    unseen, seen = order[:UNSEEN], order[UNSEEN:]
    judge = KNeighborsClassifier(1).fit(digits.data[seen], digits.target[seen])
    return float(judge.score(digits.data[unseen], digits.target[unseen]))


def tune(folder: Path, tables: dict[str, Path], name: str, choice: dict) -> tuple[float, float]:
    """Trains one way and answers the unseen scans; exact match and the seconds that all of it took."""
    began = time.monotonic()
    data = {"train": str(tables["train"]), "validation": str(tables["unseen"]), "prompt": PROMPT, "answer": ANSWER}
    shared = {"model": str(tiny_model_path()), "data": data, "image": {"num_crops": 1}, "output": str(folder / name)}
    choice["training"] |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "logging_steps": 20, "seed": 0}
    evaluation = {"batch_size": 50, "max_new_tokens": 16}
    result = phi3v.train(phi3v.Recipe.from_dict({**shared, **choice, "evaluation": evaluation}))
    scores = json.loads((result.folder / "evaluation.json").read_text())["scores"]
    return scores["tuned"]["exact_match"]["value"], time.monotonic() - began


def main() -> dict[str, float]:
    """Runs both ways and prints the table; returns the exact matches by name."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
    tables = write_scans(folder / "data")
    found = {"nearest neighbour": nearest_neighbour()}
    print(f"nearest neighbour  {found['nearest neighbour']:7.1%}")
    for name, choice in (("full", FULL), ("lora", LORA)):
        found[name], seconds = tune(folder, tables, name, choice)
        print(f"phi3v, {name:<11} {found[name]:7.1%}  of {UNSEEN} unseen scans, {seconds / 60:.1f} minutes", flush=True)
    return found


if __name__ == "__main__":
    main()
