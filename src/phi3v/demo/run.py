"""The story of `phi3v demo`: products are painted, a small model learns to read them, and controls say whether it does.

In comes a folder, out come figures; every one of them is computed here and now. The folder holds `products/` (photos
and tables), `captions/` (what the model could do before), `tuned/` and `shuffled/` (two runs) and
`demo.json` (what this returns; `{}` until then). The same call again goes on where an earlier one stopped. Everything
but the products, the captions and the small model is what any recipe goes through.
"""

from __future__ import annotations

import csv
import json
import shlex
import time
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

from phi3v.demo.captions import write_captions
from phi3v.demo.catalogue import write_catalogue
from phi3v.errors import ConfigError
from phi3v.evaluation.controls import answer_controls
from phi3v.evaluation.report_run import write_report
from phi3v.evaluation.run import feature_store, held_out_rows
from phi3v.plain_json import to_json
from phi3v.recipe import Recipe
from phi3v.recipe_yaml import read_yaml
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target
from phi3v.training.callbacks import Watcher
from phi3v.training.train import train
from phi3v.whole_files import replace_file

Progress = Callable[[str, int, int], None]
SAMPLES = 3
_ANSWER_COLUMNS = ("title", "category3_code", "full_price")


def run_demo(
    output: str | Path,
    *,
    overrides: list[str] | None = None,
    on_event: Watcher | None = None,
    on_progress: Progress = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs the demo.

    Args:
        output: folder of all that it writes.
        overrides: "section.key=value" for both runs, to make it shorter for instance.
        on_event: watches the trainings.
        on_progress: called with a stage, rows done and rows in all.
        say: called with a line about what comes next.

    Returns:
        "evaluation" (base and tuned on unseen products, as in evaluation.json, checks among it), "controls" (name ->
        exact match as a `Share` dict), "shuffled_checks" (what is found of the run on shuffled answers), "samples" (a
        few questions with all answers), "report", "run", "try" (a command to paste), "seconds".

    Raises:
        ConfigError: `output` is a file, or a folder that holds something else than a demo.
    """
    folder, began = Path(output), time.monotonic()
    _claim(folder)
    say("painting products")
    tables = _products(folder / "products")
    captions = write_captions(folder / "captions")
    checked = [
        "evaluation.checks=[overlap, form, constant, images, forgetting]",
        f"evaluation.keep={json.dumps(str(captions))}",
    ]
    recipe = demo_recipe(tables["train"], tables["test"], folder / "tuned", [*checked, *(overrides or [])])
    say(f"tuning on {_count_rows(tables['train'])} products")
    features = feature_store(recipe, None)  # both runs see the same photos
    train(recipe, on_event=on_event, features=features)
    run = RunFolder(folder / "tuned")
    say("control: the same questions with the pictures of others")
    spoiled = answer_controls(run.path, blank=False, on_progress=on_progress, features=features)
    say("control: a second run, tuned on answers that were shuffled among the photos")
    shuffled = shuffle_answers(tables["train"])
    tuned_alone = ["evaluation.against=null", "evaluation.checks=[constant, images]", "training.eval_strategy=no"]
    control = demo_recipe(shuffled, tables["test"], folder / "shuffled", [*tuned_alone, *(overrides or [])])
    train(control, on_event=on_event, features=features)
    evaluation, lost = run.read_evaluation(), RunFolder(folder / "shuffled").read_evaluation()
    controls = {
        "most frequent answer to everything": evaluation["majority"]["share"],
        "pictures blanked": _share(evaluation["checks"]["images"]["with_grey_images"]),
        "pictures swapped": vars(spoiled.swapped),
        "pictures swapped, judged by the picture shown": vars(spoiled.follows_swap),
        "tuned on shuffled answers": lost["scores"]["tuned"]["exact_match"],
    }
    held_out = held_out_rows(resolve_target(run.path), None, None)
    write_report(run, held_out.rows, controls)
    samples = run.read_predictions()[:SAMPLES]
    story = {
        "evaluation": evaluation,
        "controls": controls,
        "shuffled_checks": lost["checks"],
        "samples": samples,
        "run": str(run.path),
        "report": str(run.report),
        "try": _command(run.path, tables["test"].parent / samples[0]["images"][0], recipe.data.prompt),
        "seconds": time.monotonic() - began,
    }
    replace_file(folder / "demo.json", to_json(story, indent=2) + "\n")
    return story


def demo_recipe(train_table: Path, test_table: Path, output: Path, overrides: list[str] | None = None) -> Recipe:
    """The demo's recipe (`recipe.yaml` beside this file) for these tables, on the model that comes with the package."""
    here = resources.files("phi3v.demo")
    values = read_yaml(here.joinpath("recipe.yaml").read_text(encoding="utf-8"), "the demo's recipe")
    places = {
        "model.name": str(here / "tiny"),
        "data.train": str(train_table),
        "data.validation": str(test_table),
        "output": str(output),
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in places.items()]
    return Recipe.from_dict(values, [*settings, *(overrides or [])])


def shuffle_answers(table: Path, seed: int = 0) -> Path:
    """A copy of a table in which the answers were dealt out anew: photos and answers stay, what belongs together does
    not.

    Example: rows (photo 1, Navy Scarf, 108), (photo 2, Teal Cap, 115) become (photo 1, Teal Cap, 115), (photo 2, ...).
    """
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    order = list(range(len(rows)))
    Random(seed).shuffle(order)
    dealt = [{**row, **{name: rows[order[at]][name] for name in _ANSWER_COLUMNS}} for at, row in enumerate(rows)]
    shuffled = table.with_name("train_shuffled.csv")
    with open(shuffled, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(dealt)
    return shuffled


def _claim(folder: Path) -> None:
    """Marks a new or empty folder as a demo's; a demo's folder stays as it is, any other is refused untouched."""
    marker = folder / "demo.json"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file: give a folder that is new, empty or an earlier demo's")
    if marker.is_file():
        return
    found = min((entry.name for entry in folder.iterdir()), default=None) if folder.is_dir() else None
    if found is not None:
        raise ConfigError(
            f"output {folder} holds {found} and is no demo's: give a folder that is new, empty or an earlier demo's"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(marker, "{}\n")
    except OSError as error:
        raise ConfigError(f"output {folder} cannot be used ({error}): give another folder") from error


def _products(folder: Path) -> dict[str, Path]:
    """The catalogue, painted once; the last file that painting writes says that it is whole."""
    tables = {part: folder / f"{part}.csv" for part in ("train", "test")}
    return tables if tables["test"].is_file() else write_catalogue(folder)


def _count_rows(table: Path) -> int:
    with open(table, newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.DictReader(file))


def _share(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """An exact match of the checks as a `Share` dict: {"value": 0.5, ..., "rows": 4} -> 2 of 4, with its interval."""
    total = estimate["rows"]
    return {
        "hits": round(estimate["value"] * total),
        "total": total,
        **{name: estimate[name] for name in ("value", "low", "high")},
    }


def _command(run: Path, photo: Path, question: str) -> str:
    return shlex.join(["phi3v", "ask", str(run), str(photo), question])
