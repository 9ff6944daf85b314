"""Makes Phi-3-V known to transformers' Auto classes."""

import logging
from typing import Any, NoReturn

logger = logging.getLogger(__name__)


class Phi3VVideoProcessor:
    """What `AutoVideoProcessor` finds for Phi-3-V: nothing that reads videos, and so no code of the folder either.

    Without it transformers' pipelines take the image processor's `auto_map` for that of a video processor, and ask
    whether its code may run.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: ValueError, always."""
        raise ValueError("Phi-3-V reads text and images only: it has no video processor")


def register() -> None:
    """Registers configuration, image processor, processor and model for model type `phi3_v`.

    After it `AutoConfig`, `AutoImageProcessor`, `AutoProcessor`, `AutoModelForImageTextToText` and
    `AutoModelForCausalLM` load Phi-3-V folders and hub repositories with this code, never with the repository's own.
    Calling it again changes nothing. Should transformers bring a `phi3_v` of its own, this one is chosen and a warning
    says so.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
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
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    # by this table of names transformers' Trainer knows that smoothed labels belong to the logits before them
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(Phi3VConfig.model_type, Phi3VForCausalLM.__name__)
