"""The state of optimisers, schedules and random generators in files, without pickle, and back, equal bit by bit.

In comes a nested value of plain Python, tensors and numpy arrays; out come `NAME.safetensors` with the numbers and
`NAME.json` with everything else. Reading them runs no code. Knows nothing of the Trainer or of folders of checkpoints.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from phi3v.errors import TrainingError


def write_state(folder: Path, name: str, state: Any) -> None:
    """Writes a nested value as two files.

    A mapping is stored as its pairs, so that keys keep their type, and each tensor once, however often it occurs.
    Example: {0: {"step": tensor(3.0), "betas": (0.9, 0.999)}} is, beside the tensor "0",
    {"dict": [[0, {"dict": [["step", {"tensor": "0"}], ["betas", {"tuple": [0.9, 0.999]}]]}]]}.

    Raises: TrainingError for what only pickle could hold.
    """
    tensors = _Tensors()
    tree = _plain(state, tensors, name)
    save_file(tensors.numbered, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


def read_state(folder: Path, name: str) -> Any:
    """What `write_state` wrote; tensors are on the CPU."""
    tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return _state(tree, load_file(folder / f"{name}.safetensors"))


def random_states() -> dict[str, Any]:
    """The states of all random generators that a training draws from."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else states


def set_random_states(states: dict[str, Any]) -> None:
    """Goes back to what `random_states` gave; GPUs that are not here any more are left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


class _Tensors:
    """Tensors under numbers, each by itself on the CPU: the same one twice has one number, views are taken apart."""

    def __init__(self) -> None:
        self.numbered: dict[str, torch.Tensor] = {}
        self._numbers: dict[int, str] = {}
        self._places: set[int] = set()

    def number(self, tensor: torch.Tensor, owner: Any) -> str:
        """The number of a tensor; `owner` is what it is known by again."""
        if id(owner) not in self._numbers:
            alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            stored = tensor.cpu() if alone else tensor.cpu().contiguous().clone()
            if stored.data_ptr() in self._places:
                stored = stored.clone()
            self._places.add(stored.data_ptr())
            self._numbers[id(owner)] = str(len(self.numbered))
            self.numbered[self._numbers[id(owner)]] = stored
        return self._numbers[id(owner)]


def _plain(value: Any, tensors: _Tensors, place: str) -> Any:
    """`value` as JSON has it, with numbers in place of tensors."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, dict):
        pairs = [[key, _plain(item, tensors, f"{place}.{key}")] for key, item in value.items()]
        if all(key is None or isinstance(key, bool | int | str) for key, _ in pairs):
            return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_plain(item, tensors, f"{place}.{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, np.generic):
        return _plain(value.item(), tensors, place)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": tensors.number(torch.from_numpy(value.copy()), value)}
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return {"tensor": tensors.number(value.detach(), value)}
    raise TrainingError(
        f"a checkpoint holds numbers and plain values, and {place} is a {type(value).__name__}, which pickle alone "
        "could store: choose another training.optim or training.lr_scheduler_type"
    )


def _state(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value that `_plain` made this of."""
    if isinstance(tree, list):
        return [_state(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "dict":
        return {key: _state(item, tensors) for key, item in content}
    if kind == "tuple":
        return tuple(_state(item, tensors) for item in content)
    if kind == "float":
        return float(content)
    tensor = tensors[content].clone()  # not a part of the file any more, which may be removed
    return tensor.numpy() if kind == "array" else tensor
