"""What tests of training share: a tiny model with photos, and a recipe for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_photos, write_tiny_model

import phi3v

MakeRecipe = Callable[..., phi3v.Recipe]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and ten photos."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 10)
    return folder


@pytest.fixture
def make(world: Path, tmp_path: Path) -> MakeRecipe:
    """Makes a recipe of six steps of four samples; keywords replace sections, `name` names the run."""

    def recipe(name: str = "run", **sections: Any) -> phi3v.Recipe:
        values = {
            "model": str(world / "model"),
            "data": {
                "train": str(world / "photos" / "rows.jsonl"),
                "prompt": "Which colour?",
                "answer": "It is {colour}.",
                "split": None,
            },
            "lora": {"r": 4},
            "training": {"samples_per_step": 4, "micro_batch_size": 2, "epochs": 2, "logging_steps": 1, "seed": 5},
            "output": str(tmp_path / name),
        }
        for section, changes in sections.items():
            both = isinstance(values.get(section), dict) and isinstance(changes, dict)
            values[section] = {**values[section], **changes} if both else changes
        return phi3v.Recipe.from_dict(values)

    return recipe
