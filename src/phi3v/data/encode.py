"""From a row to token ids, pixels and labels: what one training sample or one question is for the model.

In come a `Row` and a processor; out comes a dict of tensors named as the model's `forward` names them. Images are
opened here and not kept. One rendering, the processor's, serves training and answering, so the ids of a sample up to
its answer are the ids of the question. Knows no file formats, templates, batches or models.

Trained are the answer and what ends it, as Microsoft trained it: `<|end|>`, a newline, `<|endoftext|>` (32007, 29871,
13, 32000). Prompt and image positions carry -100. What is done about a row that is too long is in `fit`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from phi3v.data.augment import Augmented, Change
from phi3v.data.fit import Fitted, Messages, OnTooLong, fit
from phi3v.data.images import MAX_PIXELS, open_image, open_pixels
from phi3v.data.schema import ImagePart, Message, Row, TrainOn
from phi3v.data.templates import whole_text
from phi3v.errors import DataError

IGNORED = -100
"""The label of positions that are not trained: cross entropy skips it."""

Example = dict[str, torch.Tensor]
"""input_ids [T], attention_mask [T], labels [T] (samples only); with images pixel_values [images, crops + 1, 3, 336,
336] and image_sizes [images, 2]; with byte_crops pixel_values uint8 [sub crops, 3, 336, 336] and global_views [images,
3, 336, 336]."""


def encode(
    row: Row,
    processor: Any,
    *,
    train_on: TrainOn = "last_assistant",
    max_length: int | None = None,
    on_too_long: OnTooLong = "skip",
    max_pixels: int = MAX_PIXELS,
    byte_crops: bool = False,
    change: Change | None = None,
) -> Example:
    """A row as a training sample.

    Args:
        row: the conversation; its last turn is the assistant's.
        processor: a Phi3VProcessor.
        train_on: the last answer, or every turn of the assistant.
        max_length: the limit in tokens, images included; None for none.
        on_too_long: "skip" refuses a longer row, "fewer_crops" and "cut_text" make it fit where they can; see `fit`.
        max_pixels: larger images are refused.
        byte_crops: sub crops as bytes, which the model normalises: a quarter of the floats to keep and to send.
        change: what is done to its images once they are open, see `augment`; None for nothing.
    Returns: input_ids, attention_mask, labels, and with images pixel_values (no crops beyond the largest grid's) and
        image_sizes.
    Raises: DataError in one line that names the row: an image, the last turn, or the length (TooLongError).
    """
    if not row.messages or row.messages[-1].role != "assistant":
        raise DataError(f"{row.source}, row {row.index}: the last turn is no answer, so there is nothing to train")
    tokenizer = processor.tokenizer
    with _named(row):
        images = _open_images(row, row.messages, processor, max_pixels)
        images = images if change is None else [change(number, image) for number, image in enumerate(images)]
        sizes = [_size(image) for image in images]
        fitted = Fitted(row.messages, processor.image_processor.num_crops, 0, 0)
        if max_length is not None:
            fitted = fit(
                row.messages,
                sizes,
                count=lambda messages: text_tokens(messages, processor),
                num_crops=fitted.num_crops,
                max_length=max_length,
                on_too_long=on_too_long,
            )
        example = _encode_messages(fitted.messages, images, processor, fitted.num_crops, byte_crops=byte_crops)
    ids = [*example["input_ids"].tolist(), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    labels = label_answers(
        ids,
        assistant_id=tokenizer.convert_tokens_to_ids("<|assistant|>"),
        end_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        train_on=train_on,
        untrained=untrained_answers(fitted.messages),
    )
    example["input_ids"] = torch.tensor(ids)
    example["attention_mask"] = torch.ones(len(ids), dtype=torch.long)
    example["labels"] = torch.tensor(labels)
    return example


def encode_prompt(row: Row, processor: Any, *, max_pixels: int = MAX_PIXELS, byte_crops: bool = False) -> Example:
    """A row as a question: the conversation without its last answer, ready for `generate`.

    Args:
        row: the conversation; a last turn of the assistant is left out.
        processor: a Phi3VProcessor.
        max_pixels: larger images are refused.
        byte_crops: see `encode`; for `generate` they have to become features first.
    Returns: as `encode`, without labels.
    Raises: DataError in one line that names the row.
    """
    messages = row.messages[:-1] if row.messages and row.messages[-1].role == "assistant" else row.messages
    with _named(row):
        images = _open_images(row, messages, processor, max_pixels)
        return _encode_messages(messages, images, processor, None, add_generation_prompt=True, byte_crops=byte_crops)


def text_tokens(messages: Messages, processor: Any) -> int:
    """Length of a training sample of these messages without its image tokens; no image is opened.

    Example: `<s><|user|>\\n<|image_1|>\\nHi<|end|>\\n<|assistant|>\\nHo<|end|>\\n<|endoftext|>` with the real tokenizer
        is <s>, <|user|>, two for the newline; for the image only the <s> behind it; two for the newline, Hi, <|end|>,
        two for the newline, <|assistant|> (which swallows its newline), Ho, <|end|>, two for the newline,
        <|endoftext|>: 17.
    """
    images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
    prompt = processor.apply_chat_template([as_chat(message, None) for message in messages])
    image = processor.image_token + processor.tokenizer.bos_token
    (prompt,), _ = processor.get_text_with_replacements([prompt], [image] * images)
    return len(processor.tokenizer(prompt)["input_ids"]) - images + 1


def untrained_answers(messages: Messages) -> list[int]:
    """Which answers, counted from 0, may not be trained: of the weights 0, 1, 0 and 1 -> [0, 2]."""
    answers = [message for message in messages if message.role == "assistant"]
    return [number for number, message in enumerate(answers) if not message.trained]


def label_answers(
    ids: Sequence[int], *, assistant_id: int, end_id: int, train_on: TrainOn, untrained: Sequence[int] = ()
) -> list[int]:
    """Labels of a conversation: the ids of the answers and of what ends them, -100 elsewhere.

    An answer begins behind `assistant_id` and reaches to its `end_id`; the last one reaches to the end of the ids, over
    the newline and the end of text. The control ids are the template's own: text cannot hold them.

    Args:
        ids: the whole conversation, end of text included.
        assistant_id: opens a turn of the assistant.
        end_id: closes any turn.
        train_on: the last answer or all of them.
        untrained: the answers, counted from 0, that are not.
    Example, with 1 = start, 5 = user, 6 = assistant, 7 = end, 8 and 9 = newline, 0 = end of text:
        ids                  1  5  8  9 21  7  8  9  6 31 32  7  8  9  5  8  9 22  7  8  9  6 41  7  8  9  0
        "last_assistant"     .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  . 41  7  8  9  0
        "all_assistant"      .  .  .  .  .  .  .  .  . 31 32  7  .  .  .  .  .  .  .  .  .  . 41  7  8  9  0
        "all_assistant", untrained=[0]: as "last_assistant" here
    Raises: ValueError when no turn of the assistant is there or one is not closed.
    """
    starts = [place + 1 for place, token in enumerate(ids) if token == assistant_id]
    if not starts:
        raise ValueError("no turn of the assistant in the ids")
    labels = [IGNORED] * len(ids)
    for start in starts if train_on == "all_assistant" else starts[-1:]:
        if starts.index(start) in untrained:
            continue
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
        on_too_long: OnTooLong = "skip",
        max_pixels: int = MAX_PIXELS,
        byte_crops: bool = False,
        augmented: Augmented | None = None,
    ) -> None:
        """Keep rows, processor, the arguments of `encode`, and how images are changed; None for not at all."""
        self.rows = rows
        self.processor = processor
        self.train_on: TrainOn = train_on
        self.max_length = max_length
        self.on_too_long: OnTooLong = on_too_long
        self.max_pixels = max_pixels
        self.byte_crops = byte_crops
        self.augmented = augmented

    def choose_epoch(self, epoch: int) -> None:
        """Has images changed as in this epoch."""
        if self.augmented is not None:
            self.augmented.choose_epoch(epoch)

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
            on_too_long=self.on_too_long,
            max_pixels=self.max_pixels,
            byte_crops=self.byte_crops,
            change=None if self.augmented is None else self.augmented.of(index),
        )


@contextmanager
def _named(row: Row) -> Iterator[None]:
    """Whatever is wrong inside with the row's text or images becomes a DataError that names the row."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = type(error) if isinstance(error, DataError) else DataError
        raise kind(f"{row.source}, row {row.index}: {error}") from error


def _open_images(row: Row, messages: Sequence[Message], processor: Any, max_pixels: int) -> list[Any]:
    """The images of a row, opened, after a look at their places in the messages."""
    places = [part.index for message in messages for part in message.parts if isinstance(part, ImagePart)]
    if places != list(range(len(row.images))):
        raise DataError(
            f"its messages place the images {places}, but there are {len(row.images)} images: place each once, in order"
        )
    opener = open_pixels if processor.image_processor.fast else open_image
    return [opener(image, max_pixels=max_pixels) for image in row.images]


def _size(image: Any) -> tuple[int, int]:
    """Width and height of an opened image, PIL's or an array [height, width, 3]."""
    return image.size if hasattr(image, "convert") else (image.shape[1], image.shape[0])


def _encode_messages(
    messages: Sequence[Message],
    images: Sequence[Any],
    processor: Any,
    num_crops: int | None,
    *,
    add_generation_prompt: bool = False,
    byte_crops: bool = False,
) -> Example:
    """Messages through the processor, as one unbatched example without labels."""
    settings = {
        "pad_crops": False,
        "byte_crops": byte_crops,
        "num_crops": num_crops or processor.image_processor.num_crops,
    }
    batch = processor.apply_chat_template(
        [as_chat(message, images) for message in messages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=add_generation_prompt,
        **(settings if images else {}),
    )
    example = {"input_ids": batch["input_ids"][0], "attention_mask": batch["attention_mask"][0]}
    if images:
        names = ("pixel_values", "global_views", "image_sizes")
        example |= {name: batch[name] for name in names if name in batch}
    return example


def as_chat(message: Message, images: Sequence[Any] | None) -> dict[str, Any]:
    """A message as chat templates take it: text and image parts, the latter empty where no images are given."""
    return {
        "role": message.role,
        "content": [
            ({"type": "image"} if images is None else {"type": "image", "image": images[part.index]})
            if isinstance(part, ImagePart)
            else {"type": "text", "text": whole_text(part.text)}
            for part in message.parts
        ],
    }
