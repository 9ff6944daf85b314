"""One export from start to end: what is refused, the folder put in place whole, its digests, its card, the hub.

In comes a TARGET and a format, out comes a folder that is there whole or not at all. What is in it is the business of
the format's own module, which fills a folder that nobody sees yet and says what it put there: `merge`, `adapter`,
`onnx`. Knows nothing about the command line.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3v.errors import ConfigError
from phi3v.targets import Target, resolve_target
from phi3v.whole_files import replace_folder

Format = Literal["merged", "adapter", "onnx"]


@dataclass(frozen=True)
class Exported:
    """What an export put where.

    Attributes:
        target: what was exported, as it was typed.
        to: the format.
        out: the folder.
        bytes: all its files together.
        facts: what the format says of itself: dtype, number of files, precision, ...
    """

    target: str
    to: Format
    out: Path
    bytes: int
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "out": str(self.out)}


def export(
    target: str | Path,
    out: Path,
    *,
    to: Format,
    precision: Literal["fp32", "fp16", "int4"] = "fp32",
) -> Exported:
    """Writes a target in one of the formats into `out`, a folder that is new or empty.

    Raises: ConfigError for a folder that holds something; CheckpointError for a target that is not there or not whole.
    """
    place = resolve_target(target)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there and not empty: name a folder that is new or empty")
    facts: dict[str, Any] = {}
    replace_folder(out, lambda folder: facts.update(_writer(to, precision)(place, folder)))
    return Exported(str(target), to, out, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()), facts)


def _writer(to: Format, precision: Literal["fp32", "fp16", "int4"]) -> Callable[[Target, Path], dict[str, Any]]:
    """What fills the folder: it gets the target and an empty folder, and hands back facts for card and screen."""
    if to == "onnx":
        from phi3v.export.onnx import export_onnx

        return lambda place, folder: export_onnx(place, folder, precision=precision)
    raise ConfigError(f"--to {to} is not built yet")
