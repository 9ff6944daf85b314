"""Runs that were never trained: a recipe on the tiny model and photos, and a run's folder of random weights."""

from pathlib import Path

import torch
from tiny_models import write_tiny_model

from phi3v.loading import load_base, load_processor
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.tuning import attach_lora

HELD_OUT = 5


def make_recipe(folder: Path, **sections) -> Recipe:
    """A recipe on the tiny model and coloured photos, with 5 held-out rows."""
    values = {
        "model": str(folder / "model"),
        "data": {
            "train": str(folder / "photos" / "rows.jsonl"),
            "prompt": "What colour?",
            "answer": "It is {colour}.",
            "split": {"validation": HELD_OUT},
        },
        "evaluation": {"batch_size": 2, "max_new_tokens": 5},
        "report": {"samples": 3},
        "output": str(folder / "run"),
    }
    return Recipe.from_dict({**values, **sections})


def make_run(folder: Path, recipe: Recipe) -> RunFolder:
    """A run whose adapter is random, or whose model is another random one where the recipe tunes everything."""
    run = RunFolder(recipe.output)
    run.start(recipe)
    processor = load_processor(recipe.model.name)
    model = load_base(recipe.model.name, device="cpu")
    if recipe.lora is None:
        model = load_base(write_tiny_model(folder / "other", seed=1), device="cpu")
    else:
        model = attach_lora(model, recipe.lora)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)

    def save(place: Path) -> None:
        model.save_pretrained(place)
        processor.save_pretrained(place)

    (run.write_model if recipe.lora is None else run.write_adapter)(save)
    run.append_metrics({"step": 1, "loss": 2.0})
    run.mark_finished({"seconds": 3.0, "trainable": {"projector": {"trainable": 0, "total": 7}}})
    return run
