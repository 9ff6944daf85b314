"""What a run was trained under so far: its rows and photos, its base, and what it ran on.

In come rows and a model, out come short names for them that a checkpoint keeps; a run that goes on compares them. Other
rows, photos or another base are refused: steps done would no longer be steps of this run. Other versions and devices
compute a little differently and are listed. The recipe itself is compared in `run_folder`.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from phi3v.checkpoint_files import PROCESSOR_FILES
from phi3v.data.schema import ImagePart, Row
from phi3v.data.sources import LoadedData, StreamedData
from phi3v.errors import ConfigError
from phi3v.recipe import ModelSection
from phi3v.run_folder import gather_versions
from phi3v.targets import read_json
from phi3v.training.checkpoints import read_manifest
from phi3v.weight_files import find_file

_BASE_FILES = ("config.json", *PROCESSOR_FILES)
_REFUSED = {
    "rows": "the training rows",
    "photos": "the photos of the training rows",
    "held_out": "the validation rows or their photos",
    "base": "the weights of the base model",
    **{file: f"the values in {file} of the base model" for file in _BASE_FILES},
}
_NOTES = ("_name_or_path", "auto_map", "transformers_version")
"""Values of such files that change nothing."""
_log = logging.getLogger(__name__)


def conditions_of(
    data: LoadedData | StreamedData, model: ModelSection, base: str, device: torch.device, dtype: torch.dtype
) -> dict:
    """What a checkpoint keeps, by name.

    Args:
        data: the run's rows; training rows of a stream are not known.
        model: whose name and revision, for the small files of the base.
        base: what `name_weights` gave for the model as it was loaded.
        device: what trains.
        dtype: what it computes in.
    Example: {"config.json": "1c9b...", ..., "base": "77ab...", "rows": "9f2c...", "photos": "08d1...",
    "held_out": "5e00...", "device": "cpu", "dtype": "float32", "torch": "2.13.0+cpu", ...}.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows, photos = None, None
    if isinstance(data, LoadedData):
        rows, photos = name_rows(data.train, getattr(data, "lengths", []))
    return {
        **name_files(model.name, model.revision),  # first, as rows have other lengths under other values
        "base": base,
        "rows": rows,
        "photos": photos,
        "held_out": "".join(name_rows(data.validation or [], [])),
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

    Raises: ConfigError for other rows, photos or another base.
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


def name_rows(rows: Iterable[Row], lengths: Sequence[int]) -> tuple[str, str]:
    """Two names for rows in their order: one for their texts, the names and addresses of their images and their lengths
    in tokens, one for what the first look saw of the photos' files. None of these is read again.
    """
    digest, photos = hashlib.sha256(repr(list(lengths)).encode()), hashlib.sha256()
    for row in rows:
        digest.update(repr(_facts(row)).encode("utf-8", "backslashreplace"))
        photos.update(repr([one.fingerprint for one in row.images]).encode())
    return digest.hexdigest()[:32], photos.hexdigest()[:32]


def _facts(row: Row) -> tuple:
    """What a sample is made of, where it lies aside: a set may be moved."""
    turns = tuple(
        (turn.role, tuple(part.index if isinstance(part, ImagePart) else part.text for part in turn.parts))
        for turn in row.messages
    )
    images = tuple(
        (str(one.path).rpartition("/")[2], one.url, hashlib.sha256(one.data).hexdigest() if one.data else None)
        for one in row.images
    )
    return turns, images


def name_files(base: str, revision: str | None) -> dict[str, str | None]:
    """Names for what stands in a base's small files, however it is written there: {"config.json": "1c9b...", ...}."""
    places = {file: find_file(base, file, revision) for file in _BASE_FILES}
    return {file: None if place is None else _name_values(read_json(place)) for file, place in places.items()}


def _name_values(values: dict[str, Any]) -> str:
    """A name for the values of a file, notes aside."""
    told = {key: value for key, value in values.items() if key not in _NOTES}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def name_weights(model: torch.nn.Module) -> str:
    """A name for a model's weights: a sum over the bits of each tensor, which any changed value changes.

    Two passes of additions on the device where they are, milliseconds on a GPU; digests of files would read them again.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        bits = weight.detach().contiguous().view(-1).view(torch.uint8)
        whole = bits.numel() // 4 * 4
        words = bits[:whole].view(torch.int32)
        sums = [part.sum(dtype=torch.int64) for part in (words, words[::2], bits[whole:])]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {torch.stack(sums).tolist()}".encode())
    return digest.hexdigest()[:32]
