"""An adapter as PEFT's users take it: its tensors as they are, a configuration that older versions read, the processor.

In comes a target with an adapter and an empty folder. The modules here have Microsoft's own paths, so the names in the
file are those that transformers 4 with Microsoft's code has as well, and nothing is renamed; a path of this machine as
the name of the base is, where the base's hub id is known.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open

from phi3v.adapters import check_adapter, check_fit, load_adapter
from phi3v.errors import ConfigError
from phi3v.export.folder import check_space
from phi3v.export.layout import write_processor
from phi3v.export.merge import check_finite
from phi3v.loading import load_config, load_processor
from phi3v.meta_base import meta_base
from phi3v.targets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Target, read_json, tensor_shapes
from phi3v.whole_files import held_back

_ALWAYS = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "target_modules", "bias"}
_ALWAYS |= {"r", "lora_alpha", "lora_dropout", "modules_to_save", "fan_in_fan_out", "init_lora_weights"}
"""Fields that every version of PEFT has and some readers ask for."""


def write_adapter(
    place: Target, folder: Path, *, base: str | None = None, images: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fills `folder`, its adapter_config.json `held_back`.

    Args:
        place: a run or an adapter.
        folder: an empty folder.
        base: hub id of the base, for its configuration; None keeps the name that is there.
        images: options of `loading.load_processor`, by which a run sees images.
    Returns: {"kind": "LORA", "tensors": 256, "base": "microsoft/Phi-3.5-vision-instruct"} for instance.
    """
    if place.adapter is None:
        raise ConfigError(f"{place.name} holds a whole model and no adapter: use --to merged")
    check_adapter(place.adapter)
    stored = tensor_shapes(place.adapter / ADAPTER_WEIGHTS)
    config = load_config(place.base, revision=place.revision)
    check_fit(load_adapter(meta_base(config, dtype=torch.float32), place, on_meta=True), place, stored)
    with safe_open(place.adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        for name in stored:
            check_finite(name, file.get_tensor(name), place.adapter / ADAPTER_WEIGHTS)
    check_space(folder, (place.adapter / ADAPTER_WEIGHTS).stat().st_size)
    shutil.copyfile(place.adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    values = plain_config(read_json(place.adapter / ADAPTER_CONFIG), base or place.base)
    processor = load_processor(place.name, revision=place.revision, **(images or {}))
    write_processor(processor, folder, None, None)
    held_back(folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return {"kind": values["peft_type"], "tensors": len(stored), "base": values["base_model_name_or_path"]}


def plain_config(values: Mapping[str, Any], base: str) -> dict[str, Any]:
    """An adapter's configuration without the fields that say nothing: PEFT before 0.14 fails at those it does not know.

    Example: {"peft_type": "LORA", "r": 8, "use_dora": False, "use_rslora": True, ...} -> the same without use_dora.
    """
    plain = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]().to_dict()
    kept = {name: value for name, value in values.items() if name in _ALWAYS or value != plain.get(name)}
    kept.pop("peft_version", None)
    targets = kept.get("target_modules")
    return {
        **dict(sorted(kept.items())),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }
