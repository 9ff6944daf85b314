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
from contextlib import suppress
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
    least = _least_image_tokens(sizes, num_crops)
    if on_too_long == "fewer_crops":
        return _fewer_crops(whole, sizes, count, max_length)
    if on_too_long == "cut_text":
        return _cut_text(whole, count, max_length, least)
    crops, text = least + whole.text_tokens <= max_length, count(_bare(messages))
    cut = whole.image_tokens + count(cut_front(*_most_cut(messages))) <= max_length
    ways = ["lower image.num_crops"] * crops + ["shorten the text"] * (whole.image_tokens + text <= max_length)
    if policies := ["fewer_crops"] * crops + ["cut_text"] * cut:
        ways.insert(0, f"set data.on_too_long to {' or '.join(policies)}")
    elif not ways and least + text <= max_length:
        ways = ["lower image.num_crops and shorten the text"]
    raise _too_long(whole, max_length, ways)


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


def _fewer_crops(whole: Fitted, sizes: Sequence[tuple[int, int]], count: Counter, max_length: int) -> Fitted:
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
    cut = whole.image_tokens + count(cut_front(*_most_cut(whole.messages)))
    ways = ["set data.on_too_long to cut_text"] * (cut <= max_length)
    ways += ["shorten the text"] * (fewer.image_tokens + count(_bare(whole.messages)) <= max_length)
    raise _too_long(fewer, max_length, ways, crops)


def _cut_text(whole: Fitted, count: Counter, max_length: int, least: int) -> Fitted:
    """The row without old exchanges and without as little of the users' text as makes it fit.

    Args:
        whole: the row.
        count: counts tokens of messages.
        max_length: the limit.
        least: tokens of its images at the fewest crops, for the error.
    """

    def fitted(messages: Messages) -> Fitted:
        return replace(whole, messages=messages, text_tokens=count(messages))

    def fits(messages: Messages) -> bool:
        return fitted(messages).tokens <= max_length

    messages = without_old_exchanges(whole.messages, fits)
    if fits(messages):
        return fitted(messages)
    _, most = _most_cut(messages)
    shortest = fitted(cut_front(messages, most))
    if shortest.tokens > max_length:
        ways = ["set data.on_too_long to fewer_crops"] * (least + whole.text_tokens <= max_length)
        ways += ["lower image.num_crops"] * (least + shortest.text_tokens <= max_length)
        raise _too_long(shortest, max_length, ways, "even with all text cut that may be; ")
    low, high = 0, most  # `high` fits, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(cut_front(messages, middle)) else (middle, high)
    text = "".join(message.text for message in messages if message.role == "user")
    word = re.compile(r"\s\S").search(text, high - 1, high + _TO_NEXT_WORD)
    if word and word.start() < most and fits(cut_front(messages, word.start() + 1)):
        high = word.start() + 1
    return fitted(cut_front(messages, high))


def _most_cut(messages: Messages) -> tuple[Messages, int]:
    """The messages with which `cut_text` ends, and the characters of the users' text that it may cut from them."""
    messages = without_old_exchanges(messages, lambda _: False)
    text = "".join(message.text for message in messages if message.role == "user")
    question = next((message.text for message in reversed(messages) if message.role == "user"), "")
    return messages, max(len(text.rstrip()) - 1, 0) if question.strip() else len(text)


def _bare(messages: Messages) -> Messages:
    """The same turns and images with one character of each text: no text is shorter."""
    return tuple(
        replace(
            message,
            parts=tuple(TextPart(part.text[:1]) if isinstance(part, TextPart) else part for part in message.parts),
        )
        for message in messages
    )


def _image_tokens(sizes: Sequence[tuple[int, int]], num_crops: int) -> int:
    """Tokens of all images."""
    return sum(num_image_tokens(width, height, num_crops) for width, height in sizes)


def _least_image_tokens(sizes: Sequence[tuple[int, int]], num_crops: int) -> int:
    """Tokens of all images at the fewest crops that each of them can be cut into: of a square one 313."""
    for fewer in range(1, num_crops):
        with suppress(ImageError):  # a very narrow image
            return _image_tokens(sizes, fewer)
    return _image_tokens(sizes, num_crops)


def _too_long(row: Fitted, max_length: int, ways: Sequence[str], tried: str = "") -> TooLongError:
    """The error of a row, with its length at the best that could be done, and what would do; `way_out` reads it back.

    Example: ways ["shorten the text"] -> "330 tokens (313 for images), and the limit is 320: shorten the text, or raise
    data.max_length"; none -> "...: raise data.max_length".
    """
    way_out = ", ".join([*ways, "or raise data.max_length"]) if ways else "raise data.max_length"
    return TooLongError(
        f"{row.tokens} tokens ({row.image_tokens} for images), and the limit is {max_length}: {tried}{way_out}"
    )


def way_out(message: str) -> str:
    """What would make a row fit, from its error: "330 tokens ...: raise data.max_length" -> "raise data.max_length"."""
    return re.split("[:;] ", message)[-1]
