"""Checkpoints on disk: written whole or not at all, checked by digest, the last good one never removed.

    checkpoints/checkpoint-50/
      adapter_model.safetensors, adapter_config.json   the weights that train, or model*.safetensors and config.json
      optimizer.safetensors, optimizer.json            the optimiser, see `state_files`; so are scheduler and scaler
      rank-0.safetensors, rank-0.json                  what each process has for itself: random states, running sums
      trainer_state.json                               steps done, what was logged
      manifest.json                                    written last: step, conditions, size and SHA-256 of each file,
                                                       and of itself; the name of the checkpoint with the best weights
                                                       where the run ends with those

A checkpoint is filled in `.checkpoint-50.tmp` beside it; its files, the manifest and the folder are seen onto the disk
before one rename makes it a checkpoint. Several ranks fill one folder with files of names of their own: the first one
makes and publishes it, when all are through. Nothing is unpickled: a checkpoint holds safetensors and JSON alone. Knows
nothing of the Trainer.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3v.digests import file_digest
from phi3v.errors import CheckpointError
from phi3v.ranks import ALONE, Ranks
from phi3v.whole_files import sync_file, sync_folder

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
FORMAT = 1
_PLAIN = {".safetensors", ".json", ".jinja", ".txt"}
"""What files of a checkpoint may end in."""
_WEIGHTS = ("adapter_", "model")
"""What the names of a checkpoint's weights, and of what belongs to them, begin with."""
_log = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, step: int, fill: Callable[[Path], Any], facts: dict[str, Any], ranks: Ranks = ALONE
) -> Path:
    """Writes `checkpoint-STEP` into `folder`; what goes wrong meanwhile leaves all as it was.

    Args:
        folder: of all checkpoints of a run.
        step: optimiser steps done.
        fill: writes the files into the folder that it is given.
        facts: what the manifest says besides, {"conditions": {...}} for instance.
        ranks: which fill it together, each with files of its own; the first begins and publishes it.
    """
    staging = folder / f".checkpoint-{step}.tmp"
    try:
        ranks.alone(lambda: begin(staging))
        with ranks.together():
            fill(staging)
        ranks.alone(lambda: publish(staging, facts))
    except BaseException:
        if ranks.first:
            shutil.rmtree(staging, ignore_errors=True)  # it holds space that is needed for another try
        raise
    return published(staging)


def begin(staging: Path) -> None:
    """Makes a folder to fill with a checkpoint; leftovers of a save that was cut off are removed."""
    for leftover in staging.parent.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir(parents=True)


def published(staging: Path) -> Path:
    """What a filled folder is when it is published: `.checkpoint-50.tmp` -> `checkpoint-50`."""
    return staging.with_name(staging.name.removeprefix(".").removesuffix(".tmp"))


def publish(staging: Path, facts: dict[str, Any]) -> Path:
    """Makes a filled folder a checkpoint: `.checkpoint-50.tmp` -> `checkpoint-50`, in place of a broken one."""
    target = published(staging)
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    strangers = [name for name in names if Path(name).suffix not in _PLAIN]
    assert not strangers, f"a checkpoint holds safetensors and JSON alone, not {strangers}"
    for name in names:
        sync_file(staging / name)
    files = {name: {"bytes": (staging / name).stat().st_size, "sha256": file_digest(staging / name)} for name in names}
    manifest = {"format": FORMAT, "step": checkpoint_step(target), **facts, "files": files}
    sealed = {"manifest": manifest, "sha256": _seal(manifest)}
    (staging / MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
    sync_file(staging / MANIFEST)
    sync_folder(staging)
    if target.exists():
        _remove(target)
    os.replace(staging, target)
    sync_folder(target.parent)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, with the best weights where it names them; None
    where there is none at all.

    From one with its best weights a run ends as the undisturbed one. Where none has them any more it is the newest that
    is whole itself; the run goes on with the best weights of those that are left, see `best_weights`.
    Example: of `checkpoint-50` and `checkpoint-100`, in which one bit is another, it is `checkpoint-50`, with a warning
    that names the file.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    faults: list[str] = []
    without_best: list[tuple[Path, str]] = []
    for path in reversed(all_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None and (fault := _fault_of_best(path)):
            without_best.append((path, fault))
        if fault is None:
            if faults:
                _warn_of_damage(faults[0], len(faults), path.name)
            return path
        faults.append(fault)
    if without_best:
        path, fault = without_best[0]
        _warn_of_damage(fault, len(faults), f"{path.name}, with the best weights that are left")
        return path
    if faults:
        raise CheckpointError(
            f"{faults[0]}, and no older checkpoint is whole: copy the file again, or remove {folder} to train from the "
            "start"
        )
    return None


def _warn_of_damage(fault: str, count: int, going_on: str) -> None:
    """One warning for all faults: "... is damaged (and 2 more); going on from checkpoint-50"."""
    more = f" (and {count - 1} more)" if count > 1 else ""
    _log.warning("%s%s; going on from %s", fault, more, going_on)


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, by their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint: `checkpoint-50` -> 50."""
    return int(path.name.removeprefix("checkpoint-"))


def find_fault(path: Path, *, weights: bool = False) -> str | None:
    """What is wrong with a checkpoint, or with its `weights` alone, as half a line that begins with the file; None for
    a whole one.

    Every byte is read. Example: "runs/shop/checkpoints/checkpoint-50/optimizer.safetensors is damaged".
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    for name, facts in manifest["files"].items():
        file = path / name
        if weights and not name.startswith(_WEIGHTS):
            continue
        try:
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{file} has {file.stat().st_size} bytes of {facts['bytes']}"
            if file_digest(file) != facts["sha256"]:
                return f"{file} is damaged"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
    return None


def _fault_of_best(path: Path) -> str | None:
    """What is wrong with the best weights up to a checkpoint, which a run from there may end with."""
    best = _best_of(path)
    fault = find_fault(path.with_name(best), weights=True) if best else None
    return f"{fault} (the best weights up to {path.name})" if fault else None


def _best_of(path: Path) -> str | None:
    """The checkpoint with the best weights up to one, by its name; None where none is named, or nothing can be read."""
    try:
        return read_manifest(path).get("best")
    except CheckpointError:
        return None


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises: CheckpointError, as half a line."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        sealed = json.loads(file.read_text(encoding="utf-8"))
        manifest = sealed["manifest"]
        whole = sealed["sha256"] == _seal(manifest)
        whole = whole and (manifest["format"], manifest["step"]) == (FORMAT, checkpoint_step(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file} is broken")
    return manifest


def logged_lines(path: Path) -> int:
    """How many lines of the run's log a checkpoint knows of its own step: that of the loss, that of an evaluation."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return sum(line.get("step") == checkpoint_step(path) for line in state["log_history"])


def rotate(folder: Path, newest: Path, limit: int | None, best: Path | None) -> None:
    """Removes checkpoints beyond `limit`: the oldest first, those behind `newest` among them, which were broken.

    `newest` was just written and is whole, so one whole checkpoint is there at any moment. An older one stays with what
    it names as the best, or not at all. Example: limit 2 and best `checkpoint-10` keep of 10, 20, 30 and 40 (the
    newest) 10 and 40.
    """
    if not limit or limit < 0:
        return
    kept = {newest.name, *([best.name] if best is not None else [])}
    older = [path for path in all_checkpoints(folder) if checkpoint_step(path) < checkpoint_step(newest)]
    for path in reversed(older):
        more = kept | {path.name, _best_of(path) or path.name}
        if len(more) <= limit:
            kept = more
    for path in all_checkpoints(folder):
        if path.name not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint, which is none from the first moment on."""
    away = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(away, ignore_errors=True)
    os.replace(path, away)
    shutil.rmtree(away, ignore_errors=True)


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
