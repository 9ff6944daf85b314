"""What a run was trained under so far: its rows, its base, and what it ran on.

In come rows and a model, out come short names for them that a checkpoint keeps; a run that goes on compares them. Other
rows or another base are refused: steps done would no longer be steps of this run. Other versions and devices compute a
little differently and are listed. The recipe itself is compared in `run_folder`.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from phi3v.data.sources import LoadedData, StreamedData
from phi3v.errors import ConfigError
from phi3v.fingerprints import name_rows
from phi3v.run_folder import gather_versions
from phi3v.training.checkpoints import read_manifest

_REFUSED = {"rows": "the training rows", "base": "the weights of the base model"}
_log = logging.getLogger(__name__)


def conditions_of(data: LoadedData | StreamedData, base: str, device: torch.device, dtype: torch.dtype) -> dict:
    """What a checkpoint keeps, by name.

    Args:
        data: the run's rows; those of a stream are not known.
        base: what `name_weights` gave for the model as it was loaded.
        device: what trains.
        dtype: what it computes in.
    Example: {"rows": "9f2c...", "base": "77ab...", "device": "cpu", "dtype": "float32", "torch": "2.13.0+cpu", ...}.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "rows": name_rows(data.train, getattr(data, "lengths", [])) if isinstance(data, LoadedData) else None,
        "base": base,
        "device": where,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: version for name, version in gather_versions().items() if name != "platform"},
    }


def facts_of(checkpoint: Path | None, now: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """What manifests of a run say besides their files, under today's conditions.

    Args:
        checkpoint: which the run goes on from; None at its start.
        now: what `conditions_of` gave.
        ranks: processes that share each step.
    Raises: ConfigError where the run cannot go on from it.
    """
    then = read_manifest(checkpoint) if checkpoint else {}
    now = {**now, "ranks": ranks}
    if checkpoint:
        compare(then.get("conditions", {}), now, checkpoint.name)
    return {"conditions": now, "halvings": then.get("halvings", 0)}


def compare(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Compares the conditions of a checkpoint with those of today; what differs is one warning.

    Raises: ConfigError for other rows or another base.
    """
    changed = [name for name in now if name in then and then[name] != now[name]]
    for name in changed:
        if name in _REFUSED:
            raise ConfigError(
                f"{_REFUSED[name]} are not those that {where} was trained with: put them back to go on with this run, "
                "or give another output to begin a new one"
            )
    if changed:
        told = ", ".join(f"{name} {now[name]} ({then[name]} until then)" for name in changed)
        _log.warning(
            "going on from %s with %s: the run will not end bit for bit as one without the change", where, told
        )
