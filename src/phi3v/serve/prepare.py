"""From a request as the server hands it over to an encoded prompt, with a look at its costs before they are spent.

In come turns of texts and image numbers, and the bytes of the images; out comes an `Asked` for the model, or a
`Refusal`. Text is counted piece by piece and images by their headers, so that what is beyond the context costs no more
than finding out. Runs beside the model, in a thread of its own. Knows no pipes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi3v.data.encode import encode_prompt
from phi3v.data.images import image_size, open_image
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.errors import DataError, ImageError
from phi3v.model.chat_phi3_v import GUARD
from phi3v.serve.lanes import Asked
from phi3v.serve.limits import MAX_PIXELS
from phi3v.serve.protocol import Refusal
from phi3v.serve.served import Served

PIECE = 10_000
"""Characters that are tokenised at once while a text is counted."""
_ADDRESS_IN_MEMORY = re.compile(r"0x[0-9a-fA-F]{6,}|/[^\s:;,]*/[^\s:;,]*")


def prepare(
    asked: Mapping[str, Any], images: Sequence[bytes], served: Served, *, context: int, default_tokens: int
) -> Asked:
    """A request that is ready for the model.

    Args:
        asked: the server's message: id, turns, max_tokens, temperature, top_p, seed, stop.
        images: encoded files, numbered as the turns name them.
        served: what is asked.
        context: tokens of prompt and answer at most.
        default_tokens: of the answer, where the request does not say; less where the context has less left.

    Raises: Refusal with status 400.
    """
    processor = served.chat.processor
    row = _row(asked["turns"], images, served.chat.system)
    _check_texts(row, processor, context)
    _check_images(row, processor, context)
    images_processor = processor.image_processor
    try:
        example: dict[str, Any] = dict(
            encode_prompt(row, processor, max_pixels=MAX_PIXELS, byte_crops=images_processor.normalises_as_clip)
        )
    except ImageError as error:
        raise Refusal(400, "invalid_image", f"{_which(row.images)}{told(error)}") from error
    except DataError as error:
        raise Refusal(400, "invalid_request", told(error)) from error
    prompt = len(example["input_ids"])
    wanted = asked["max_tokens"]
    if prompt + (wanted or 1) > context:
        raise _too_long(f"{prompt} tokens of the prompt and {wanted or 1} of the answer are", context)
    example["row"] = row
    return Asked.of(asked, served, example, wanted or min(default_tokens, context - prompt))


def _row(turns: Sequence[Mapping[str, Any]], images: Sequence[bytes], system: str | None) -> Row:
    """The conversation as a row of data is one; the run's own system turn stands in front where none is given."""
    messages = [
        Message(
            turn["role"], tuple(ImagePart(part) if isinstance(part, int) else TextPart(part) for part in turn["parts"])
        )
        for turn in turns
    ]
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", (TextPart(system),)))
    return Row(tuple(messages), tuple(ImageRef(data=data) for data in images), {}, "request", 0)


def _check_texts(row: Row, processor: Any, context: int) -> None:
    """Refuses text beyond the context as soon as that is seen: a piece has at most one token more for being cut."""
    tokens = 0
    for message in row.messages:
        for start in range(0, len(message.text), PIECE):
            piece = message.text[start : start + PIECE].replace(GUARD, "\N{REPLACEMENT CHARACTER}")  # as it will be
            tokens += len(processor.tokenizer(piece, add_special_tokens=False)["input_ids"]) - 2
            if tokens > context:
                raise _too_long("the text alone is", context)


def _check_images(row: Row, processor: Any, context: int) -> None:
    """Refuses images that are none, too large, or too many for the context, by their headers."""
    tokens = 0
    for number, image in enumerate(row.images, start=1):
        try:
            tokens += processor.calc_num_image_tokens_from_image_size(*image_size(image, max_pixels=MAX_PIXELS))
        except ImageError as error:
            raise Refusal(400, "invalid_image", f"image {number}: {told(error)}") from error
        if tokens > context:
            raise _too_long(f"the {tokens} tokens of {number} images alone are", context)


def _which(images: Sequence[ImageRef]) -> str:
    """The first of several images that does not decode, as the beginning of a line: "image 2: "; "" where all do."""
    for number, image in enumerate(images, start=1):
        try:
            open_image(image, max_pixels=MAX_PIXELS).close()
        except ImageError:
            return f"image {number}: "
    return ""


def told(error: Exception) -> str:
    """An error as a client may see it: what is wrong, without our names for it, paths, addresses and ways out.

    Example: "request, row 0: image embedded image is not a readable JPEG; convert it" -> "it is not a readable JPEG".
    """
    line = str(error).removeprefix("request, row 0: ").partition(";")[0]
    line = line.replace("image embedded image", "it").partition(": at num_crops")[0]
    return _ADDRESS_IN_MEMORY.sub("...", line)[:300]


def _too_long(what: str, context: int) -> Refusal:
    return Refusal(400, "context_length_exceeded", f"{what} more than the {context} tokens of this server")
