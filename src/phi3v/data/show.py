"""Rows as the model sees them: each token with its role and whether it is trained, each image with its crops.

In come rows and a processor; out come plain values and PIL images, taken from the very sample that `encode` makes.
What is drawn of them, and where, is not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from phi3v.data.augment import Change
from phi3v.data.encode import IGNORED, encode
from phi3v.data.images import MAX_PIXELS, image_name, open_image
from phi3v.data.schema import Row
from phi3v.errors import DataError
from phi3v.image_tokens import CROP_SIZE, grid_tokens

TokenRole = Literal["system", "user", "assistant", "control", "image"]


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token, or the tokens of one image.

    Attributes:
        id: its number in the vocabulary.
        text: the piece of text that it stands for, a space at its front kept; of a byte "<0x0A>", of a control token
            its name, of an image "[757 image tokens]".
        role: whose turn it is in; control for what the template adds, image for image tokens.
        trained: whether the loss counts it.
        count: 1, or the number of tokens of an image.
    """

    id: int
    text: str
    role: TokenRole
    trained: bool
    count: int = 1


@dataclass(frozen=True)
class ShownImage:
    """One image of a row.

    Attributes:
        name: what errors call it.
        width: of the upright image, in pixels.
        height: likewise.
        photo: as a person sees it.
        canvas: all crops side by side, as the model sees them, padding included.
        rows: crops from top to bottom.
        columns: crops from left to right.
        whole: the view of the whole, as the model sees it.
        tokens: what it costs.
        changed: whether crops and view are of the image as training changes it (`image.augment`); the photo never is.
    """

    name: str
    width: int
    height: int
    photo: Image.Image
    canvas: Image.Image
    rows: int
    columns: int
    whole: Image.Image
    tokens: int
    changed: bool = False


@dataclass(frozen=True)
class ShownRow:
    """One row. `problem` is the reason why it cannot be encoded; then there are no tokens and images."""

    source: str
    row: int
    tokens: list[ShownToken]
    images: list[ShownImage]
    problem: str | None = None

    def count(self, *, trained: bool = False, role: str | None = None) -> int:
        """Tokens of the row: all, those that are trained, those of a role."""
        chosen = [token for token in self.tokens if (token.trained or not trained) and role in (None, token.role)]
        return sum(token.count for token in chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without pictures."""
        return {
            "source": self.source,
            "row": self.row,
            "problem": self.problem,
            "length": {
                "total": self.count(),
                "image": self.count(role="image"),
                "trained": self.count(trained=True),
            },
            "tokens": [
                {"id": t.id, "text": t.text, "role": t.role, "trained": t.trained, "count": t.count}
                for t in self.tokens
            ],
            "images": [
                {
                    "name": image.name,
                    "width": image.width,
                    "height": image.height,
                    "crops": [image.rows, image.columns],
                    "tokens": image.tokens,
                }
                for image in self.images
            ],
        }


def show_row(
    row: Row, processor: Any, *, max_pixels: int = MAX_PIXELS, change: Change | None = None, **options: Any
) -> ShownRow:
    """A row as the model sees it; one that cannot be encoded is shown with the reason.

    Args:
        row: the row.
        processor: a Phi3VProcessor.
        max_pixels: larger images are refused.
        change: what training does to its images, see `encode`.
        options: the other options of `encode`.
    """
    try:
        sample = encode(row, processor, max_pixels=max_pixels, change=change, **options)
        photos = [open_image(image, max_pixels=max_pixels) for image in row.images]
    except DataError as error:
        return ShownRow(row.source, row.index, [], [], str(error))
    trained = [label != IGNORED for label in sample["labels"].tolist()]
    images = [replace(image, changed=change is not None) for image in shown_images(row, photos, sample, processor)]
    tokens = shown_tokens(sample["input_ids"].tolist(), trained, [image.tokens for image in images], processor)
    return ShownRow(row.source, row.index, tokens, images)


def shown_images(
    row: Row, photos: Sequence[Image.Image], encoded: Mapping[str, Any], processor: Any
) -> list[ShownImage]:
    """The images of a row as the model sees them.

    Args:
        row: names the images.
        photos: the same, opened.
        encoded: what `encode` or `encode_prompt` made of the row.
        processor: the Phi3VProcessor that did.
    """
    sizes = encoded["image_sizes"].tolist() if photos else []
    images = []
    for number, (photo, (height, width)) in enumerate(zip(photos, sizes, strict=True)):
        grid = height // CROP_SIZE, width // CROP_SIZE
        whole, *crops = unnormalise(encoded["pixel_values"][number].numpy(), processor.image_processor)
        name = image_name(row.images[number])
        canvas = join_crops(crops, *grid)
        images.append(ShownImage(name, *photo.size, photo, canvas, *grid, whole, grid_tokens(*grid)))
    return images


def shown_tokens(ids: Sequence[int], trained: Sequence[bool], costs: Sequence[int], processor: Any) -> list[ShownToken]:
    """Ids with their texts and roles, the tokens of each image folded into one.

    Example, a question about one image and its answer: `<s>` control, `<|user|>` control, "▁" user, ...,
    "[757 image tokens]" image, `<s>` control, ..., `<|assistant|>` control, "▁Hi" assistant and trained, ...
    """
    tokenizer = processor.tokenizer
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if not added.normalized}
    turns = {tokenizer.convert_tokens_to_ids(f"<|{role}|>"): role for role in ("system", "user", "assistant")}
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    shown: list[ShownToken] = []
    role: TokenRole = "control"
    waiting, place = iter(costs), 0
    while place < len(ids):
        token, is_trained = ids[place], trained[place]
        if token == processor.image_token_id:
            count = next(waiting)
            shown.append(ShownToken(token, f"[{count} image tokens]", "image", is_trained, count))
            place += count
            continue
        role = turns.get(token, role)  # type: ignore[assignment]
        text = tokenizer.convert_ids_to_tokens(token)
        if token in control:
            shown.append(ShownToken(token, text, "control", is_trained))
        else:
            shown.append(ShownToken(token, text.replace("▁", " "), role, is_trained))
        if token == end:
            role = "control"
        place += 1
    return shown


def unnormalise(pixels_N3HW: np.ndarray, image_processor: Any) -> list[Image.Image]:
    """The images that a processor made floats of: 0 is black and 1 is white once mean and deviation are taken back."""
    mean, deviation = (
        np.asarray(values, dtype=np.float32).reshape(1, 3, 1, 1)
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    grey_NHW3 = (pixels_N3HW * deviation + mean).clip(0, 1).transpose(0, 2, 3, 1) * 255
    return [Image.fromarray(picture.round().astype(np.uint8)) for picture in grey_NHW3]


def join_crops(crops: Sequence[Image.Image], rows: int, columns: int) -> Image.Image:
    """Crops, row by row from the top left, as the canvas that they were cut from; what follows them is padding."""
    canvas = Image.new("RGB", (columns * CROP_SIZE, rows * CROP_SIZE))
    for number in range(rows * columns):
        canvas.paste(crops[number], (number % columns * CROP_SIZE, number // columns * CROP_SIZE))
    return canvas


def spaced(count: int, wanted: int) -> list[int]:
    """Positions spread evenly over a set, so that nobody picked the good ones: spaced(10, 3) -> [0, 3, 6]."""
    shown = min(count, wanted)
    return [number * count // shown for number in range(shown)]
