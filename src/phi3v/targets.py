"""What a TARGET names: a run, an adapter, a model folder or a hub id, decided by small files alone.

In comes the text that a user typed; out goes a `Target` with the places of the base weights, of the adapter and of the
processor. What it is follows from which files are there; where the base is follows from adapter_config.json, or from
the run's recipe where the adapter names its base by a relative path. Also here: the run that a target is or lies in,
and the checks of a local checkpoint that need no tensor (its type, its shards, their lengths), so that a wrong folder
is refused in milliseconds and in one line. Knows nothing about torch, transformers or peft.
"""

import json
import re
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi3v.digests import DIGESTS, files_damage
from phi3v.errors import CheckpointError, ConfigError
from phi3v.run_folder import RunFolder
from phi3v.whole_files import is_unfinished

MODEL_TYPE = "phi3_v"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
ONNX_ABOUT = "phi3v_onnx.json"
"""In a folder of ONNX graphs that `phi3v export` wrote: what they are."""
EXPORT_ABOUT = "phi3v.json"
"""In an exported folder: what the run had that has no place in the others' files."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""OWNER/NAME: names of one part, which the hub has from its first days, are no Phi-3-Vision."""


@dataclass(frozen=True)
class Target:
    """The places behind a TARGET.

    Example: the run `runs/shop`, tuned with LoRA on a hub model, is
    `Target("runs/shop", "run", base="microsoft/Phi-3-vision-128k-instruct", revision=None,
    adapter=Path("runs/shop/adapter"), processor="runs/shop/adapter")`.

    Attributes:
        name: what the user typed.
        kind: how it was understood.
        base: folder or hub id of the whole model's weights; for a fully tuned run its `model` folder.
        revision: revision of a base on the hub, None for its newest.
        adapter: folder of the adapter, None when there is none.
        processor: folder or hub id that the processor is loaded from.
    """

    name: str
    kind: Literal["run", "adapter", "model", "hub"]
    base: str
    revision: str | None
    adapter: Path | None
    processor: str


def resolve_target(target: str | Path, *, revision: str | None = None, instead: str | None = None) -> Target:
    """Finds out what `target` is; `instead` is an adapter's base where its own is a folder of another machine.

    Raises:
        CheckpointError: nothing is there, a run has no tuned weights yet, or an adapter does not name its base.
    """
    name, path = str(target), Path(target)
    if is_unfinished(path.absolute()):
        raise CheckpointError(f"{name} was never completed, whatever wrote it was killed: remove it, and make it again")
    if RunFolder.is_run(path):
        return _resolve_run(name, path, instead)
    if (path / ADAPTER_CONFIG).is_file():
        return _resolve_adapter(name, path, "adapter", instead)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "recipe.yaml").is_file():
                raise CheckpointError(
                    f"{name} holds recipe.yaml and no versions.json, and a run has both: bring versions.json back, or "
                    "name the folder adapter or model in it"
                )
            raise CheckpointError(
                f"{name} is neither a run (recipe.yaml), an adapter ({ADAPTER_CONFIG}) nor a model (config.json): "
                "name a folder that holds one of these files, or a hub id"
            )
        return Target(name, "model", name, None, None, name)
    if _is_missing(name, path):
        raise CheckpointError(
            f"{name} does not exist (looked in {Path.cwd()}): name a run, an adapter, a model, or a hub id (OWNER/NAME)"
        )
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name} is no folder: name a run, an adapter, a model folder or a hub id (OWNER/NAME)")
    return Target(name, "hub", name, revision, None, name)


def _is_missing(name: str, path: Path) -> bool:
    """Whether a name that no file has can only be a path: runs/nope, ./nope, /nope, a/b/nope, or one beside runs."""
    if path.exists():
        return False
    if not _HUB_ID.fullmatch(name) or path.parts[0] == "runs":
        return True
    return path.parent != Path() and any(RunFolder.is_run(beside) for beside in path.parent.glob("*"))


def _resolve_run(name: str, path: Path, instead: str | None) -> Target:
    """Chooses between the adapter and the fully tuned model of a run."""
    run = RunFolder(path)
    if (run.adapter / ADAPTER_CONFIG).is_file():
        return _resolve_adapter(name, run.adapter, "run", instead)
    if (run.model / "config.json").is_file():
        return Target(name, "run", str(run.model), None, None, str(run.model))
    raise CheckpointError(f"run {name} holds no tuned weights yet: finish it with `phi3v train {name}/recipe.yaml`")


def _resolve_adapter(name: str, folder: Path, kind: Literal["run", "adapter"], instead: str | None = None) -> Target:
    """Follows an adapter to its base; the processor is the adapter's own where it has one."""
    config = read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name its base: set base_model_name_or_path")
    if not Path(base).is_absolute() and RunFolder.is_run(folder.parent):
        recipe = RunFolder(folder.parent).read_recipe()  # its places are absolute, where the adapter's base may not be
        base = recipe.model.name if Path(recipe.model.name).is_absolute() else base
    if not Path(base).is_dir() and not _HUB_ID.fullmatch(base):
        base = instead or base
    if not Path(base).is_dir() and not _HUB_ID.fullmatch(base):
        raise CheckpointError(
            f"adapter {folder} was tuned on {base}, which is not here: bring that folder back, "
            f"or set base_model_name_or_path in {folder / ADAPTER_CONFIG}"
            + (f" and remove {DIGESTS} beside it" if (folder / DIGESTS).is_file() else "")
        )
    has_processor = (folder / "tokenizer_config.json").is_file()
    return Target(name, kind, base, config.get("revision"), folder, str(folder) if has_processor else base)


def weights_fault(run: RunFolder) -> str | None:
    """What is wrong with a run's tuned weights, None for whole ones: by the headers of their files, and by the digests
    beside them."""
    try:
        if (run.adapter / ADAPTER_CONFIG).is_file():
            read_json(run.adapter / ADAPTER_CONFIG)
            tensor_shapes(run.adapter / ADAPTER_WEIGHTS)
            damage = files_damage(run.adapter)
        else:
            check_model_folder(run.model)
            damage = files_damage(run.model)
    except CheckpointError as error:
        return str(error)
    return None if damage is None else f"{damage}: copy it again"


def refuse_damaged(folder: Path) -> None:
    """Refuses an adapter, a model or ONNX graphs that are not what was written, where digests lie beside them.

    Each file is read through, as loading does behind this. Raises: CheckpointError with the file and the way out.
    """
    if (damage := files_damage(folder)) is not None:
        changed = f"; if you changed it yourself, remove {DIGESTS} beside it" if (folder / DIGESTS).is_file() else ""
        raise CheckpointError(f"{damage}: {_way_out(folder)}{changed}")


def _way_out(folder: Path) -> str:
    """What puts damaged files right.

    Example: of runs/shop/adapter "`phi3v train runs/shop/recipe.yaml` writes it again from the newest good checkpoint".
    """
    run = RunFolder(folder.parent)
    if (folder / "manifest.json").is_file():
        return "copy it again, or name another checkpoint"
    if folder.name not in (run.adapter.name, run.model.name) or not RunFolder.is_run(run.path):
        return "copy it again, or export it again" if (folder / "README.md").is_file() else "copy it again"
    if not any(run.checkpoints.glob("checkpoint-*")):
        return f"copy it again, or remove {run.path} and train again"
    again = f"`phi3v train {shlex.quote(str(run.recipe))}`"
    return f"{again} writes it again from the newest good checkpoint"


def check_whole_model(name: str) -> None:
    """Raises: ConfigError where `model.name` of a recipe is a run or an adapter; the line says how to go on from it."""
    if not Path(name).is_dir() or (place := resolve_target(name)).kind == "model":
        return
    if place.adapter is None:
        raise ConfigError(f"model.name {name} is a run that tuned the whole model: set model.name={place.base}")
    raise ConfigError(
        f"model.name {name} is {'a run under LoRA' if place.kind == 'run' else 'an adapter'} and no whole model: to go "
        f"on from it set model.name={place.base} model.adapter={name}"
    )


def run_of(target: str | Path) -> RunFolder | None:
    """The run that a target is or lies in; None for others.

    Example: of runs/shop, runs/shop/adapter and runs/shop/checkpoints/checkpoint-40 it is runs/shop.
    """
    path = Path(target)
    if not path.exists():
        return None  # a hub id
    above = path.absolute().parent
    places = (path, above, above.parent) if above.name == "checkpoints" else (path, above)
    return next((RunFolder(folder) for folder in places if RunFolder.is_run(folder)), None)


def holds_graphs(target: str | Path) -> bool:
    """Whether a target is a folder of ONNX graphs that `phi3v export` wrote."""
    return (Path(target) / ONNX_ABOUT).is_file()


def graphs_of(target: str | Path) -> Path:
    """The folder of ONNX graphs that a target is; of a run or an adapter in it, the run's folder `onnx`.

    Raises:
        CheckpointError: there is none, or the run was trained on since; the line says how to export.
    """
    if holds_graphs(target):
        return Path(target)
    run = run_of(target)
    folder = Path("FOLDER") if run is None else run.path / "onnx"
    export = f"phi3v export {target} --to onnx --out {folder}"
    if run is None or not holds_graphs(folder):
        resolve_target(target)
        raise CheckpointError(f"{target} holds no ONNX graphs: make them (`{export}`) and ask {folder}")
    tuned = (run.adapter / ADAPTER_WEIGHTS, run.model / MODEL_WEIGHTS, run.model / MODEL_INDEX)
    written = max((path.stat().st_mtime for path in tuned if path.is_file()), default=0.0)
    if written > (folder / ONNX_ABOUT).stat().st_mtime:
        raise CheckpointError(
            f"{folder} is older than the weights of {run.path}: remove it and export again (`{export}`), or ask "
            f"{folder} itself for what it was"
        )
    return folder


def system_template(target: str | Path) -> str | None:
    """The template of the system turn that a target was tuned with: of a run, or of a folder exported from one.

    Example: "You are a shop." of a run whose recipe says `data.system: You are a shop.`; None where nothing says so.
    """
    if (run := run_of(target)) is not None:
        return run.read_recipe().data.system
    about = Path(target) / EXPORT_ABOUT
    system = read_json(about).get("system") if about.is_file() else None
    return system if isinstance(system, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; CheckpointError in one line when the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; restore the file") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where a JSON object belongs: restore the file")
    return content


def check_model_type(config: dict[str, Any], where: str) -> None:
    """Refuses a configuration of another model type, in one line."""
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise CheckpointError(
            f"{where} is of model type {found!r}, phi3v loads {MODEL_TYPE!r}: "
            "use microsoft/Phi-3-vision-128k-instruct, microsoft/Phi-3.5-vision-instruct or a model made from them"
        )


def check_model_folder(folder: Path) -> None:
    """Checks a local model folder without reading a tensor: its type, and that every shard is there and whole.

    Raises:
        CheckpointError: in one line that names the file and what is wrong with it.
    """
    check_model_type(read_json(folder / "config.json"), str(folder))
    index = folder / MODEL_INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map: restore the file")
        for name, place in weight_map.items():
            if not isinstance(place, str):
                raise CheckpointError(f"{index} places {name} in {place!r}, which is no file: restore the file")
        for shard in sorted(set(weight_map.values())):
            stored = set(tensor_shapes(folder / shard))
            for name, place in weight_map.items():
                if place == shard and name not in stored:
                    raise CheckpointError(
                        f"{folder / shard} lacks {name}, which {index.name} places there: copy it again"
                    )
    elif (folder / MODEL_WEIGHTS).is_file():
        tensor_shapes(folder / MODEL_WEIGHTS)
    elif holds_graphs(folder):
        raise CheckpointError(f"{folder} holds ONNX graphs and no weights: only `phi3v ask` answers from them")
    else:
        raise CheckpointError(f"{folder} has neither {MODEL_INDEX} nor {MODEL_WEIGHTS}: copy the weights into it")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, read from its header; the file's length is checked on the way.

    Example: a file with one 2x3 matrix gives `{"lm_head.weight": (2, 3)}`.

    Raises:
        CheckpointError: the file is missing, cut short or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = dict(json.loads(file.read(length))) if length <= size - 8 else None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; copy it there again, or train again"
        ) from error
    except (struct.error, ValueError, TypeError):
        header = None
    entries = {name: entry for name, entry in (header or {}).items() if name != "__metadata__"}
    if header is None or not all(map(_is_tensor, entries.values())):
        raise CheckpointError(f"{path} is not a whole safetensors file ({size:,} bytes): copy it again")
    expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != expected:
        raise CheckpointError(f"{path} has {size:,} bytes where its header says {expected:,}: copy it again")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _is_tensor(entry: Any) -> bool:
    """Whether an entry of a safetensors header says where a tensor lies and how large it is.

    Example: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} -> True; 5 -> False.
    """
    if not isinstance(entry, dict):
        return False
    shape, offsets = (entry.get(name) for name in ("shape", "data_offsets"))
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(isinstance(number, int) for number in [*shape, *offsets])
