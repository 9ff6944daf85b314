"""The vision parts of one model with a store in front: each image goes through the tower once.

In come examples as `data.encode` makes them; out come the same with `image_features` in place of pixels. A name of
features is the digest of the pixels that the tower sees, of the weights that see them and of how they compute, so that
one changed pixel or weight finds nothing. Every image goes through the tower by itself: its features depend neither on
its neighbours nor on what was kept before. Knows no files, rows or batches.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi3v.features.store import FeatureStore

_logger = logging.getLogger(__name__)
Example = dict[str, Any]

_FORM = "phi3v features 2"
"""Part of every name: another number where the same pixels and weights would give other features."""
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as the tower sees it.

    Attributes:
        parts: its crops, named as `get_image_features` names them: `pixel_values`, and `global_views` where the view of
            the whole is apart.
        size: height and width of its canvas in pixels.
    """

    parts: dict[str, torch.Tensor]
    size: tuple[int, int]


PIXELS = ("pixel_values", "global_views")
"""What an example may hold of its images' pixels."""


class VisionFeatures:
    """Features of the images of one model.

    Attributes:
        store: where they are kept.
        model: a Phi-3-V without adapter around it.
        weights: the digest of its vision parts, and of how they compute.
        computed: images that went through the tower so far.
        refused: those of them that `complete` could not keep.
    """

    def __init__(self, model: Any, store: FeatureStore, *, autocast: torch.dtype | None = None) -> None:
        """Read the weights.

        Args:
            model: a Phi-3-V, with an adapter on its language model or without.
            store: where features are kept.
            autocast: the dtype of mixed precision that the model is used with; None for the weights' own.
        """
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.store = store
        self.computed = self.refused = 0
        self._autocast = autocast
        self.weights = vision_digest(self.model, autocast)

    def names(self, example: Example) -> list[str]:
        """The names of the features of an example's images, in their order; [] without images."""
        return [image_name(self.weights, picture) for picture in images_of(example)]

    def size_of(self, image_size: Sequence[int]) -> int:
        """Bytes that the features of an image take, by its canvas (height, width).

        Example: 1344 x 1344 pixels of Phi-3.5-Vision in bfloat16 are 2,509 tokens of 3,072 numbers, 15,415,296 bytes.
        """
        vision = self.model.model.vision_embed_tokens
        dtype = self._autocast or vision.projection_dtype
        width = 4 if not dtype.is_floating_point else dtype.itemsize  # weights of 4 or 8 bits compute in wider numbers
        return int(vision.token_counts([image_size])[0] * self.model.config.hidden_size * width)

    def keep(self, example: Example, names: Sequence[str]) -> list[bool]:
        """Holds the features of an example's images, made now where they are not there; says of which it could.

        An image whose features do not fit does not go through the tower.

        Args:
            example: with pixels.
            names: what `names` gives for it.
        """
        kept = []
        for name, picture in zip(names, images_of(example), strict=True):
            there = self.store.hold(name)
            if not there and self.store.fits(self.size_of(picture.size)):
                there = self.store.put(name, self.compute(picture))
            kept.append(there)
        return kept

    def complete(self, example: Example) -> Example:
        """An example with features in place of all pixels, taken from the store or made, and kept where they fit."""
        if "pixel_values" not in example:
            return example
        found = []
        for picture in images_of(example):
            name = image_name(self.weights, picture)
            features = self.store.get(name) if self.store.hold(name) else None
            if features is None:
                features = self.compute(picture)
                if not self.store.put(name, features):
                    self._say_that_it_does_not_fit()
            found.append(features)
        rest = {key: value for key, value in example.items() if key not in PIXELS}
        return {**rest, "image_features": torch.cat(found)}

    def _say_that_it_does_not_fit(self) -> None:
        """Counts an image that is not kept, and says so at the first one."""
        self.refused += 1
        if self.refused == 1:
            why = self.store.trouble or f"vision.cache_gb={self.store.limit_bytes / 10**9:g} is full"
            _logger.warning("%s: images whose features are not kept go through the tower each time", why)

    @torch.no_grad()
    def compute(self, picture: Picture) -> torch.Tensor:
        """Features `[image tokens, hidden]` of one image, on the CPU."""
        device = self.model.device
        self.computed += 1
        with torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None):
            pixels = {name: part.to(device) for name, part in picture.parts.items()}
            output = self.model.get_image_features(**pixels, image_sizes=torch.tensor([picture.size]))
        return output.last_hidden_state.to("cpu", copy=True)


def sees_plainly(model: Any) -> bool:
    """Whether no adapter sits on the vision parts, so that base and tuned model see alike."""
    marks = ("lora_", "modules_to_save", "original_module")
    return not any(mark in name for name, _ in _vision_of(model).named_parameters() for mark in marks)


def sees_alike_all_the_time(model: Any) -> bool:
    """Whether a training leaves features as they are: nothing of the vision parts trains or drops out."""
    vision = _vision_of(model)
    trains = any(weight.requires_grad for weight in vision.parameters())
    return sees_plainly(model) and not trains and not vision.img_processor.vision_model.config.attention_dropout


def _vision_of(model: Any) -> Any:
    """Tower, projector and separators of a model, with an adapter around it or without."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.vision_embed_tokens


def images_of(example: Example) -> list[Picture]:
    """The images of an example, one by one; [] without pixels.

    Example: pixel_values [2, 5, 3, 336, 336] with image_sizes [[336, 336], [672, 672]] -> pixel_values [1, 2, 3, 336,
    336] and [1, 5, 3, 336, 336]: three slots of the first image are padding. Where the views of the whole are apart,
    pixel_values [5, 3, 336, 336] and global_views [2, 3, 336, 336] of the same sizes -> pixel_values [1, 3, 336, 336]
    and [4, 3, 336, 336], each with its view.
    """
    if "pixel_values" not in example:
        return []
    pixels, views = example["pixel_values"], example.get("global_views")
    found, first = [], 0
    for place, (height, width) in enumerate(example["image_sizes"].tolist()):
        crops = (height // pixels.shape[-1]) * (width // pixels.shape[-1])
        if views is None:
            parts = {"pixel_values": pixels[place : place + 1, : crops + 1]}
        else:
            parts = {"pixel_values": pixels[first : first + crops], "global_views": views[place : place + 1]}
        found.append(Picture(parts, (height, width)))
        first += crops
    return found


def image_name(weights: str, picture: Picture) -> str:
    """The name of an image's features: SHA-256 of the weights' digest, canvas, and the crops' type, shape and bytes."""
    found = hashlib.sha256(f"{weights} {list(picture.size)} ".encode())
    for name, pixels in sorted(picture.parts.items()):
        found.update(f"{name} {pixels.dtype} {list(pixels.shape)} ".encode())
        found.update(pixels.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def vision_digest(model: Any, autocast: torch.dtype | None) -> str:
    """SHA-256 of all that turns pixels into features: tower, projector and separators, and how they compute.

    Device, attention and mixed precision belong to it, since each rounds in its own way.
    """
    vision = model.model.vision_embed_tokens
    config = model.config.vision_config
    tower = vision.img_processor.vision_model
    settings = [getattr(config, name) for name in _SETTINGS]
    how = [tower.layers_read, tower.config._attn_implementation, model.device.type, autocast]
    found = hashlib.sha256(f"{_FORM} {settings} {how} ".encode())
    for name, weight in sorted(vision.named_parameters()):
        found.update(f"{name} {weight.dtype} {list(weight.shape)} ".encode())
        found.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
