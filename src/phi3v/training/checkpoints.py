"""Which checkpoint a run goes on from.

The Trainer writes `checkpoints/checkpoint-N` file by file, its state last; a folder that lacks one of the files was
being written when the run was stopped, and is passed over.
"""

from pathlib import Path

_STATE_LAST = "trainer_state.json"
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", _STATE_LAST)
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, None when there is none.

    Example: with `checkpoint-50` (complete) and `checkpoint-100` (no `trainer_state.json`) it is `checkpoint-50`.
    """
    complete = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and _is_complete(path)]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint: `checkpoint-50` -> 50."""
    return int(path.name.removeprefix("checkpoint-"))


def _is_complete(path: Path) -> bool:
    """Whether every file that a resume reads is there and not empty."""
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    return all(sizes.get(name) for name in _NEEDED) and any(sizes.get(name) for name in _WEIGHTS)
