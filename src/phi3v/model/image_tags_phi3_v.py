"""Which image belongs to which tag: prompts and the caller's images in, images in the order of the text out.

Pure bookkeeping: an image here is whatever the caller passed, it is never opened. Prompts and images count from 0 in
error messages, tags from 1 as in the text.
"""

from collections.abc import Sequence
from typing import Any, overload

from phi3v.errors import DataError

from .chat_phi3_v import GUARD, IMAGE_TAG


def match_images(texts: list[str], images: Any) -> list[Any]:
    """Images in the order of their tags in the prompts, row 0's first; an image whose tag is used twice appears twice.

    Example: `match_images(["<|image_2|> then <|image_1|>", "none", "<|image_1|>"], ["a", "b", "c"]) == ["b", "a",
    "c"]`, and the same for `[["a", "b"], [], ["c"]]`.

    Raises:
        DataError: A tag has no image, an image has no tag, or the images cannot be shared out.
    """
    matched = []
    written = [IMAGE_TAG.findall(text) for text in texts]
    numbers = [[_number(digits) for digits in tags] for tags in written]
    for index, (tags, own) in enumerate(zip(numbers, _share_out(images, numbers), strict=True)):
        for tag, digits in zip(tags, written[index], strict=True):
            if tag == 0:
                raise DataError(f"prompt {index} holds <|image_0|>: image tags count from 1")
            if tag > len(own):
                name = f"<|image_{digits if len(digits) < 40 else digits[:40] + '...'}|>"
                raise DataError(f"prompt {index} holds {name} without an image: {_count(len(own))} given for it")
        unused = sorted(set(range(1, len(own) + 1)) - set(tags))
        if unused:
            hint = "; an image in a chat is a part of the content, a tag in its text is text"
            raise DataError(
                f"prompt {index} has no tag <|image_{unused[0]}|> for its image: {_count(len(own))} given for it"
                f"{hint if GUARD in texts[index] else ''}"
            )
        matched += [own[tag - 1] for tag in tags]
    return matched


def _share_out(images: Any, numbers: list[list[int]]) -> list[list[Any]]:
    """Each prompt's images: nested lists as they are, a flat list by the highest tag of each prompt."""
    prompts = len(numbers)
    if images is None:
        return [[] for _ in range(prompts)]
    if not isinstance(images, list | tuple):
        # One image, or a stack of them: arrays and tensors [N, height, width, channels] are walked like a list.
        images = list(images) if getattr(images, "ndim", 0) > 3 else [images]
    if any(item is None or isinstance(item, list | tuple) for item in images):
        if len(images) != prompts:
            raise DataError(f"images has {len(images)} lists for {prompts} prompts: pass one list per prompt")
        return [[] if item is None else list(item) if isinstance(item, list | tuple) else [item] for item in images]
    if prompts == 1:
        return [list(images)]
    wanted = [max(tags, default=0) for tags in numbers]
    if sum(wanted) != len(images):
        raise DataError(
            f"{prompts} prompts have tags for {sum(wanted)} images, {_count(len(images))} given: pass a list per prompt"
        )
    starts = [sum(wanted[:index]) for index in range(prompts)]
    return [list(images[start : start + count]) for start, count in zip(starts, wanted, strict=True)]


def _number(digits: str) -> int:
    """Number in a tag; beyond nine digits any number is as wrong as another. `_number("01") == 1`."""
    return int(digits) if len(digits) < 10 else 10**9


def _count(images: int) -> str:
    return "1 image is" if images == 1 else f"{images} images are"


class ImageTags(Sequence[str]):
    """The tags `<|image_1|>`, `<|image_2|>`, ...: a sequence of a million, as in the original, made when asked for."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """`ImageTags()[0] == "<|image_1|>"`; a slice gives a list."""
        numbers = range(1, len(self) + 1)[index]
        return [f"<|image_{number}|>" for number in numbers] if isinstance(numbers, range) else f"<|image_{numbers}|>"

    def __len__(self) -> int:
        return 1_000_000
