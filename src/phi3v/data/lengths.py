"""How long rows are, from image headers and text alone: the lengths that `encode` will give, with nothing decoded.

In come rows and a processor; out come, in the same order, a `RowLength` for each, or a `RowProblem` for one that cannot
become a sample. Texts go through the tokenizer many at a time, each image as one token that is then counted at its
price. Knows no recipes, limits or batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from phi3v.data.encode import IGNORED, as_chat, label_answers, untrained_answers
from phi3v.data.images import MAX_PIXELS, image_size
from phi3v.data.schema import ImagePart, Row, RowProblem, TrainOn
from phi3v.data.templates import whole_text
from phi3v.errors import ImageError

BATCH = 256
"""Rows that are tokenised at once: enough to spread the cost of a call, little enough to need no memory."""


@dataclass(frozen=True, slots=True)
class RowLength:
    """The tokens of one row.

    Example: a square photo at 16 crops with a question and an answer of 30 tokens in all, 12 of them trained, is
        RowLength(image=2509, text=30, trained=12, sizes=((640, 640),)), and its total is 2539.

    Attributes:
        image: image tokens.
        text: all other tokens, control tokens included.
        trained: tokens that have a label.
        sizes: width and height of each upright image.
    """

    image: int
    text: int
    trained: int
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def total(self) -> int:
        """Tokens of the whole row."""
        return self.image + self.text


def row_lengths(
    rows: Iterable[Row],
    processor: Any,
    *,
    train_on: TrainOn | None = "last_assistant",
    max_pixels: int = MAX_PIXELS,
) -> Iterator[RowLength | RowProblem]:
    """The length of every row, in order.

    Args:
        rows: conversations that end with the assistant.
        processor: a Phi3VProcessor; its number of crops sets the price of an image.
        train_on: which turns are trained; None for questions, which need no answer and are as long as one that says
            nothing.
        max_pixels: larger images are refused.
    Yields: for a row that `encode` accepts, its exact lengths; else a RowProblem with `image_unreadable`,
        `image_narrow` (no crops for such a thin image), `image_places` (the turns do not place the images in order) or
        `no_answer` (the last turn is not the assistant's), `value_type` (text that no tokenizer reads).
    """
    waiting = iter(rows)
    while group := list(islice(waiting, BATCH)):
        looked = [_look(row, processor, max_pixels, answered=train_on is not None) for row in group]
        sound = [(row, found) for row, found in zip(group, looked, strict=True) if not isinstance(found, RowProblem)]
        texts = iter(token_ids([row for row, _ in sound], processor))
        for row, found in zip(group, looked, strict=True):
            if isinstance(found, RowProblem):
                yield found
            else:
                untrained = untrained_answers(row.messages)
                yield _length(next(texts), *found, processor, train_on, untrained)


def token_ids(rows: Sequence[Row], processor: Any) -> list[list[int]]:
    """The token ids of rows as `encode` makes them, each image as one image token.

    Example: the ids 1, 32010, ..., 32044 x 757, 1, ... of a row with one image have a single 32044 here.
    """
    if not rows:
        return []
    prompts = processor.apply_chat_template([[as_chat(message, None) for message in row.messages] for row in rows])
    tokenizer, backend = processor.tokenizer, processor.tokenizer.backend_tokenizer
    image = processor.image_token + tokenizer.bos_token  # the processor puts <s> behind the tokens of an image
    texts = processor.get_text_with_replacements(prompts, [image] * sum(len(row.images) for row in rows))[0]
    backend.no_truncation()  # the tokenizer sets both anew at each call of its own
    backend.no_padding()
    encoded = backend.encode_batch_fast(texts, add_special_tokens=not texts[0].startswith(tokenizer.bos_token))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return [[*encoding.ids, end] for encoding in encoded]


def _look(
    row: Row, processor: Any, max_pixels: int, *, answered: bool
) -> tuple[tuple[tuple[int, int], ...], list[int]] | RowProblem:
    """Sizes and prices of a row's images, from their headers; what is wrong with the row otherwise."""
    if answered and (not row.messages or row.messages[-1].role != "assistant"):
        return RowProblem(
            row.index, "no_answer", "the last turn is no answer, so there is nothing to train", row.source
        )
    places = [part.index for message in row.messages for part in message.parts if isinstance(part, ImagePart)]
    if places != list(range(len(row.images))):
        wrong = (
            f"its messages place the images {places}, but there are {len(row.images)} images: place each once, in order"
        )
        return RowProblem(row.index, "image_places", wrong, row.source)
    try:
        for message in row.messages:
            whole_text(message.text)
    except TypeError as error:
        return RowProblem(row.index, "value_type", str(error), row.source)
    try:
        sizes = tuple(image_size(image, max_pixels=max_pixels) for image in row.images)
    except ImageError as error:
        return RowProblem(row.index, "image_unreadable", str(error), row.source)
    try:
        prices = [processor.calc_num_image_tokens_from_image_size(*size) for size in sizes]
    except ImageError as error:
        return RowProblem(row.index, "image_narrow", str(error), row.source)
    return sizes, prices


def _length(
    ids: list[int],
    sizes: tuple[tuple[int, int], ...],
    prices: list[int],
    processor: Any,
    train_on: TrainOn | None,
    untrained: Sequence[int],
) -> RowLength:
    """The lengths of a row from its ids with one token an image.

    Example, 9 = image token, 6 = assistant, 7 = end: ids [1, 5, 9, 1, 20, 7, 6, 40, 7, 0] with prices [757] give
    RowLength(image=757, text=9, trained=3).
    """
    convert = processor.tokenizer.convert_tokens_to_ids
    if train_on is None:
        return RowLength(sum(prices), len(ids) - len(prices), 0, sizes)
    labels = label_answers(
        ids,
        assistant_id=convert("<|assistant|>"),
        end_id=convert("<|end|>"),
        train_on=train_on,
        untrained=untrained,
    )
    trained = len(labels) - labels.count(IGNORED)
    if prices and processor.image_token_id in labels:  # a picture in a turn of the assistant
        places = [place for place, token in enumerate(ids) if token == processor.image_token_id]
        trained += sum(price - 1 for place, price in zip(places, prices, strict=True) if labels[place] != IGNORED)
    return RowLength(sum(prices), len(ids) - len(prices), trained, sizes)
