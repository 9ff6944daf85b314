"""From examples to a batch: rows padded to one length, images one after the other.

In come examples of `encode` (or `encode_prompt`); out comes a dict whose keys are exactly argument names of the model's
`forward`. Knows nothing of rows, text or images beyond their shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from phi3v.data.encode import IGNORED, Example
from phi3v.data.step_batch import step_batch


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples; `Collator(pad_token_id=0)([example, example])`.

    Attributes:
        pad_token_id: what fills input_ids.
        padding_side: "right" for training, "left" for generation, which goes on at the right end.
        image_token_id: given, the batch is one of a training step, see `step_batch`.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"
    image_token_id: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch.

        Args:
            examples: each with input_ids [T] and optionally attention_mask [T] (ones), labels [T], pixel_values
                [images, crops + 1, 3, side, side] and image_sizes [images, 2], or for a step crops as bytes; labels in
                all of them or in none.
        Returns: input_ids, attention_mask and labels [examples, longest T]; where there are images, pixel_values [all
            images, most crops + 1, 3, side, side], those of the first example first, and image_sizes [all images, 2].
        Example, pad_token_id 0: input_ids [5, 6, 7] and [8] -> [[5, 6, 7], [8, 0, 0]], attention_mask
            [[1, 1, 1], [1, 0, 0]], labels of the second row [8, -100, -100]; with padding_side="left" it is [0, 0, 8].
        """
        ids = [example["input_ids"] for example in examples]
        masks = [example.get("attention_mask", torch.ones_like(example["input_ids"])) for example in examples]
        batch = {"input_ids": self._pad(ids, self.pad_token_id), "attention_mask": self._pad(masks, 0)}
        if any("labels" in example for example in examples):
            batch["labels"] = self._pad([example["labels"] for example in examples], IGNORED)
        with_images = [example for example in examples if "pixel_values" in example]
        if with_images:
            batch |= join_crops(with_images) if self.image_token_id is not None else join_padded(with_images)
            batch["image_sizes"] = torch.cat([example["image_sizes"] for example in with_images])
        return batch if self.image_token_id is None else step_batch(batch, self.image_token_id)

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        """Rows of different lengths as one tensor."""
        longest = max(len(row) for row in rows)
        padded = rows[0].new_full((len(rows), longest), value)
        for place, row in enumerate(rows):
            start = longest - len(row) if self.padding_side == "left" else 0
            padded[place, start : start + len(row)] = row
        return padded


def join_padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """`pixel_values` of examples as the processor makes them, all images with as many slots as the largest has."""
    return {"pixel_values": join_images([example["pixel_values"] for example in examples])}


def join_crops(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The real crops of all images, one after the other, in the forms of `model.crops_phi3_v`.

    Example: bytes of two examples, pixel_values [1, 3, 336, 336] and [6, 3, 336, 336], global_views [1, 3, 336, 336]
    and [2, 3, 336, 336] -> [7, 3, 336, 336] and [3, 3, 336, 336]. Floats of one image of 1 crop and one of 2, [1, 2, 3,
    336, 336] and [1, 3, 3, 336, 336] -> pixel_values [5, 3, 336, 336].
    """
    if "global_views" in examples[0]:
        return {name: torch.cat([one[name] for one in examples]) for name in ("pixel_values", "global_views")}
    side = examples[0]["pixel_values"].shape[-1]
    real = [
        slots[: int(height) // side * (int(width) // side) + 1]
        for one in examples
        for slots, (height, width) in zip(one["pixel_values"], one["image_sizes"], strict=True)
    ]
    return {"pixel_values": torch.cat(real)}


def join_images(pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images of several rows in one tensor, fewer crops filled up with zeros.

    Example: shapes [1, 2, 3, 336, 336] and [2, 5, 3, 336, 336] -> [3, 5, 3, 336, 336].
    """
    most = max(part.shape[1] for part in pixels)
    joined = pixels[0].new_zeros((sum(len(part) for part in pixels), most, *pixels[0].shape[2:]))
    start = 0
    for part in pixels:
        joined[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return joined
