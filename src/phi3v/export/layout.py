"""A whole model in Microsoft's layout: its names and its flat config, with all that processors need.

In comes a target and an empty folder, out go safetensors in shards, config.json, generation_config.json and the
processor's files, as readers of Microsoft's checkpoints expect them: vLLM, onnxruntime-genai's tools, Microsoft's code
and this package. At no time is more in memory than one shard. config.json is held back: without it nothing loads.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from phi3v.errors import CheckpointError
from phi3v.export.folder import check_space
from phi3v.export.merge import Merger, merged_weights, module_of
from phi3v.loading import load_config, load_processor
from phi3v.meta_base import meta_base
from phi3v.passthrough import connection_fault, first_line
from phi3v.targets import MODEL_INDEX, MODEL_WEIGHTS, Target, check_model_folder, read_json, refuse_damaged
from phi3v.weight_files import find_file, weight_files
from phi3v.whole_files import held_back

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Number types by their names in safetensors."""
_CLASS = "Phi3VForCausalLM"


def write_merged(
    place: Target,
    folder: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int,
    images: Mapping[str, Any] | None = None,
    code: str | None = None,
    again: float = 0.0,
) -> dict[str, Any]:
    """Fills `folder`, its config.json `held_back`.

    Args:
        place: a run, an adapter, a model folder or a hub id.
        folder: an empty folder.
        dtype: "bfloat16", "float32" or "float16"; None for that of the base, weight by weight.
        shard_bytes: bytes of a file at most; a weight that is larger has a file to itself.
        images: options of `loading.load_processor`, by which a run sees images.
        code: hub id of Microsoft's repository, whose code config.json names for readers that ask for remote code.
        again: what will be written beside the weights later, as a share of their bytes, for which there is to be room.
    Returns: {"dtype": "bfloat16", "weights": 4146621440, "files": 5} for instance.
    """
    config = load_config(place.base, revision=place.revision)
    base = _Base(place, config)
    wanted = {name: getattr(torch, dtype) if dtype else own for name, own in base.dtypes.items()}
    merger = Merger(base.model, place) if place.adapter else None
    if merger and (shared := base.tied & {*merger.of_module}):
        raise CheckpointError(
            f"the adapter changes {min(shared)} of {place.base}, whose head and embedding are one matrix "
            "(tie_word_embeddings): merged, it would change both; use --to adapter"
        )
    sizes = {name: base.counts[name] * wanted[name].itemsize for name in base.names}
    check_space(folder, round(sum(sizes.values()) * (1 + again)))
    shards = plan_shards(sizes, shard_bytes)
    _write_shards(folder, shards, wanted, merged_weights(base.names, base.files, merger))
    processor = load_processor(place.name, revision=place.revision, **(images or {}))
    write_processor(processor, folder, code, find_file(place.base, "preprocessor_config.json", place.revision))
    write_generation(processor, config, folder, find_file(place.base, "generation_config.json", place.revision))
    most = max(set(wanted.values()), key=lambda one: sum(base.counts[name] for name in wanted if wanted[name] is one))
    facts = {"dtype": str(most).removeprefix("torch."), "weights": sum(base.counts.values()), "files": len(shards)}
    config.architectures, config.dtype = [_CLASS], most
    write_config(config, folder)
    _name_code(held_back(folder / "config.json"), find_file(place.base, "config.json", place.revision), code)
    return facts


class _Base:
    """The weights of a base as they lie in its files, checked against its config.

    Attributes:
        names: of all weights, in the model's order.
        files, dtypes, counts: of each of them where it lies, its number type, how many numbers it holds.
        model: the same on the meta device.
        tied: modules that share one matrix in this model, {"lm_head", "model.embed_tokens"}; else none.
    """

    def __init__(self, place: Target, config: Any) -> None:
        if getattr(config, "quantization_config", None):
            raise CheckpointError(f"{place.base} holds quantised weights: merge into the base that they were made from")
        if Path(place.base).is_dir():
            check_model_folder(Path(place.base))
            refuse_damaged(Path(place.base))
        self.model = meta_base(config, dtype=torch.float32)
        ignored = [re.compile(pattern) for pattern in type(self.model)._keys_to_ignore_on_load_unexpected]
        try:
            found = weight_files(place.base, place.revision)
        except OSError as error:
            reason = connection_fault(error) or first_line(error)
            raise CheckpointError(
                f"the weights of {place.base} could not be read ({reason}): check the network"
            ) from error
        self.files = {name: path for name, path in found.items() if not any(one.search(name) for one in ignored)}
        tied = dict(self.model._tied_weights_keys) if config.tie_word_embeddings else {}
        self.tied = {module_of(name) for pair in tied.items() for name in pair}
        state = self.model.state_dict()
        self.names = [name for name in state if name in self.files or name not in tied]
        if wrong := {*self.names} ^ {*self.files}:
            side = "missing" if min(wrong) in state else "surplus"
            raise CheckpointError(f"the weights in {place.base} do not fit its config.json: {min(wrong)} is {side}")
        self.dtypes: dict[str, torch.dtype] = {}
        for path in sorted({*self.files.values()}):
            with safe_open(path, framework="pt") as file:
                for name in (name for name in self.names if self.files[name] == path):
                    stored = file.get_slice(name)
                    self._check(place, name, stored.get_dtype(), tuple(stored.get_shape()), tuple(state[name].shape))
        self.counts = {name: state[name].numel() for name in self.names}

    def _check(self, place: Target, name: str, kind: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Notes the number type of a weight."""
        if kind not in _FLOATS:
            raise CheckpointError(f"{name} of {place.base} is stored as {kind}, which is none of {', '.join(_FLOATS)}")
        if shape != wanted:
            raise CheckpointError(f"{name} of {place.base} is {shape} and its config.json says {wanted}")
        self.dtypes[name] = _FLOATS[kind]


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Which weights share a file: as many as fit, in their order.

    Example: {"a": 3, "b": 2, "c": 4, "d": 9} and 5 -> [["a", "b"], ["c"], ["d"]].
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shards(folder: Path, shards: list[list[str]], dtypes: Mapping[str, torch.dtype], weights: Any) -> None:
    """Writes weights, which come in the order of the shards, and the index where there are several."""
    place: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = MODEL_WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        held = {}
        for wanted in names:
            name, weight = next(weights)
            assert name == wanted, (name, wanted)
            held[name] = _cast(name, weight, dtypes[name])
            total += held[name].nbytes
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        save_file(held, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)  # as any new file here: safetensors lets nobody else read its own
        place |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in a number type. Raises: CheckpointError where it holds what that type cannot."""
    if weight.dtype == dtype:
        return weight.contiguous()
    cast = weight.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise CheckpointError(
            f"{name} holds numbers that {str(dtype).removeprefix('torch.')} cannot: use --dtype bfloat16 or float32"
        )
    return cast


def write_processor(processor: Any, folder: Path, code: str | None, published: Path | None) -> None:
    """Writes tokenizer, chat template and what becomes of images, in the files that all readers look for.

    transformers 5 puts everything into processor_config.json, which transformers 4 hands on to Microsoft's class, and
    that takes none of it: all of it is in preprocessor_config.json, and the other file only names the class.
    """
    processor.save_pretrained(folder)
    named = json.dumps({"processor_class": type(processor).__name__}, indent=2)
    (folder / "processor_config.json").write_text(named + "\n", encoding="utf-8")
    images = folder / "preprocessor_config.json"
    values = {**read_json(images), "processor_class": type(processor).__name__}
    images.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n", encoding="utf-8")
    _name_code(images, published, code)


def write_generation(processor: Any, config: Any, folder: Path, published: Path | None) -> None:
    """Writes the base's settings, and where answers end: with `<|end|>`, where the published ones name `</s>`."""
    settings = GenerationConfig.from_model_config(config)
    if published is not None:
        settings.update(**{key: value for key, value in read_json(published).items() if not key.startswith("_")})
    settings._from_model_config = False
    settings.eos_token_id = list(processor.stop_token_ids)
    settings.pad_token_id = processor.tokenizer.pad_token_id
    settings.save_pretrained(folder)


def write_config(config: Any, folder: Path) -> None:
    """Writes config.json as `save_pretrained` does, under the name that it has until the folder is in place."""
    config.to_json_file(held_back(folder / "config.json"), use_diff=True)


def _name_code(file: Path, published: Path | None, code: str | None) -> None:
    """Names Microsoft's classes, in Microsoft's repository, where the published file names them.

    Example: "configuration_phi3_v.Phi3VConfig" and microsoft/Phi-3.5-vision-instruct ->
    "microsoft/Phi-3.5-vision-instruct--configuration_phi3_v.Phi3VConfig".
    """
    named = read_json(published).get("auto_map") if code and published else None
    if not isinstance(named, dict):
        return
    full = {auto: value if "--" in value else f"{code}--{value}" for auto, value in named.items()}
    values = dict(sorted({**read_json(file), "auto_map": full}.items()))
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
