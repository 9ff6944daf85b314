"""Configuration of Phi-3-Vision and Phi-3.5-Vision.

In memory the rope settings follow transformers 5 (`rope_parameters`, type `longrope`); on disk the configuration is the
flat one of Microsoft's checkpoints (`rope_scaling` with type `su`, `rope_theta`, `original_max_position_embeddings`
beside it), so that older readers keep their rope. Where the context is changed afterwards, rope follows as it would in
an edited file. What a file says about remote code (`auto_map`) or about an attention implementation is ignored.
"""

import copy
import math
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, Phi3Config

# Vision tower of both published models: OpenAI's ViT-L/14 at 336 pixels. Their config.json does not state it.
CLIP_VIT_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "projection_dim": 768,
}

# `<|image|>` in the tokenizer of both models; Microsoft's own code never puts it into a sequence.
PUBLISHED_IMAGE_TOKEN_ID = 32044

# What the published models say about their image embedding; other values are not implemented by anybody.
HD_EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}

# Fields of every transformers configuration that say nothing about this model, and the path it was loaded from, which
# says something about its user.
NOT_WRITTEN = {
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
}

# What a file cannot choose, the caller alone: remote code, and the kernels of attention and experts.
NOT_THE_FILES = {
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "_flash_attn_2_enabled",
    "experts_implementation",
    "_experts_implementation",
}

# The fields that say how long a context is.
CONTEXT = ("max_position_embeddings", "original_max_position_embeddings")


def grid_fault(image_size: Any, patch_size: Any) -> str | None:
    """Why a tower cannot see the processor's crops of 336 pixels as 24 x 24 patches; None where it can, or is no tower.

    Example: (224, 14) -> "vision_config.image_size is 224 and patch_size 14, allowed are 336 and 14: ...".
    """
    if not isinstance(image_size, int) or not isinstance(patch_size, int) or (image_size, patch_size) == (336, 14):
        return None
    return (
        f"vision_config.image_size is {image_size} and patch_size {patch_size}, allowed are 336 and 14: images are cut "
        "into crops of 336 pixels with 24 x 24 patches"
    )


@strict
class Phi3VConfig(Phi3Config):
    r"""
    Configuration of a Phi-3-Vision model: a Phi-3 decoder whose input embeddings are replaced, at image tokens, by
    projected CLIP features. The fields of the decoder are those of [`Phi3Config`].

    embd_layer (`dict`, *optional*):
        How image features are arranged. Only the arrangement of the published models is accepted.
    img_processor (`dict`, *optional*):
        Facts about the vision tower: `image_dim_out` (its width), `num_img_tokens` (merged patches of one crop, 144),
        `layer_idx` (the hidden state that is read, -2 when absent) and `type_feature` (`"patch"`).
    vision_config (`dict` or `CLIPVisionConfig`, *optional*, defaults to ViT-L/14 at 336 pixels):
        The vision tower. Microsoft's files have no such key; it is written only for towers of another shape.
    image_token_id (`int`, *optional*, defaults to 32044 where the vocabulary holds it):
        Id at which the processor places image features (`<|image|>`). Microsoft's negative ids are accepted as well.

    Example:

    ```python
    >>> from phi3v.model.configuration_phi3_v import Phi3VConfig

    >>> config = Phi3VConfig(max_position_embeddings=131072, rope_scaling={"type": "su", "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48})
    >>> config.rope_parameters["rope_type"]
    'longrope'
    >>> config.to_dict()["rope_scaling"]["type"]
    'su'
    ```"""

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}

    embd_layer: dict | None = None
    img_processor: dict | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    image_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for key in NOT_THE_FILES - {"attn_implementation", "experts_implementation"}:  # these the caller's as well
            kwargs.pop(key, None)
        self.embd_layer = {**HD_EMBEDDING, **(self.embd_layer or {})}
        if self.embd_layer != HD_EMBEDDING:
            raise ValueError(f"embd_layer {self.embd_layer} is not supported, only {HD_EMBEDDING}")
        width, heads = self.hidden_size, self.num_attention_heads
        if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
            raise ValueError(f"hidden_size is {width}, which is no multiple of num_attention_heads, {heads}")
        self._set_vision_config()
        if self.image_token_id is None and self.vocab_size > PUBLISHED_IMAGE_TOKEN_ID:
            self.image_token_id = PUBLISHED_IMAGE_TOKEN_ID
        self._set_window_aside(kwargs.pop("_file_sliding_window", None))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`, by which a file is loaded; an attention is chosen in `kwargs` alone."""
        return super().from_dict({key: it for key, it in config_dict.items() if key not in NOT_THE_FILES}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """transformers' `from_json_file`, by the same way."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @property
    def auto_map(self) -> dict[str, str]:
        """Classes of a repository's own code: never any. TRL asks each configuration for them."""
        return {}

    @auto_map.setter
    def auto_map(self, value: Any) -> None:
        """Whatever it is, it is neither kept nor written."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field; rope and window follow a change of the context as if the file had said so.

        Example: 4096 of 131072 tokens scale by 32; `max_position_embeddings=8192` has them scale by 2.
        """
        rope = getattr(self, "rope_parameters", None) if name in CONTEXT and hasattr(self, "_post_init_done") else None
        scaling = self._file_rope_scaling(rope) if rope and rope.get("rope_type") == "longrope" else None
        super().__setattr__(name, value)
        if rope and scaling:
            derived = {"rope_type", "factor", "attention_factor"}
            kept = {key: one for key, one in rope.items() if key not in derived}
            self.convert_rope_params_to_dict(rope_scaling=kept | scaling)
        if rope is not None:
            self._set_window_aside(self._file_sliding_window)

    def _set_window_aside(self, window: int | None) -> None:
        """Puts a window that covers the whole context, as Microsoft's does, where transformers does not see it.

        It would build sliding masks and caches for it; `to_dict` writes it back.
        """
        own: int | None = getattr(self, "sliding_window")  # noqa: B009 -- a field of the class above, unseen by mypy
        window = window if own is None else own
        covers = window is not None and window >= self.max_position_embeddings
        self._file_sliding_window: int | None = window if covers else None
        self.sliding_window: int | None = None if covers else window

    def _set_vision_config(self) -> None:
        vision = self.vision_config
        if vision is None or isinstance(vision, dict):
            try:
                own = {key: value for key, value in (vision or {}).items() if key not in NOT_THE_FILES}
                vision = CLIPVisionConfig(**{**CLIP_VIT_LARGE_336, **own})
            except (StrictDataclassError, TypeError, ValueError) as error:
                raise ValueError(f"vision_config: {' '.join(str(error).split())}") from error
        if (fault := grid_fault(vision.image_size, vision.patch_size)) is not None:
            raise ValueError(fault)
        self.vision_config = vision
        facts: dict[str, Any] = {"name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336"}
        facts |= {"image_dim_out": vision.hidden_size, "num_img_tokens": 144}
        self.img_processor = {**facts, **(self.img_processor or {})}
        if self.img_processor["image_dim_out"] != vision.hidden_size:
            raise ValueError(
                f"img_processor.image_dim_out is {self.img_processor['image_dim_out']}, but the vision tower is "
                f"{vision.hidden_size} wide (vision_config.hidden_size)"
            )
        if self.img_processor.get("type_feature", "patch") != "patch":
            raise ValueError(
                f"img_processor.type_feature {self.img_processor['type_feature']!r} is not supported, only 'patch'"
            )

    @property
    def vision_feature_layer(self) -> int:
        """Index of the tower's hidden state that is read, counted as transformers does (-2: the last layer is not
        used)."""
        return (self.img_processor or {}).get("layer_idx", -2)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Turns Microsoft's `rope_scaling` (type `su` or `yarn`) into `rope_parameters` of type `longrope` before
        validation."""
        scaling = kwargs.get("rope_scaling") or self.rope_parameters
        if scaling:
            scaling = copy.deepcopy(dict(scaling))
            kind = scaling.pop("type", None) or scaling.get("rope_type", "default")
            if kind == "yarn":
                scaling.setdefault("attention_factor", self._yarn_attention())
            scaling["rope_type"] = "longrope" if kind in ("su", "yarn", "longrope") else kind
            if scaling["rope_type"] == "longrope":
                scaling["original_max_position_embeddings"] = self.original_max_position_embeddings
                scaling.setdefault("factor", self._context_growth())
            kwargs["rope_scaling"] = scaling
        return super().convert_rope_params_to_dict(**kwargs)

    def _context_growth(self) -> float:
        """How many times the original context the whole one is: 32 for both published models."""
        return self.max_position_embeddings / self.original_max_position_embeddings

    def _yarn_attention(self) -> float:
        """The factor on cosine and sine of the original's other scaling: 0.1 ln(s) + 1."""
        return 0.1 * math.log(max(self._context_growth(), 1.0)) + 1.0

    def _file_rope_scaling(self, rope: dict[str, Any]) -> dict[str, Any]:
        """`rope_scaling` for a file: type `su` or `yarn` where they say all, else transformers' `longrope`.

        Older readers refuse the last form, where they would compute something else.
        """
        written = {key: rope[key] for key in ("long_factor", "short_factor")}
        own = {key: rope[key] for key in ("factor", "attention_factor") if rope.get(key) is not None}
        for kind, attention in (("su", {}), ("yarn", {"attention_factor": self._yarn_attention()})):
            if own in (attention, {"factor": self._context_growth(), **attention}):
                return {**written, "type": kind}
        return {**written, **own, "type": "longrope"}

    def to_dict(self) -> dict[str, Any]:
        """The flat configuration of Microsoft's files: `rope_scaling` in `su` form, no `vision_config` where it is
        ViT-L/14-336."""
        output = super().to_dict()
        rope = output.pop("rope_parameters", None) or {}
        output["rope_theta"] = rope.get("rope_theta", 10000.0)
        output["rope_scaling"] = None
        if rope.get("rope_type") == "longrope":
            output["rope_scaling"] = self._file_rope_scaling(rope)
        whole_context = output.pop("_file_sliding_window", None)
        if output["sliding_window"] is None:
            output["sliding_window"] = whole_context
        if all(getattr(self.vision_config, key) == value for key, value in CLIP_VIT_LARGE_336.items()):
            output.pop("vision_config", None)
        if "dtype" in output:
            output["torch_dtype"] = output.pop("dtype")
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: every field of this class, for older readers have other defaults (eos, rope,
        window)."""
        output = {key: value for key, value in self.to_dict().items() if key not in NOT_WRITTEN}
        if "vision_config" in output:
            output["vision_config"] = {key: output["vision_config"][key] for key in CLIP_VIT_LARGE_336}
        return output


__all__ = ["Phi3VConfig"]
