"""Makes Phi-3-V known to transformers' Auto classes.

Models and configurations are chosen by the type in config.json, and registering is enough. Processors and tokenizers
are chosen by the class that their own files name; a name that nobody knows, with an `auto_map` beside it, has the Auto
class ask whether the folder's code may run. So their `from_pretrained` looks at config.json first: Phi-3-V's folders
load with the classes here, whatever else they say; for all other folders it is transformers' own.
"""

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

_PLACE_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
_OPTIONS_OF_AUTO = (
    "config",
    "trust_remote_code",
    "code_revision",
    "backend",
    "use_fast",
    "image_processor_filename",
    "tokenizer_type",
    "mistral_format",
)
"""Arguments by which Auto classes choose a class, which is chosen here."""


class _Nothing:
    """What Auto classes find for Phi-3-V where it has nothing, and so no code of the folder either.

    Without it transformers' pipelines take the image processor's `auto_map` for that of a video processor, and ask
    whether its code may run.
    """

    kind: str

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: ValueError, always."""
        raise ValueError(f"Phi-3-V reads text and images only: it has no {cls.kind}")


class Phi3VVideoProcessor(_Nothing):
    """For `AutoVideoProcessor`."""

    kind = "video processor"


class Phi3VFeatureExtractor(_Nothing):
    """For `AutoFeatureExtractor`."""

    kind = "feature extractor"


def register() -> None:
    """Registers configuration, image processor, processor and model for model type `phi3_v`.

    After it `AutoConfig`, `AutoImageProcessor`, `AutoProcessor`, `AutoModelForImageTextToText` and
    `AutoModelForCausalLM` load Phi-3-V folders and hub repositories with this code, never with the repository's own.
    Calling it again changes nothing. Should transformers bring a `phi3_v` of its own, this one is chosen and a warning
    says so.
    """
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        PreTrainedTokenizerFast,
        __version__,
    )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # the real one, without torchvision

    from .configuration_phi3_v import Phi3VConfig
    from .image_processing_phi3_v import Phi3VImageProcessor
    from .modeling_phi3_v import Phi3VForCausalLM
    from .processing_phi3_v import Phi3VProcessor

    # its `get` would miss what is loaded lazily
    known = CONFIG_MAPPING[Phi3VConfig.model_type] if Phi3VConfig.model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if known not in (None, Phi3VConfig):
        logger.warning(
            "transformers %s brings its own %s (%s); phi3v uses its own implementation instead",
            __version__,
            Phi3VConfig.model_type,
            known.__module__,
        )
    AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
    AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True)
    AutoVideoProcessor.register(Phi3VConfig, Phi3VVideoProcessor, exist_ok=True)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
    for auto, ours in (
        (AutoImageProcessor, Phi3VImageProcessor),
        (AutoProcessor, Phi3VProcessor),
        (AutoTokenizer, PreTrainedTokenizerFast),  # the generic one: LlamaTokenizer gives other ids
        (AutoVideoProcessor, Phi3VVideoProcessor),
        (AutoFeatureExtractor, Phi3VFeatureExtractor),
    ):
        _put_first(auto, ours)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    # by this table of names transformers' Trainer knows that smoothed labels belong to the logits before them
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(Phi3VConfig.model_type, Phi3VForCausalLM.__name__)


def _put_first(auto: Any, ours: Any) -> None:
    """Has an Auto class load Phi-3-V's folders with `ours`, before it looks at what they say about classes and code."""
    plain = auto.from_pretrained.__func__
    if hasattr(plain, "phi3_v"):
        return

    @functools.wraps(plain)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not _is_phi3_v(pretrained_model_name_or_path, kwargs):
            return plain(cls, pretrained_model_name_or_path, *inputs, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _OPTIONS_OF_AUTO}
        return ours.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    marked: Any = from_pretrained
    marked.phi3_v = ours
    auto.from_pretrained = classmethod(from_pretrained)


def _is_phi3_v(place: Any, options: dict[str, Any]) -> bool:
    """Whether a folder, a file in it or a hub id is Phi-3-V's: by the config handed over, by its config.json, or,
    where that is missing as beside an adapter, by the processor that its files name.
    """
    from transformers import PreTrainedConfig
    from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

    from .configuration_phi3_v import Phi3VConfig

    if isinstance(config := options.get("config"), PreTrainedConfig):
        return config.model_type == Phi3VConfig.model_type
    try:
        if (values := _read(place, CONFIG_NAME, options)) is not None:
            return isinstance(values, dict) and values.get("model_type") == Phi3VConfig.model_type
        files = [_read(place, name, options) for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)]
    except (OSError, ValueError):  # what is wrong with a place, the Auto class itself says
        return False
    return any(isinstance(values, dict) and values.get("processor_class") == "Phi3VProcessor" for values in files)


def _read(place: Any, name: str, options: dict[str, Any]) -> Any:
    """A JSON file of a folder or repository; None where it is not there. Raises: OSError, ValueError."""
    from transformers.utils import cached_file

    reasons = ("gated_repo", "missing_entries", "connection_errors")
    file = cached_file(
        os.path.dirname(place) if os.path.isfile(place) else place,
        name,
        **{name: options[name] for name in _PLACE_OPTIONS if name in options},
        **{f"_raise_exceptions_for_{reason}": False for reason in reasons},
    )
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None
