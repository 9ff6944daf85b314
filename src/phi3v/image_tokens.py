"""How Phi-3-V cuts an image into crops and how many tokens that costs: plain arithmetic, no torch, no pixels.

In: a width and height in pixels and `num_crops`, the most crops an image may be cut into (16 for Phi-3-vision, 4 for
Phi-3.5-vision). Out: the resized size, the grid of crops, the canvas in pixels, the number of image tokens. The image
processor makes pixels of exactly these sizes; planning code can ask here without opening an image.

The picture, 1000 x 300 with 16 crops: the longer side becomes 6 crops of 336 pixels, the shorter one 604 pixels, padded
with white to 2 crops; 6 x 2 = 12 crops plus one view of the whole canvas go through the vision tower.

    +-----+-----+-----+-----+-----+-----+   336 px
    |  0  |  1  |  2  |  3  |  4  |  5  |
    +-----+-----+-----+-----+-----+-----+   canvas 2016 x 672
    |  6  |  7  |  8  |  9  | 10  | 11  |
    +-----+-----+-----+-----+-----+-----+
"""

import math

from phi3v.errors import ImageError

CROP_SIZE = 336
"""Side of a crop in pixels: the input size of the CLIP tower."""

GRID_SIDE = 12
"""Feature rows (and columns) of one crop: 336 / 14 pixels per patch, then 2 x 2 patches merged."""


def resized_size(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """Size the image is resized to before padding, as (longer side, shorter side) in pixels.

    The longer side is a multiple of 336: the largest that leaves longer x shorter crops within `num_crops`. The count
    stops at the first multiple that does not fit. Orientation plays no part.

    Example: `resized_size(1000, 300, 16) == (2016, 604)`, `resized_size(300, 1000, 16) == (2016, 604)`.

    Raises:
        ImageError: A side or `num_crops` is below 1, or the image is so narrow that its shorter side would vanish.
    """
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels cannot be used: both sides must be at least 1")
    if num_crops < 1:
        raise ImageError(f"num_crops must be at least 1, not {num_crops}")
    ratio = max(width, height) / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    longer = scale * CROP_SIZE
    shorter = int(longer / ratio)
    if shorter == 0:
        raise ImageError(
            f"an image of {width}x{height} pixels is too narrow: at num_crops={num_crops} it would be resized to "
            f"{longer}x0 pixels; crop it to an aspect ratio of at most {longer}:1 or raise num_crops"
        )
    return longer, shorter


def crop_grid(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """Rows and columns of crops an image of this size is cut into.

    Example: `crop_grid(1000, 300, 16) == (2, 6)`, `crop_grid(300, 1000, 16) == (6, 2)`, `crop_grid(5, 7, 1) == (1, 1)`.

    Raises:
        ImageError: As `resized_size`.
    """
    longer, shorter = resized_size(width, height, num_crops)
    along, across = longer // CROP_SIZE, math.ceil(shorter / CROP_SIZE)
    return (along, across) if width < height else (across, along)


def canvas_size(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """Height and width in pixels of the padded canvas: what the model calls `image_sizes`.

    Example: `canvas_size(1000, 300, 16) == (672, 2016)`.

    Raises:
        ImageError: As `resized_size`.
    """
    rows, columns = crop_grid(width, height, num_crops)
    return rows * CROP_SIZE, columns * CROP_SIZE


def grid_tokens(rows: int, columns: int) -> int:
    """Image tokens of a grid of crops: the crops' features, the whole view's, a newline per feature row, a separator.

    Example: 4 x 4 crops give 48 rows of 48 features and a newline, a separator, and 12 rows of 12 features and a
    newline: `grid_tokens(4, 4) == 48 * 49 + 1 + 12 * 13 == 2509`. Rows cost more than columns:
    `grid_tokens(2, 6) == 1909`, `grid_tokens(6, 2) == 1957`.
    """
    sub_image = rows * GRID_SIDE * (columns * GRID_SIDE + 1)
    whole_view = GRID_SIDE * (GRID_SIDE + 1)
    return sub_image + 1 + whole_view


def num_image_tokens(width: int, height: int, num_crops: int) -> int:
    """Number of image tokens Phi-3-V spends on an image of this size.

    Example: `num_image_tokens(336, 336, 16) == 2509`, `num_image_tokens(336, 336, 4) == 757`, and 313 for any image at
    `num_crops=1`.

    Raises:
        ImageError: As `resized_size`.
    """
    return grid_tokens(*crop_grid(width, height, num_crops))


def most_image_tokens(num_crops: int) -> int:
    """What the dearest image costs at `num_crops`: a portrait so narrow that its crops are one column.

    Example: 313 at 1 crop, 781 at 4 (a square image costs 757), 2653 at 16 (a square image costs 2509).
    """
    return grid_tokens(num_crops, 1)


def crops_within(max_tokens: int) -> int:
    """The largest `num_crops` at which no image costs more than `max_tokens`; 0 when one crop is too many already.

    Example: `crops_within(781) == 4`, `crops_within(780) == 3`, `crops_within(312) == 0`.
    """
    num_crops = 0
    while most_image_tokens(num_crops + 1) <= max_tokens:
        num_crops += 1
    return num_crops


def crops_allowed(num_crops: int | None, max_tokens: int | None) -> int | None:
    """The most crops of an image that a recipe allows, by number, by budget or by the smaller of both; None where it
    gives neither, and the model's own number counts.

    Example: `crops_allowed(None, 2653) == 16`, `crops_allowed(4, 2653) == 4`, `crops_allowed(16, 781) == 4`.
    """
    allowed = [
        crops for crops in (num_crops, None if max_tokens is None else crops_within(max_tokens)) if crops is not None
    ]
    return min(allowed, default=None)
