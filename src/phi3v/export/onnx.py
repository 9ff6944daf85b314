"""ONNX graphs of a target, for onnxruntime-genai.

In comes a resolved target and an empty folder, out go its files; the frame (`export.run`) puts the folder in place,
writes digests and the model card, and says what is refused.
"""

from pathlib import Path
from typing import Any, Literal

from phi3v.errors import ConfigError
from phi3v.targets import Target


def export_onnx(place: Target, folder: Path, *, precision: Literal["fp32", "fp16", "int4"] = "fp32") -> dict[str, Any]:
    """Fills `folder`, and hands back facts for card and screen, {"precision": "int4", ...}."""
    raise ConfigError("--to onnx is not built yet")
