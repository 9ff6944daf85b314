"""JSON text of what a program holds: paths, scalars of torch and numpy, numbers that are none, half characters."""

import json
import math
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of plain values, paths and scalars of torch and numpy; NaN and infinities become null.

    What UTF-8 cannot hold, half a character, stands as JSON's own escape: "\\ud83d".
    Example: to_json({"loss": float("nan"), "steps": (1, 2)}) -> '{"loss": null, "steps": [1, 2]}'.
    Raises: TypeError for anything else.
    """
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    """`value` made of dict, list, str, int, float, bool and None only."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    raise TypeError(f"a run's JSON cannot hold a {type(value).__name__}: {value!r:.80}")
