"""How much less N trials of a sweep cost than N runs: processor seconds of one process, on the demo's products.

    python benchmarks/sweep.py --out benchmarks/sweep [--trials 4] [--rows 200] [--steps 150] [--products FOLDER]

The tiny model that comes with the package, LoRA, tower and projector frozen. A run is `phi3v.train` as a recipe without
`vision.cache` has it ("plain"), or with features kept in memory by itself ("kept"); a sweep tries the same learning
rates, one trial each, with what trials share. Pruning is off, so that all take the same steps, and the program stops
when the held-out losses of runs and trials differ. Runs and sweep follow a warm-up that is not counted.
"""

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from results import machine, to_write, write

from phi3v.demo.catalogue import write_catalogue
from phi3v.demo.run import demo_recipe
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.sweep.run import sweep
from phi3v.training.train import train


def first_rows(table: Path, count: int) -> Path:
    """A table of the first rows of another, beside it."""
    short = table.with_name(f"{table.stem}_{count}.csv")
    with open(table, newline="", encoding="utf-8") as file, open(short, "w", newline="", encoding="utf-8") as out:
        reader = csv.DictReader(file)
        writer = csv.DictWriter(out, reader.fieldnames, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in zip(range(count), reader, strict=False))
    return short


def losses(folder: Path) -> list[float]:
    """Held-out losses of a run."""
    return [line["eval_loss"] for line in RunFolder(folder).read_metrics() if "eval_loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=to_write, required=True, help="path of the result without .json")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rows", type=int, default=200, help="training rows; a quarter as many are held out")
    parser.add_argument("--steps", type=int, default=150, help="of four rows: three epochs")
    parser.add_argument("--products", type=Path, help="an earlier demo's products/; painted anew otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        products = options.products or folder / "products"
        if not options.products:
            write_catalogue(products)
        tables = [first_rows(products / name, count) for name, count in _tables(options.rows)]
        rates = [round(5e-4 * 1.5**place, 9) for place in range(options.trials)]
        settings = ["vision.cache=null", f"training.max_steps={options.steps}", "training.eval_strategy=steps"]
        base = demo_recipe(*tables, folder / "sweep", [*settings, f"training.eval_steps={options.steps}"])
        search = [f"sweep.search={{training.learning_rate: {rates}}}", f"sweep.trials={len(rates)}"]
        asked = base.with_overrides([*search, "sweep.sampler=GridSampler", "sweep.pruner=null"])
        run(base.with_overrides(["training.max_steps=1"]), folder / "warm-up")
        seconds: dict[str, list[float]] = {"plain": [], "kept": []}
        for rate in rates:  # in turn, so that a machine that is slow for a while is slow for both
            for name, cache in (("plain", "null"), ("kept", "memory")):
                recipe = base.with_overrides([f"vision.cache={cache}", f"training.learning_rate={rate}"])
                seconds[name].append(run(recipe, folder / name / str(rate)))
        began = time.process_time()
        found = sweep(asked)
        whole = time.process_time() - began
        clock = [line["seconds"] for line in sorted(found.ranking["trials"], key=lambda line: line["trial"])]
        for line in found.ranking["trials"]:
            rate = line["values"]["training.learning_rate"]
            if losses(Path(line["folder"])) != losses(folder / "kept" / str(rate)):
                raise SystemExit(f"trial {line['trial']} and the run of the same rate end with different losses")
    result = {
        "machine": machine(),
        "rows": options.rows,
        "steps": options.steps,
        "trials": len(rates),
        "processor_seconds": {"plain": sum(seconds["plain"]), "kept": sum(seconds["kept"]), "sweep": whole},
        "each": seconds,
        "trials_by_the_clock": clock,
    }
    write(result, options.out)
    told = {name: round(value, 1) for name, value in result["processor_seconds"].items()}
    print(f"{len(rates)} runs and {len(rates)} trials, processor seconds: {told}")


def _tables(rows: int) -> list[tuple[str, int]]:
    return [("train.csv", rows), ("test.csv", max(1, rows // 4))]


def run(recipe: Recipe, output: Path) -> float:
    """Processor seconds of a run by itself."""
    began = time.process_time()
    train(recipe.with_overrides([f"output={output}"]), report=False)
    return time.process_time() - began


if __name__ == "__main__":
    main()
