"""The tensors of a model folder or hub id as they lie in its files, read one at a time; and where any file of it lies.

In comes a name, out come tensors by the names that the model has for them. What belongs where is checked by
`loading`; this is for who compares what is in memory with what is on disk.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from phi3v.errors import CheckpointError
from phi3v.targets import MODEL_INDEX, MODEL_WEIGHTS, read_json


def weight_files(name: str | Path, revision: str | None = None) -> dict[str, Path]:
    """Where each tensor of a model lies: {"lm_head.weight": Path(".../model-00002-of-00002.safetensors")}.

    Raises: CheckpointError where there are no safetensors.
    """
    index = find_file(name, MODEL_INDEX, revision)
    if index is not None:
        placed = read_json(index)["weight_map"]
        shards = {shard: find_file(name, shard, revision) for shard in set(placed.values())}
        return {tensor: path for tensor, shard in placed.items() if (path := shards[shard]) is not None}
    single = find_file(name, MODEL_WEIGHTS, revision)
    if single is None:
        raise CheckpointError(f"{name} has neither {MODEL_INDEX} nor {MODEL_WEIGHTS}")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def read_weights(places: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors with their names, one in memory at a time."""
    for path in sorted(set(places.values())):
        with safe_open(path, framework="pt") as file:
            for name in sorted(name for name, place in places.items() if place == path):
                yield name, file.get_tensor(name)


def find_file(name: str | Path, file: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub id that was downloaded; None where there is none."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found: Any = cached_file(str(name), file, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
