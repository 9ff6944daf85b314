"""What a server calls a TARGET, the base below it and further adapters; decided by small files, before anything loads.

In come a resolved TARGET and names with places; out come names with resolved targets. Knows no torch and no requests.
"""

from collections.abc import Mapping
from pathlib import Path

from phi3v.errors import ConfigError
from phi3v.targets import Target, resolve_target


def named_targets(place: Target, adapters: Mapping[str, str]) -> dict[str, Target]:
    """Names and places: the TARGET, the base below its adapter, the other adapters. Raises: ConfigError."""
    wanted = {model_name(place.name): place}
    if place.adapter is not None:
        base = Target(place.base, "model", place.base, place.revision, None, place.processor)
        if model_name(place.base) in wanted:
            wanted["base"] = base
        else:
            wanted[model_name(place.base)] = base
    for name, where in adapters.items():
        found = resolve_target(where)
        if name in wanted:
            raise ConfigError(f"--adapter {name}: that name is taken, choose another one")
        if found.adapter is None:
            raise ConfigError(f"--adapter {name}: {where} is no adapter: name a run that was tuned with one, or one")
        if not _same(found.base, place.base):
            raise ConfigError(
                f"--adapter {name}: {where} was tuned on {found.base}, and {place.base} is served: start another server"
            )
        wanted[name] = found
    return wanted


def model_name(place: str) -> str:
    """What clients call a TARGET: a hub id as it is, of a path the last part: "/data/runs/shop/" -> "shop"."""
    return Path(place).resolve().name if Path(place).exists() else place


def _same(one: str, other: str) -> bool:
    """Whether two bases are one: folders by where they lie, hub ids by their text."""
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))
