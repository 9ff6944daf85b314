"""Image features kept in memory: with a frozen tower each image goes through it once, for all epochs.

In come a data set of encoded examples and a model; out comes a data set whose examples carry `image_features` [image
tokens, hidden] instead of pixels, or the given data set when the features would not fit. Knows nothing about the
Trainer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Example = dict[str, Any]
Collate = Callable[[list[Example]], dict[str, Any]]


class FeatureRows(Sequence[Example]):
    """Encoded examples with their image features, all in memory."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def feature_bytes(self) -> int:
        """Memory that the features take."""
        return sum(one["image_features"].nbytes for one in self._examples if "image_features" in one)

    def __getitem__(self, index: Any) -> Any:
        example = self._examples[index]
        return dict(example) if isinstance(example, dict) else example


@torch.no_grad()
def keep_features(
    dataset: Sequence[Example],
    model: Any,
    *,
    limit_bytes: int,
    on_row: Callable[[int], None] = lambda rows: None,
) -> Sequence[Example]:
    """Sends every image of `dataset` through the tower and projector once.

    Args:
        dataset: examples as `data.encode` makes them, opened one after the other.
        model: a Phi-3-V whose tower and projector stay frozen.
        limit_bytes: memory that the features may take.
        on_row: called with the number of rows done.

    Returns:
        The data set with features; `dataset` itself when eight rows in it is clear that they would not fit.
    """
    examples: list[Example] = []
    used = 0
    for row in range(len(dataset)):
        example = dict(dataset[row])
        pixels = {
            name: example.pop(name).to(model.device) for name in ("pixel_values", "global_views") if name in example
        }
        if pixels:
            output = model.get_image_features(**pixels, image_sizes=example["image_sizes"])
            example["image_features"] = output.last_hidden_state.to("cpu", copy=True)
            used += example["image_features"].nbytes
        examples.append(example)
        if used > limit_bytes or (row == 7 and used / 8 * len(dataset) > limit_bytes):
            return dataset
        on_row(row + 1)
    return FeatureRows(examples)


class CollateFeatures:
    """A collator that carries `image_features` beside what the given collator makes of the rest.

    Example: features [5, 64] and [7, 64] of two examples become [12, 64], the images of row 0 first.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The batch of some examples, all with features or all without."""
        features = [example["image_features"] for example in examples if "image_features" in example]
        batch = self._collate([{k: v for k, v in example.items() if k != "image_features"} for example in examples])
        if features:
            batch["image_features"] = torch.cat(features)
            batch["image_sizes"] = torch.cat(
                [example["image_sizes"] for example in examples if "image_sizes" in example]
            )
        return batch
