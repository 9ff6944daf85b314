"""Which checkpoint a run goes on from.

The Trainer writes `checkpoints/checkpoint-N` file by file, its state last; a folder that lacks one of the files was
being written when the run was stopped, and is passed over. One that has them all and cannot be read is passed over with
a warning. Nothing is unpickled here: of PyTorch's files, which are archives, the checksums are compared.
"""

import json
import logging
import zipfile
import zlib
from pathlib import Path

from phi3v.errors import CheckpointError
from phi3v.targets import ADAPTER_WEIGHTS, check_model_folder, tensor_shapes

_STATE_LAST = "trainer_state.json"
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", _STATE_LAST)
_WEIGHTS = (ADAPTER_WEIGHTS, "model.safetensors", "model.safetensors.index.json")
_log = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step that can be read, None when none is complete.

    Example: with `checkpoint-50` (complete) and `checkpoint-100` (no `trainer_state.json`) it is `checkpoint-50`.

    Raises:
        CheckpointError: there are complete ones, and none can be read.
    """
    complete = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and _is_complete(path)]
    faults: list[str] = []
    for path in sorted(complete, key=checkpoint_step, reverse=True):
        fault = _fault(path)
        if fault is None:
            if faults:
                _log.warning("%s; going on from %s", faults[0], path.name)
            return path
        faults.append(fault)
    if faults:
        raise CheckpointError(
            f"{faults[0]}, and no older checkpoint is whole: copy the file again, or remove {folder} to train from the "
            "start"
        )
    return None


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint: `checkpoint-50` -> 50."""
    return int(path.name.removeprefix("checkpoint-"))


def _is_complete(path: Path) -> bool:
    """Whether every file that a resume reads is there and not empty."""
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    return all(sizes.get(name) for name in _NEEDED) and any(sizes.get(name) for name in _WEIGHTS)


def _fault(path: Path) -> str | None:
    """The first file of a complete checkpoint that cannot be read, as half a line; None for a sound one."""
    try:
        state = json.loads((path / _STATE_LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = None
    if not isinstance(state, dict) or state.get("global_step") != checkpoint_step(path):
        return f"{path / _STATE_LAST} is broken"
    try:
        if (path / ADAPTER_WEIGHTS).is_file():
            tensor_shapes(path / ADAPTER_WEIGHTS)
        else:
            check_model_folder(path)
    except CheckpointError as error:
        return str(error).rpartition(":")[0]  # without its way out
    archives = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth"))
    return next((f"{file} is broken" for file in archives if not _is_whole_archive(file)), None)


def _is_whole_archive(file: Path) -> bool:
    """Whether a file of torch.save holds what its checksums say."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False
