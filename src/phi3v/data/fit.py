"""What is done about a row that is too long: nothing, coarser images, or a shorter question; never half an image.

In come messages, image sizes and a function that counts the tokens of messages; out come the messages and the number of
crops with which the row fits, or `TooLongError`. It works from counts alone, so it serves planning, which has only
headers, and encoding alike. Knows no tokenizer, no pixels, no files.

| on_too_long | what is done | what is never touched |
|---|---|---|
| `skip` | nothing: the row is a problem | everything |
| `fewer_crops` | the row's images are cut into fewer crops: the most with which it fits, at least 1 | the text |
| `cut_text` | old exchanges go, then the front of the users' text | system, images, the last answer |
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from phi3v.data.schema import ImagePart, Message, TextPart
from phi3v.errors import ImageError, TooLongError
from phi3v.image_tokens import num_image_tokens

OnTooLong = Literal["skip", "fewer_crops", "cut_text"]
Messages = tuple[Message, ...]
Counter = Callable[[Messages], int]
"""Tokens of a whole row without its image tokens: text, control tokens, the `<s>` behind each image, end of text."""

_TO_NEXT_WORD = 40
"""Characters that are cut in addition so that the text begins with a whole word, where one begins within them."""


@dataclass(frozen=True)
class Fitted:
    """A row that fits.

    Attributes:
        messages: the conversation, cut where that was needed and allowed.
        num_crops: crops that its images are cut into at most.
        text_tokens: what the counter says of `messages`.
        image_tokens: tokens of all its images at `num_crops`.
    """

    messages: Messages
    num_crops: int
    text_tokens: int
    image_tokens: int

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return self.text_tokens + self.image_tokens


def fit(
    messages: Messages,
    sizes: Sequence[tuple[int, int]],
    *,
    count: Counter,
    num_crops: int,
    max_length: int | None,
    on_too_long: OnTooLong = "skip",
) -> Fitted:
    """The row as it can be trained within `max_length` tokens.

    Args:
        messages: the conversation, its last turn the answer.
        sizes: width and height of each image, upright.
        count: counts the tokens of messages, image tokens aside; called again for cut messages only.
        num_crops: crops of an image at most.
        max_length: the limit in tokens, images included; None for none.
        on_too_long: see the table above.
    Example: 100 tokens of text and a square image at 16 crops are 2,609 tokens. With max_length=2000 "fewer_crops"
        takes 15 crops, at which a square image is cut into 9 and the row has 1,589 tokens.
    Raises:
        TooLongError: it does not fit. ImageError: an image is too narrow for any crop.
    """
    whole = Fitted(messages, num_crops, count(messages), _image_tokens(sizes, num_crops))
    if max_length is None or whole.tokens <= max_length:
        return whole
    if on_too_long == "fewer_crops":
        return _fewer_crops(whole, sizes, max_length)
    if on_too_long == "cut_text":
        return _cut_text(whole, count, max_length)
    raise _too_long(whole, max_length, f"{_lower_crops(whole)}shorten the text, or raise data.max_length")


def without_old_exchanges(messages: Messages, fits: Callable[[Messages], bool]) -> Messages:
    """Messages without whole exchanges, the oldest first, as few as make the row fit.

    An exchange is a user's turn with the turns that follow it up to the next user's. Turns of the system, exchanges
    with an image and the last exchange stay; when all others are gone the row may still be too long.

    Example: system, user 1, answer 1, user 2 with an image, answer 2, user 3, answer 3, user 4, answer 4: first user 1
    and answer 1 go, then user 3 and answer 3.
    """
    starts = [place for place, message in enumerate(messages) if message.role == "user"]
    kept = list(range(len(messages)))
    for start, end in zip([0, *starts], [*starts, len(messages)], strict=True):
        turns = [place for place in range(start, end) if messages[place].role != "system"]
        has_image = any(isinstance(part, ImagePart) for place in turns for part in messages[place].parts)
        if end == len(messages) or fits(tuple(messages[place] for place in kept)):
            break
        if not has_image:
            kept = [place for place in kept if place not in turns]
    return tuple(messages[place] for place in kept)


def cut_front(messages: Messages, characters: int) -> Messages:
    """Messages without the first so many characters of the users' text, counted over all users' turns in order.

    Example: a user's turn of "Look: ", an image and "what is it?" with 11 characters cut is the image and "is it?".
    """
    cut: list[Message] = []
    for message in messages:
        if message.role != "user":
            cut.append(message)
            continue
        parts: list[TextPart | ImagePart] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                taken = min(characters, len(part.text))
                characters -= taken
                part = TextPart(part.text[taken:])
            if isinstance(part, ImagePart) or part.text:
                parts.append(part)
        cut.append(replace(message, parts=tuple(parts)))
    return tuple(cut)


def _fewer_crops(whole: Fitted, sizes: Sequence[tuple[int, int]], max_length: int) -> Fitted:
    """The row with the largest number of crops at which it fits."""
    fewer = whole
    for num_crops in range(whole.num_crops - 1, 0, -1):
        try:
            fewer = replace(whole, num_crops=num_crops, image_tokens=_image_tokens(sizes, num_crops))
        except ImageError:  # with fewer crops a very narrow image loses its shorter side
            break
        if fewer.tokens <= max_length:
            return fewer
    crops = f"even at {fewer.num_crops} crop{'s' * (fewer.num_crops > 1)} an image; " if sizes else ""
    raise _too_long(fewer, max_length, f"{crops}shorten the text, or raise data.max_length")


def _cut_text(whole: Fitted, count: Counter, max_length: int) -> Fitted:
    """The row without old exchanges and without as little of the users' text as makes it fit."""

    def fitted(messages: Messages) -> Fitted:
        return replace(whole, messages=messages, text_tokens=count(messages))

    def fits(messages: Messages) -> bool:
        return fitted(messages).tokens <= max_length

    messages = without_old_exchanges(whole.messages, fits)
    if fits(messages):
        return fitted(messages)
    text = "".join(message.text for message in messages if message.role == "user")
    question = next((message.text for message in reversed(messages) if message.role == "user"), "")
    most = len(text.rstrip()) - 1 if question.strip() else len(text)
    shortest = fitted(cut_front(messages, max(most, 0)))
    if shortest.tokens > max_length:
        way_out = f"{_lower_crops(whole)}or raise data.max_length" if _lower_crops(whole) else "raise data.max_length"
        raise _too_long(shortest, max_length, f"even with all text cut that may be; {way_out}")
    low, high = 0, most  # `high` fits, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(cut_front(messages, middle)) else (middle, high)
    word = re.compile(r"\s\S").search(text, high - 1, high + _TO_NEXT_WORD)
    if word and word.start() < most and fits(cut_front(messages, word.start() + 1)):
        high = word.start() + 1
    return fitted(cut_front(messages, high))


def _image_tokens(sizes: Sequence[tuple[int, int]], num_crops: int) -> int:
    """Tokens of all images."""
    return sum(num_image_tokens(width, height, num_crops) for width, height in sizes)


def _lower_crops(row: Fitted) -> str:
    """A way out, where there is room for it: of a row without images, or at one crop, there is none."""
    return "lower image.num_crops, " if row.image_tokens and row.num_crops > 1 else ""


def _too_long(row: Fitted, max_length: int, way_out: str) -> TooLongError:
    """The error of a row, with its length at the best that could be done."""
    return TooLongError(
        f"{row.tokens} tokens ({row.image_tokens} for images), and the limit is {max_length}: {way_out}"
    )
