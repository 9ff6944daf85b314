"""From examples to a batch: rows padded to one length or packed end to end, images one after the other.

In come examples of `encode` (or `encode_prompt`); out comes a dict whose keys are exactly arguments of the model's
`forward`, or a list of these, the micro-batches of one step. Knows nothing of rows, text or images beyond their shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from phi3v.data.encode import IGNORED, Example
from phi3v.data.plan import MicroBatches
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
        batch |= images_of(examples, flat=self.image_token_id is not None)
        return batch if self.image_token_id is None else step_batch(batch, self.image_token_id)

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        """Rows of different lengths as one tensor."""
        longest = max(len(row) for row in rows)
        padded = rows[0].new_full((len(rows), longest), value)
        for place, row in enumerate(rows):
            start = longest - len(row) if self.padding_side == "left" else 0
            padded[place, start : start + len(row)] = row
        return padded


@dataclass(frozen=True)
class PackedCollator:
    """Makes one row of several examples, end to end, for attention that stays inside each of them.

    Attributes:
        image_token_id: makes a batch of a training step, as in `Collator`; None leaves it as it is.
    """

    image_token_id: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch.

        Args:
            examples: as for `Collator`, with labels; a mask of theirs is left out, as no position is padding.
        Returns: input_ids, position_ids and labels [1, T]; cu_seqlens, int32 [examples + 1], and max_seqlen, a number,
            for the attention; the images as `Collator` gives them.
        Example: input_ids [5, 6, 7] and [8, 9] -> [[5, 6, 7, 8, 9]], position_ids [[0, 1, 2, 0, 1]], cu_seqlens
            [0, 3, 5], max_seqlen 3. Labels [5, 6, 7] and [8, 9] -> [[-100, 6, 7, -100, 9]]: the first token of an
            example follows on nothing, least of all on its neighbour.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        borders = [0, *accumulate(lengths)]
        labels = torch.cat([example["labels"] for example in examples])
        labels[borders[:-1]] = IGNORED
        batch: dict[str, Any] = {
            "input_ids": torch.cat([example["input_ids"] for example in examples])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": labels[None],
            "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
            "max_seqlen": max(lengths),
        }
        batch |= images_of(examples, flat=self.image_token_id is not None)
        return batch if self.image_token_id is None else step_batch(batch, self.image_token_id)


@dataclass(frozen=True)
class StepCollator:
    """Makes the micro-batches of one optimiser step out of its samples.

    They are cut by the lengths that the samples have now. That is the plan made from headers and texts, except where a
    row could not be decoded and a longer or shorter one stands in for it: the packs then follow from what is there,
    stay within the budget, and the step keeps its number of samples.

    Attributes:
        collate: makes a batch of the samples of one micro-batch.
        micro_batches: how a step is cut.
        halvings: how often since then the micro-batches were halved; loader workers see it, as its memory is shared.
    """

    collate: Callable[[list[Example]], dict[str, Any]]
    micro_batches: MicroBatches
    halvings: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    def __call__(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The micro-batches of a step; every example is in one of them.

        Example, packs of 10 tokens: of examples with 6, 5, 4 and 3 tokens 0 and 2 are a batch, and 1 and 3.
        """
        return [self.collate([examples[place] for place in group]) for group in self._groups(examples)]

    def halve(self) -> None:
        """From now on micro-batches hold half as much: packs of 10 tokens are packs of 5."""
        self.halvings.add_(1)

    def is_single(self, examples: Sequence[Example]) -> bool:
        """Whether each of these examples is a micro-batch of its own, and nothing smaller can be made of them."""
        return all(len(group) == 1 for group in self._groups(examples))

    def _groups(self, examples: Sequence[Example]) -> list[list[int]]:
        """Which examples go together."""
        how = replace(self.micro_batches, halvings=int(self.halvings))
        return how.groups([len(example["input_ids"]) for example in examples])


def images_of(examples: Sequence[Example], *, flat: bool) -> dict[str, torch.Tensor]:
    """The images of several examples: pixels and image_sizes, or nothing where no example has any.

    `flat` gives the real crops one after the other, otherwise all images get as many slots as the largest has.
    """
    with_images = [example for example in examples if "pixel_values" in example]
    if not with_images:
        return {}
    pixels = join_crops(with_images) if flat else join_padded(with_images)
    return {**pixels, "image_sizes": torch.cat([example["image_sizes"] for example in with_images])}


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
