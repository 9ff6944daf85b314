"""ONNX graphs of a target, for onnxruntime-genai.

In comes a resolved target and an empty folder, out go its files: the graphs `vision.onnx`, `embedding.onnx` and
`model.onnx`, `genai_config.json` and `processor_config.json` for that runtime, and for ours the config and processor of
the model, from which `export.onnx_runtime` answers. The frame (`export.run`) puts the folder in place, writes digests
and the model card.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from phi3v.errors import ConfigError, MissingPackageError, install
from phi3v.evaluation.engine import settings_reason
from phi3v.export.layout import write_config, write_merged, write_processor
from phi3v.export.onnx_decoder import GENAI_CONFIG, build_decoder, check_decoder
from phi3v.export.onnx_vision import EMBEDDING, VISION, write_embedding, write_vision
from phi3v.loading import load_config, load_processor
from phi3v.targets import ONNX_ABOUT, Target, read_json, run_of
from phi3v.weight_files import find_file
from phi3v.whole_files import held_back

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "onnxruntime_genai")
SHARD_BYTES = 2 * 10**9
Precision = Literal["fp32", "fp16", "int4"]
_AGAIN: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.5, "int4": 0.5}
"""Bytes of the graphs, as a share of the merged float32 weights beside which they are written."""


def export_onnx(place: Target, folder: Path, *, precision: Precision = "fp32") -> dict[str, Any]:
    """Fills `folder`, its two configs `held_back`, and hands back facts for card and screen: {"precision": "int4"}.

    The weights are merged in float32 first, into a folder that is removed again; of these fp16 and int4 are made. int4
    is the decoder's alone, its neighbours stay float32.

    Raises: MissingPackageError without the extra `onnx`; ConfigError for a decoder that the runtime does not have.
    """
    refuse_without_packages(PACKAGES)
    run = run_of(place.name)
    config = load_config(place.base, revision=place.revision)
    check_decoder(config)
    refuse_settings(place)
    merged = folder / "merged"
    merged.mkdir()
    seen = {} if run is None else run.read_recipe().image.processor_options
    write_merged(place, merged, dtype="float32", shard_bytes=SHARD_BYTES, images=seen, again=_AGAIN[precision])
    config.architectures, config.dtype = ["Phi3VForCausalLM"], torch.float32
    processor = load_processor(place.name, revision=place.revision, **seen)
    number = torch.float16 if precision == "fp16" else torch.float32
    write_vision(config, merged, folder, number)
    write_embedding(merged, folder, number)
    built = build_decoder(config, merged, folder, precision)
    shutil.rmtree(merged)
    processor.image_processor.byte_crops = False  # the vision graph takes floats
    write_processor(processor, folder, None, None)
    write_config(config, folder)
    _write_json(folder / "processor_config.json", genai_processor())
    _write_json(held_back(folder / GENAI_CONFIG), genai_config(built, processor.stop_token_ids))
    _write_json(folder / ONNX_ABOUT, {"precision": precision})
    return {"precision": precision}


def refuse_settings(place: Target) -> None:
    """Raises: ConfigError where the base's generation_config.json asks for what answers from graphs do not do."""
    published = find_file(place.base, "generation_config.json", place.revision)
    settings = GenerationConfig.from_dict({} if published is None else read_json(published))
    if (reason := settings_reason(settings)) is not None:
        raise ConfigError(
            f"{place.base}: graphs cannot follow its generation_config.json ({reason}): take it out there, or use "
            "--to merged"
        )


def refuse_without_packages(packages: tuple[str, ...]) -> None:
    """Raises: MissingPackageError that names those which are not installed."""
    missing = [name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"ONNX needs {', '.join(missing)}: {install('onnx')}")


def genai_config(built: dict[str, Any], stops: list[int]) -> dict[str, Any]:
    """The builder's settings of a decoder, made those of a Phi-3-V: its two other graphs, and where answers end."""
    neighbours = {
        "embedding": {
            "filename": EMBEDDING,
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": VISION,
            "config_filename": "processor_config.json",
            "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
            "outputs": {"image_features": "image_features"},
        },
    }
    return {**built, "model": {**built["model"], **neighbours, "type": "phi3v", "eos_token_id": stops}}


def genai_processor() -> dict[str, Any]:
    """Settings of onnxruntime-genai's own image processor, which takes 16 crops whatever stands here."""
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "BGR"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        ("phi3_image_transform", "Phi3ImageTransform", {"num_crops": 16, "num_img_tokens": 144}),
    ]
    transforms = []
    for name, kind, values in steps:
        step: dict[str, Any] = {"name": name, "domain": "com.microsoft.extensions", "type": kind}
        transforms.append({"operation": {**step, "attrs": values} if values else step})
    return {"processor": {"name": "phi-3-image-processing", "transforms": transforms}}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
