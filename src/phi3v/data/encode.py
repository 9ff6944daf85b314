"""From a row to token ids, pixels and labels: what one training sample or one question is for the model.

In come a `Row` and a processor; out comes a dict of tensors named as the model's `forward` names them. Images are
opened here and not kept. One rendering, the processor's, serves training and answering, so the ids of a sample up to
its answer are the ids of the question. Knows no file formats, templates, batches or models.

Trained are the answer and what ends it, as Microsoft trained it: `<|end|>`, a newline, `<|endoftext|>` (32007, 29871,
13, 32000). Prompt and image positions carry -100. A row that is too long is refused and never cut.
"""

from collections.abc import Sequence
from typing import Any

import torch

from phi3v.data.images import MAX_PIXELS, open_image
from phi3v.data.schema import ImagePart, Message, Row, TrainOn
from phi3v.data.templates import whole_text
from phi3v.errors import DataError

IGNORED = -100
"""The label of positions that are not trained: cross entropy skips it."""

Example = dict[str, torch.Tensor]
"""input_ids [T], attention_mask [T], labels [T] (samples only); with images pixel_values [images, crops + 1, 3, 336,
336] and image_sizes [images, 2]."""


def encode(
    row: Row,
    processor: Any,
    *,
    train_on: TrainOn = "last_assistant",
    max_length: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Example:
    """A row as a training sample.

    Args:
        row: the conversation; its last turn is the assistant's.
        processor: a Phi3VProcessor.
        train_on: the last answer, or every turn of the assistant.
        max_length: more tokens than that are refused; None for no limit.
        max_pixels: larger images are refused.
    Returns: input_ids, attention_mask, labels, and with images pixel_values (no crops beyond the largest grid's) and
        image_sizes.
    Raises: DataError in one line that names the row: an image, the last turn, or the length.
    """
    if not row.messages or row.messages[-1].role != "assistant":
        raise DataError(f"{row.source}, row {row.index}: the last turn is no answer, so there is nothing to train")
    tokenizer = processor.tokenizer
    example = _encode_messages(row, row.messages, processor, max_pixels, add_generation_prompt=False)
    ids = [*example["input_ids"].tolist(), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    if max_length is not None and len(ids) > max_length:
        spent = ids.count(processor.image_token_id)
        raise DataError(
            f"{row.source}, row {row.index}: {len(ids)} tokens ({spent} for images), and the limit is {max_length}: "
            "lower image.num_crops, shorten the text, or raise data.max_length"
        )
    labels = label_answers(
        ids,
        assistant_id=tokenizer.convert_tokens_to_ids("<|assistant|>"),
        end_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        train_on=train_on,
    )
    example["input_ids"] = torch.tensor(ids)
    example["attention_mask"] = torch.ones(len(ids), dtype=torch.long)
    example["labels"] = torch.tensor(labels)
    return example


def encode_prompt(row: Row, processor: Any, *, max_pixels: int = MAX_PIXELS) -> Example:
    """A row as a question: the conversation without its last answer, ready for `generate`.

    Args:
        row: the conversation; a last turn of the assistant is left out.
        processor: a Phi3VProcessor.
        max_pixels: larger images are refused.
    Returns: as `encode`, without labels.
    Raises: DataError in one line that names the row.
    """
    messages = row.messages[:-1] if row.messages and row.messages[-1].role == "assistant" else row.messages
    return _encode_messages(row, messages, processor, max_pixels, add_generation_prompt=True)


def label_answers(ids: Sequence[int], *, assistant_id: int, end_id: int, train_on: TrainOn) -> list[int]:
    """Labels of a conversation: the ids of the answers and of what ends them, -100 elsewhere.

    An answer begins behind `assistant_id` and reaches to its `end_id`; the last one reaches to the end of the ids, over
    the newline and the end of text. The control ids are the template's own: text cannot hold them.

    Args:
        ids: the whole conversation, end of text included.
        assistant_id: opens a turn of the assistant.
        end_id: closes any turn.
        train_on: the last answer or all of them.
    Example, with 1 = start, 5 = user, 6 = assistant, 7 = end, 8 and 9 = newline, 0 = end of text:
        ids                  1  5  8  9 21  7  8  9  6 31 32  7  8  9  5  8  9 22  7  8  9  6 41  7  8  9  0
        "last_assistant"     .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  . 41  7  8  9  0
        "all_assistant"      .  .  .  .  .  .  .  .  . 31 32  7  .  .  .  .  .  .  .  .  .  . 41  7  8  9  0
    Raises: ValueError when no turn of the assistant is there or one is not closed.
    """
    starts = [place + 1 for place, token in enumerate(ids) if token == assistant_id]
    if not starts:
        raise ValueError("no turn of the assistant in the ids")
    labels = [IGNORED] * len(ids)
    for start in starts if train_on == "all_assistant" else starts[-1:]:
        if end_id not in ids[start:]:
            raise ValueError("a turn of the assistant is not closed")
        stop = len(ids) if start == starts[-1] else ids.index(end_id, start) + 1
        labels[start:stop] = ids[start:stop]
    return labels


class EncodedRows(torch.utils.data.Dataset[Example]):
    """Training samples of some rows, made when they are asked for: nothing of an image stays in memory.

    For torch's DataLoader and transformers' Trainer; can be pickled for loader workers.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Any,
        *,
        train_on: TrainOn = "last_assistant",
        max_length: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Keep rows, processor and the arguments of `encode`."""
        self.rows = rows
        self.processor = processor
        self.train_on: TrainOn = train_on
        self.max_length = max_length
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """The sample of `rows[index]`. Raises: DataError that names the row."""
        return encode(
            self.rows[index],
            self.processor,
            train_on=self.train_on,
            max_length=self.max_length,
            max_pixels=self.max_pixels,
        )


def _encode_messages(
    row: Row, messages: Sequence[Message], processor: Any, max_pixels: int, *, add_generation_prompt: bool
) -> Example:
    """Messages through the processor, as one unbatched example without labels."""
    places = [part.index for message in messages for part in message.parts if isinstance(part, ImagePart)]
    if places != list(range(len(row.images))):
        raise DataError(
            f"{row.source}, row {row.index}: its messages place the images {places}, but there are {len(row.images)} "
            "images: place each once, in order"
        )
    try:
        images = [open_image(image, max_pixels=max_pixels) for image in row.images]
        batch = processor.apply_chat_template(
            [_as_chat(message, images) for message in messages],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=add_generation_prompt,
            **({"pad_crops": False} if images else {}),
        )
    except (ValueError, TypeError) as error:
        kind = type(error) if isinstance(error, DataError) else DataError
        raise kind(f"{row.source}, row {row.index}: {error}") from error
    example = {"input_ids": batch["input_ids"][0], "attention_mask": batch["attention_mask"][0]}
    if images:
        example["pixel_values"] = batch["pixel_values"]
        example["image_sizes"] = batch["image_sizes"]
    return example


def _as_chat(message: Message, images: Sequence[Any]) -> dict[str, Any]:
    """A message as chat templates take it: text and image parts."""
    return {
        "role": message.role,
        "content": [
            {"type": "image", "image": images[part.index]}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": whole_text(part.text)}
            for part in message.parts
        ],
    }
