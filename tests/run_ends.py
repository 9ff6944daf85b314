"""Runs that are interrupted, and what they end with, to be compared with the undisturbed one bit by bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from phi3v.run_folder import RunFolder
from phi3v.training.checkpoints import newest_checkpoint

HARD: dict[str, Any] = {
    "data": {"split": {"validation": 2}},
    "evaluation": {"rows": 1, "max_new_tokens": 2},
    "image": {"augment": {"crop": 0.2, "rotate": 10, "brightness": 0.2, "saturation": 0.2, "mirror": 0.5}},
    "lora": {"r": 4, "lora_dropout": 0.2},
    "training": {
        "samples_per_step": 4,
        "micro_batch_size": 1,
        "epochs": 3,
        "save_steps": 2,
        "logging_steps": 3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "warmup_steps": 1,
    },
}
"""LoRA dropout, images changed at random, shuffling, packing, four samples a step in several packs, lines of the log
between checkpoints."""

LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


def end_of(folder: str | Path) -> dict[str, Any]:
    """Tuned weights, the whole of the last checkpoint but for times, and all logged numbers of a run."""
    run = RunFolder(folder)
    last = newest_checkpoint(run.checkpoints)
    assert last is not None and {file.suffix for file in last.iterdir()} == {".safetensors", ".json"}
    weights = [*run.adapter.glob("*.safetensors"), *run.model.glob("*.safetensors")]
    tensors = {
        f"{file.parent.name}/{file.name}/{name}": tensor
        for file in [*last.glob("*.safetensors"), *weights]
        for name, tensor in load_file(file).items()
    }
    plain = {file.name: json.loads(file.read_text()) for file in last.glob("*.json") if file.name != "manifest.json"}
    plain.pop("adapter_config.json", None)  # sets in it have an order of their own in each process
    state = plain.pop("trainer_state.json")
    logged = [(line["step"], name, line[name]) for line in run.read_metrics() for name in LOGGED if name in line]
    return {"tensors": tensors, "plain": plain, "step": state["global_step"], "logged": logged}


def assert_same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares what `end_of` gave of two runs, without any tolerance."""
    for name in ("step", "logged", "plain"):
        assert found[name] == expected[name], name
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
