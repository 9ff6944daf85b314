"""The shipped recipes: they load, their options exist, and the demo's two files say the same."""

import re
from pathlib import Path

import pytest
import torch

from phi3v.data.split import split_rows
from phi3v.recipe import Recipe
from phi3v.recipe_yaml import read_yaml
from phi3v.run_folder import RunFolder
from phi3v.training.arguments import training_arguments
from phi3v.training.sampling import epoch_order
from phi3v.tuning import lora_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_the_libraries_take_its_options(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    if recipe.lora is not None:
        lora_config(recipe.lora)
    arguments = training_arguments(
        recipe, RunFolder(tmp_path), device=torch.device("cpu"), autocast=None, validated=True
    )
    steps = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert steps == recipe.training.samples_per_step
    assert path.name in path.read_text().split("\n\n")[1] or f"recipes/{path.name}" in path.read_text()


def test_the_guides_run_in_numbers(tmp_path: Path) -> None:
    recipe = Recipe.load(ROOT / "recipes" / "burberry_lora.yaml")
    arguments = training_arguments(
        recipe, RunFolder(tmp_path), device=torch.device("cpu"), autocast=torch.bfloat16, validated=True
    )
    assert (arguments.bf16, arguments.eval_strategy, arguments.eval_steps) == (True, "steps", 100)
    split = recipe.data.split
    assert split is not None and isinstance(recipe.training.epochs, float)
    said = re.search(r"([\d,]+) rows make about (\d+) steps", (ROOT / "recipes" / "burberry_lora.yaml").read_text())
    assert said is not None
    rows, steps = (int(number.replace(",", "")) for number in said.groups())
    samples = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    found = []
    for shop in range(8):  # a share is near, not exact: other addresses, other rows held out
        keys = [[f"https://shop{shop}.example/{row}.jpg"] for row in range(rows)]
        sides = split_rows(keys, split.validation, split.seed)
        assert rows == 3040 == len(sides.train) + len(sides.validation) and not sides.left_out
        assert abs(len(sides.validation) - 304) < 60
        order = epoch_order(len(sides.train), samples, recipe.training.seed, 0)
        found.append(len(order) / samples * recipe.training.epochs)
    assert sum(found) / len(found) == pytest.approx(steps, abs=4)
    assert arguments.save_steps * 5 < steps and 500 < steps < 1000  # the guide saves every 500


def test_the_demos_recipe_is_the_same_in_both_places() -> None:
    shown = Recipe.load(ROOT / "recipes" / "demo.yaml")
    inside = read_yaml((ROOT / "src" / "phi3v" / "demo" / "recipe.yaml").read_text(), "the demo's recipe")
    places = {"model": shown.model.name, "output": shown.output}
    hidden = Recipe.from_dict({**inside, **places})
    differences = [
        line for line in shown.differences(hidden) if not line.startswith(("data.train:", "data.validation:"))
    ]
    assert differences == []
