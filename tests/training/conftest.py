"""What tests of training share: a tiny model with photos, and a recipe for them; loss curves are not drawn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_photos, write_tiny_model

import phi3v
from phi3v.evaluation import report_curves

MakeRecipe = Callable[..., phi3v.Recipe]


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run ends with two drawings by matplotlib, a fifth of its time here.

    They are looked at in tests/evaluation/test_report.py, and in test_cli_process.py as those of a run.
    """
    monkeypatch.setattr(report_curves, "_draw", lambda *args, **options: b"<svg></svg>")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and ten photos."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 10)
    return folder


def recipe_in(world: Path, folder: Path, name: str, sections: dict[str, Any]) -> phi3v.Recipe:
    """A recipe of six steps of four samples for a run in a folder; `sections` replace its own."""
    values = {
        "model": {"name": str(world / "model"), "device": "cpu"},  # what they assert is the way of a CPU
        "data": {
            "train": str(world / "photos" / "rows.jsonl"),
            "prompt": "Which colour?",
            "answer": "It is {colour}.",
            "split": None,
        },
        "lora": {"r": 4},
        "training": {"samples_per_step": 4, "micro_batch_size": 2, "epochs": 2, "logging_steps": 1, "seed": 5},
        "evaluation": {"max_new_tokens": 4},  # an untrained model would go on to the end
        "output": str(folder / name),
    }
    for section, changes in sections.items():
        both = isinstance(values.get(section), dict) and isinstance(changes, dict)
        values[section] = {**values[section], **changes} if both else changes
    return phi3v.Recipe.from_dict(values)


@pytest.fixture
def make(world: Path, tmp_path: Path) -> MakeRecipe:
    """Makes a recipe as `recipe_in` does; keywords replace sections, `name` names the run."""
    return lambda name="run", **sections: recipe_in(world, tmp_path, name, sections)


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRecipe:
    """The recipe of a run that is trained for the first test of a module that asks for it, and read by the others."""
    done: dict[str, phi3v.Recipe] = {}

    def once(**sections: Any) -> phi3v.Recipe:
        key = json.dumps(sections, sort_keys=True)
        if key not in done:
            recipe = recipe_in(world, tmp_path_factory.mktemp("trained"), "run", sections)
            phi3v.train(recipe)
            done[key] = recipe
        return done[key]

    return once
