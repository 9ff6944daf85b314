"""Batches of examples some of whose images have kept features, and others pixels.

In come examples and a collator of pixels; out comes a batch whose keys are argument names of the model's `forward`.
Knows nothing of stores, towers or text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from phi3v.features.vision import PIXELS, Example, images_of

Collate = Callable[[list[Example]], dict[str, Any]]


class CollateFeatures:
    """A collator that carries `image_features` beside what the given collator makes of the rest.

    Example: features [5, 64] and [7, 64] of two examples become [12, 64], the images of row 0 first. Where the second
    example has pixels instead, they become the list [features of row 0, None], beside the pixels that belong to None.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The batch of some examples; `image_sizes` are those of all images, in the form of the given collator."""
        batch = self._collate([_without_features(example) for example in examples])
        if not any("image_features" in example for example in examples):
            return batch
        with_images = [example for example in examples if "image_sizes" in example]
        sizes = torch.cat([example["image_sizes"] for example in with_images])
        batch["image_sizes"] = sizes.tolist() if isinstance(batch.get("image_sizes"), list) else sizes
        found = [one for example in with_images for one in _features_of(example)]
        whole = [one for one in found if one is not None]
        batch["image_features"] = torch.cat(whole) if len(whole) == len(found) else found
        return batch


def _without_features(example: Example) -> Example:
    """What is left of an example for a collator of pixels: the sizes, too, of images that have pixels alone."""
    if "image_features" not in example:
        return example
    rest = {key: value for key, value in example.items() if key not in ("image_features", "image_sizes")}
    missing = [place for place, one in enumerate(_features_of(example)) if one is None]
    return {**rest, "image_sizes": example["image_sizes"][missing]} if missing else rest


def _features_of(example: Example) -> Sequence[torch.Tensor | None]:
    """What `image_features` of a batch holds for an example: one tensor for all its images, or one or None for each."""
    features = example.get("image_features", [None] * len(example["image_sizes"]))
    return [features] if isinstance(features, torch.Tensor) else features


def use_features(example: Example, features: Sequence[torch.Tensor | None]) -> Example:
    """An example with features in place of the pixels of those images that have them.

    Args:
        example: with pixels of all its images.
        features: of each image, None where there are none.
    Returns: `image_features` is one tensor `[image tokens, hidden]` of all images, and no pixels are left; or, where
        some have none, a list with None in their places, and the pixels are theirs alone. Without any, the example.
    """
    missing = [place for place, one in enumerate(features) if one is None]
    if len(missing) == len(features):
        return example
    changed = {key: value for key, value in example.items() if key not in PIXELS}
    if not missing:
        return {**changed, "image_features": torch.cat([one for one in features if one is not None])}
    changed["image_features"] = list(features)
    left = [images_of(example)[place].parts for place in missing]
    if "global_views" in example:
        return changed | {name: torch.cat([parts[name] for parts in left]) for name in PIXELS}
    most = max(parts["pixel_values"].shape[1] for parts in left)
    return {**changed, "pixel_values": example["pixel_values"][missing, :most]}
