"""What is wrong with the small files of a model folder, in one line each: the file, the value, the way out.

In come a folder's files and what was made of them, out comes nothing or a CheckpointError. These are the faults that
transformers and tokenizers would report without the file, or not before the first image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.activations import ACT2FN
from transformers.utils.chat_template_utils import render_jinja_template

from phi3v.errors import CheckpointError
from phi3v.model.configuration_phi3_v import grid_fault
from phi3v.passthrough import first_line
from phi3v.targets import read_json

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
"""The files that every processor needs."""

_WAY_OUT = "download it again, or restore it as it was published"
_OPTIONAL = ("processor_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_COUNTS = ("vocab_size", "max_position_embeddings", "original_max_position_embeddings")
_TOWER_LAYERS = 24


def check_processor_files(folder: Path) -> None:
    """Refuses files of a processor that hold something else than they should; missing ones are another's business."""
    for name in (*PROCESSOR_FILES, *_OPTIONAL):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        if name == "tokenizer.json" and not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{folder / name} holds no tokenizer (no mapping `model`): {_WAY_OUT}")


def check_processor(processor: Any, place: str) -> None:
    """Refuses settings of images, and chat templates, that would fail at the first image or question.

    Args:
        processor: as it was loaded.
        place: the folder or hub id that it was loaded from.
    """
    images, file = processor.image_processor, Path(place) / "preprocessor_config.json"
    if not _is_count(images.num_crops):
        raise CheckpointError(
            f"{file}: num_crops is {images.num_crops!r}, allowed is a whole number, 1 or more; {_WAY_OUT}"
        )
    for name in ("image_mean", "image_std"):
        value = getattr(images, name)
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
            raise CheckpointError(f"{file}: {name} is {value!r:.60}, allowed are three numbers; {_WAY_OUT}")
    templates = processor.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        try:
            render_jinja_template(conversations=[], chat_template=template)  # it is read, and nothing is rendered
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{_template_file(Path(place))}: the chat template is broken, line {error.lineno}: "
                f"{first_line(error)}; {_WAY_OUT}"
            ) from error


def config_fault(values: Mapping[str, Any]) -> str | None:
    """The first value in a config.json that no model can have, as half a line; what types are wrong is found later.

    Example: {"rope_theta": "x"} -> "rope_theta is 'x', allowed is a number above 0"; a sound one -> None.
    """
    for name in _COUNTS:
        value = values.get(name)
        if isinstance(value, int) and not _is_count(value):
            return f"{name} is {value!r}, allowed is a whole number, 1 or more"
    theta = values.get("rope_theta")
    if theta is not None and (not _is_number(theta) or theta <= 0):
        return f"rope_theta is {theta!r}, allowed is a number above 0"
    size, padding = values.get("vocab_size"), values.get("pad_token_id")
    if isinstance(size, int) and isinstance(padding, int) and padding >= size:
        return f"pad_token_id is {padding}, which needs a larger vocab_size than {size}"
    vision = values.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    for prefix, section in (("", values), ("vision_config.", vision)):
        act = section.get("hidden_act")
        if isinstance(act, str) and act not in ACT2FN:
            return f"{prefix}hidden_act is {act!r}, which transformers does not have"
    sides = [vision.get(name, side) for name, side in (("image_size", 336), ("patch_size", 14))]
    if (fault := grid_fault(*sides)) is not None:
        return fault
    return _tower_fault(values.get("img_processor"), vision.get("num_hidden_layers", _TOWER_LAYERS))


def _tower_fault(facts: Any, layers: Any) -> str | None:
    """What is wrong with the layer of the tower that is read.

    Example: ({"layer_idx": -9}, 4) -> "img_processor.layer_idx is -9, allowed is -5 to 4: the tower has 4 layers".
    """
    if not isinstance(facts, dict) or not _is_count(layers):
        return None
    place = facts.get("layer_idx", -2)
    if isinstance(place, int) and not isinstance(place, bool) and -layers - 1 <= place <= layers:
        return None
    return f"img_processor.layer_idx is {place!r}, allowed is {-layers - 1} to {layers}: the tower has {layers} layers"


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number, 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _template_file(folder: Path) -> Path:
    """The file that a chat template was read from."""
    names = ("chat_template.jinja", "chat_template.json")
    return next((folder / name for name in names if (folder / name).is_file()), folder / "tokenizer_config.json")
