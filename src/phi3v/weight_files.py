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

_EMBEDDING, _SECOND_NAME = "model.embed_tokens.weight", "model.vision_embed_tokens.wte.weight"
_ROWS_AT_ONCE = 1024


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


def check_second_embedding(name: str | Path, revision: str | None = None) -> None:
    """Refuses weights whose `wte`, a second name of the embeddings in files with shared tensors, has values of its own.

    Both are read from their files, single or sharded, a few rows at a time; where there is no `wte` no tensor is read.
    Raises: CheckpointError.
    """
    places = weight_files(name, revision)
    if _SECOND_NAME not in places:
        return
    with safe_open(places[_EMBEDDING], "pt") as first, safe_open(places[_SECOND_NAME], "pt") as second:
        ours, theirs = first.get_slice(_EMBEDDING), second.get_slice(_SECOND_NAME)
        parts = [slice(row, row + _ROWS_AT_ONCE) for row in range(0, ours.get_shape()[0], _ROWS_AT_ONCE)]
        if ours.get_shape() == theirs.get_shape() and all(
            torch.equal(ours[part].float(), theirs[part].float()) for part in parts
        ):
            return
    raise CheckpointError(
        f"{places[_SECOND_NAME]}: {_SECOND_NAME} is a second name of {_EMBEDDING} and differs from it: which "
        "of them the model was trained with is not known; save the model again without it, or restore the file"
    )


def find_file(name: str | Path, file: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub id that was downloaded; None where there is none."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found: Any = cached_file(str(name), file, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
