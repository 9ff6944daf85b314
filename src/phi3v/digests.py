"""SHA-256 of files: of an export, of a run's weights, of a checkpoint; and whether files are still what was written.

In come folders, out come digests, and half a line about the first file that is another. `digests.json` lies in a folder
that was finished, a checkpoint has its `manifest.json` instead. Knows nothing about formats, runs or exports.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3v.whole_files import own_name

DIGESTS = "digests.json"
"""SHA-256 of each other file of a folder, by its name: {"sha256": {"config.json": "9f2c...", ...}}."""
_MANIFEST = "manifest.json"
_WEIGHTS = ("adapter_", "model", "config.json")
"""How names of a checkpoint's files begin that are its weights, or say what they are."""
_OF_THE_HUB = (".git", ".gitattributes", ".cache")


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, by its path in the folder; what the hub's own tools add to a copy is passed over."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = own_name(file.relative_to(folder).as_posix())
        if file.is_file() and name != DIGESTS and name.partition("/")[0] not in _OF_THE_HUB:
            found[name] = file_digest(file)
    return found


def write_digests(folder: Path) -> None:
    """Writes digests.json."""
    content = json.dumps({"sha256": folder_digests(folder)}, indent=2) + "\n"
    (folder / DIGESTS).write_text(content, encoding="utf-8")


def with_digests(save: Callable[[Path], Any]) -> Callable[[Path], None]:
    """What fills a folder through `save`, and then writes its digests."""

    def fill(folder: Path) -> None:
        save(folder)
        write_digests(folder)

    return fill


def files_damage(folder: Path) -> str | None:
    """What is wrong with the files of an adapter, a model or ONNX graphs by the digests beside them, as half a line;
    None where none are there.

    A file that was put there later, and a text for people (README.md), may be as they like. Of a checkpoint it is the
    files of its weights: what else it holds is its trainer's business.
    Example: "runs/shop/adapter/adapter_model.safetensors is damaged (its SHA-256 is not the one in digests.json)".
    """
    try:
        noted, file = _noted(folder)
    except (OSError, ValueError):
        return f"{folder / DIGESTS} is damaged"
    for name, digest in noted.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{path} is missing ({file} names it)"
            if file_digest(path) != digest:
                return f"{path} is damaged (its SHA-256 is not the one in {file})"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
    return None


def _noted(folder: Path) -> tuple[dict[str, str], str]:
    """The digests that matter to who loads a folder, and the file that they are from; ({}, "") where there are none."""
    if (folder / DIGESTS).is_file():
        content = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        noted = content.get("sha256") if isinstance(content, dict) else None
        if not isinstance(noted, dict):
            raise ValueError("no mapping sha256")
        return {name: str(digest) for name, digest in noted.items() if not name.endswith(".md")}, DIGESTS
    if not (folder / _MANIFEST).is_file():
        return {}, ""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["manifest"]["files"]
        return {name: files[name]["sha256"] for name in files if name.startswith(_WEIGHTS)}, _MANIFEST
    except (ValueError, KeyError, TypeError):
        return {}, ""  # another program's manifest.json, or a broken one, which matters to going on alone
