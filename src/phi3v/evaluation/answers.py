"""The answers of one model to many rows, and its loss on what should have been answered.

In come a loaded model, its processor and rows; out come texts in the order of the rows and the mean loss per trained
token. A few batches of rows are in memory at a time, and every row is opened and encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi3v.data.collate import Collator
from phi3v.data.encode import encode
from phi3v.data.images import MAX_PIXELS
from phi3v.data.schema import Row
from phi3v.features.collate import CollateFeatures
from phi3v.generate import ChatModel

IMAGE_PARTS = ("pixel_values", "global_views", "image_sizes", "image_features")
"""What an example may hold of its images."""


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        texts: one answer per row, in order.
        loss: mean loss per trained token of the expected answers; None when there was no trained token.
        losses: the loss of each row, summed over its trained tokens; None where it is not known row by row.
        tokens: how many these are.
    """

    texts: list[str]
    loss: float | None
    losses: list[float] | None = None
    tokens: list[int] | None = None


def answer_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_pixels: int = MAX_PIXELS,
    see: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    on_row: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Answers every row greedily.

    Args:
        model: a Phi-3-V, with an adapter or without, in evaluation mode.
        processor: its processor.
        rows: the rows; the last turn of each is what should be answered.
        batch_size: rows that are answered at once.
        max_new_tokens: tokens of an answer at most.
        max_pixels: images with more pixels are refused.
        see: puts features in place of all pixels of an example, where features are kept; the pixels have the form that
            they have in training, by which features are named.
        on_row: called with the number of rows done.
    """
    chat = ChatModel(model, processor)
    collate = CollateFeatures(Collator(processor.tokenizer.pad_token_id))
    byte_crops = see is not None and processor.image_processor.normalises_as_clip
    texts: list[str] = []
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 8 * batch_size):
        window = range(start, min(start + 8 * batch_size, len(rows)))
        examples = [encode(rows[at], processor, max_pixels=max_pixels, byte_crops=byte_crops) for at in window]
        if see is not None:
            examples = [see(example) for example in examples]
        prompts = [prompt_of(example) for example in examples]
        texts += chat.answer_encoded(prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
        for first in range(0, len(examples), batch_size):
            loss, count = summed_loss(model, collate(examples[first : first + batch_size]))
            total, tokens = total + loss, tokens + count
        on_row(len(texts))
    return Answers(texts, total / tokens if tokens else None)


def prompt_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a training example: everything before the first trained token, images included.

    Example: input_ids [1, 5, 6, 7], labels [-100, -100, 6, 7] -> input_ids [1, 5].
    """
    trained = (example["labels"] != -100).nonzero()
    end = int(trained[0]) if len(trained) else len(example["labels"])
    prompt = {name: example[name][:end] for name in ("input_ids", "attention_mask") if name in example}
    return prompt | {name: example[name] for name in IMAGE_PARTS if name in example}


@torch.inference_mode()
def summed_loss(model: Any, batch: Mapping[str, Any]) -> tuple[float, int]:
    """Loss summed over the trained tokens of a batch, and how many there are."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    count = int((batch["labels"][:, 1:] != -100).sum())
    if count == 0:
        return 0.0, 0
    return float(model(**batch, trained_logits_only=True).loss) * count, count
