"""Which values of a recipe are places on this machine, and how they read from anywhere: as absolute paths."""

import os
from collections.abc import Callable
from glob import glob
from typing import Any

PLACES = (
    ("model", "name"),
    ("model", "adapter"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "image_root"),
    ("data", "image_cache"),
    ("vision", "cache_folder"),
    ("evaluation", "keep"),
)
"""Section and key."""
_PLACE_KEYS = {*(key for _, key in PLACES), "source"}


def is_there(place: str) -> bool:
    """Whether a file, a folder, or a file of a pattern such as shards/*.tar is here."""
    return os.path.exists(place) or (place.endswith(".tar") and bool(glob(place, recursive=True)))


def map_places(key: str, value: Any, here: Callable[[str], bool]) -> Any:
    """A place as an absolute path when it is here, in every set of a list.

    Example, in /home/me: "rows.csv" -> "/home/me/rows.csv"; [{"source": "rows.csv", "weight": 2.0}] ->
    [{"source": "/home/me/rows.csv", "weight": 2.0}].
    """
    if isinstance(value, list):
        return [{name: map_places(name, inner, here) for name, inner in one.items()} for one in value]
    if key not in _PLACE_KEYS or not isinstance(value, str) or not here(value):
        return value
    return os.path.abspath(value)


def meant(key: str, values: dict[str, Any]) -> Any:
    """The value to compare of a dotted key: places as absolute paths, "nothing" where there is no value."""
    value = values.get(key, "nothing")
    return map_places(key.rpartition(".")[2], value, lambda place: True) if tuple(key.split(".")) in PLACES else value
