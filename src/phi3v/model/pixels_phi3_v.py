"""The pixels of one image: resized onto a white canvas, cut into crops, and seen as a whole.

In: RGB images and sizes of `image_tokens`. Out: uint8 canvases and float crops, the same as the original code's: the
crops to the last bit, the view of the whole within 1e-6. Two ways to resize: PIL's, which is the original's, and
torch's on uint8, which is faster and one grey level off at most. White noise alone goes further: one value in a million
is two levels off. The view of the whole weighs 16 pixels, with 1.89 in sum of amounts: of white noise one value in ten
thousand is more than one level off (1.4 was the most), of photographs one in 300,000 at most. Knows no files, no
settings, no tokens.

Everything is done plane by plane (channel, height, width): so each crop is made in one pass from bytes that lie side by
side, and no float image of the whole canvas is ever made.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from phi3v.image_tokens import CROP_SIZE, crop_grid, resized_size


def draw_canvas(image: Image.Image | np.ndarray, num_crops: int, fast: bool = False) -> np.ndarray:
    """Resizes an RGB image and centres it on white: uint8 [canvas height, canvas width, 3], both multiples of 336.

    Example: 1000 x 300 pixels at 16 crops are resized to 2016 x 604 and drawn at rows 34..637 of a [672, 2016, 3]
    canvas; of an odd number of white rows the bottom (for portrait images the right side) gets one more.

    Args:
        image: PIL's, mode RGB, or an array uint8 [height, width, 3].
        num_crops: the most crops it is cut into.
        fast: resize with torch instead of PIL.
    Returns: the canvas, in memory plane by plane.
    """
    width, height = image_size(image)
    longer, shorter = resized_size(width, height, num_crops)
    rows, columns = crop_grid(width, height, num_crops)
    canvas_CHW = np.full((3, rows * CROP_SIZE, columns * CROP_SIZE), 255, dtype=np.uint8)
    new_width, new_height = (shorter, longer) if width < height else (longer, shorter)
    left, top = (canvas_CHW.shape[2] - new_width) // 2, (canvas_CHW.shape[1] - new_height) // 2
    drawn_CHW = canvas_CHW[:, top : top + new_height, left : left + new_width]
    if fast:
        pixels_HWC = torch.from_numpy(np.require(image, np.uint8, ["C", "W"]))  # turned arrays are copied
        # In this order: by the batch's stride, too, torch tells that channels lie side by side; that saves two thirds.
        resized = pixels_HWC[None].permute(0, 3, 1, 2)
        if width < height:  # torch filters along the width first, too; the reason is given below
            resized = interpolate(resized, size=(new_height, width), mode="bilinear", antialias=True)
        resized = interpolate(resized, size=(new_height, new_width), mode="bilinear", antialias=True)
        drawn_CHW[:] = resized[0].numpy()
        return canvas_CHW.transpose(1, 2, 0)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if width < height:
        # The original transposes portrait images before and after. PIL filters along the width first and rounds to 8
        # bits in between, so filtering along the height first gives the same bytes without moving the image around.
        image = image.resize((width, new_height), Image.Resampling.BILINEAR)
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    for plane_HW, channel in zip(drawn_CHW, image.split(), strict=True):
        plane_HW[:] = np.asarray(channel)
    return canvas_CHW.transpose(1, 2, 0)


def fill_crops(crops_KCHW: torch.Tensor, canvas_CHW: np.ndarray, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Writes the view of the whole canvas into the first crop and the canvas's tiles, row by row, into the next ones.

    Example: a canvas of 2 rows and 6 columns fills crops 0 to 12; crop 7 is the first tile of the second row.

    Args:
        crops_KCHW: float32 [at least 1 + tiles, 3, 336, 336]; those behind the tiles are left as they are.
        canvas_CHW: uint8 [3, rows * 336, columns * 336].
        mean: [3, 1, 1], subtracted from values 0..1.
        std: [3, 1, 1], divides them.
    """
    _fill_view(crops_KCHW[0], canvas_CHW, mean, std)
    for tile, tile_CHW in enumerate(_tiles(canvas_CHW)):
        crop_CHW = crops_KCHW[1 + tile].copy_(tile_CHW)
        # In this order and in place: the original's arithmetic, to the last bit, while the crop is in the cache.
        crop_CHW.div_(255).sub_(mean).div_(std)


def fill_bytes(
    view_CHW: torch.Tensor, crops_KCHW: torch.Tensor, canvas_CHW: np.ndarray, mean: torch.Tensor, std: torch.Tensor
) -> None:
    """As `fill_crops`, with the view of the whole normalised and the tiles as they are, in grey levels.

    Args:
        view_CHW: float32 [3, 336, 336].
        crops_KCHW: uint8 [tiles, 3, 336, 336].
        canvas_CHW: uint8 [3, rows * 336, columns * 336].
        mean: [3, 1, 1], of the view.
        std: [3, 1, 1], of the view.
    """
    _fill_view(view_CHW, canvas_CHW, mean, std)
    for tile, tile_CHW in enumerate(_tiles(canvas_CHW)):
        crops_KCHW[tile].copy_(tile_CHW)


def _fill_view(view_CHW: torch.Tensor, canvas_CHW: np.ndarray, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Writes the normalised view of the whole canvas."""
    view_CHW.copy_(torch.from_numpy(_whole_view(canvas_CHW))).div_(255).sub_(mean).div_(std)


def _tiles(canvas_CHW: np.ndarray) -> Iterator[torch.Tensor]:
    """The canvas's tiles, uint8 [3, 336, 336], row by row."""
    canvas = torch.from_numpy(canvas_CHW)
    columns = canvas.shape[2] // CROP_SIZE
    for tile in range(canvas.shape[1] // CROP_SIZE * columns):
        top, left = tile // columns * CROP_SIZE, tile % columns * CROP_SIZE
        yield canvas[:, top : top + CROP_SIZE, left : left + CROP_SIZE]


def image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height of an image or of an array [height, width, 3]."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _whole_view(canvas_CHW: np.ndarray) -> np.ndarray:
    """The canvas at 336 x 336, float32 [3, 336, 336] in grey levels: torch's bicubic, which takes 4 x 4 pixels a point.

    The canvas's sides are whole multiples of 336, so every point lies at the same place between its pixels and the
    weights are multiples of 1/32. Sums of grey levels are exact so, and normalising afterwards, which is the same as
    normalising before, costs a tenth.
    """
    rows, columns = canvas_CHW.shape[1] // CROP_SIZE, canvas_CHW.shape[2] // CROP_SIZE
    axes = [(2, columns), (1, rows)] if columns % 2 else [(1, rows), (2, columns)]  # what only picks pixels goes first
    view, scale = canvas_CHW, 1
    for axis, factor in axes:
        view = _shrink(view, axis, factor)
        scale *= 1 if factor % 2 else 32
    return view.astype(np.float32) / np.float32(scale)


def _shrink(values: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Every `factor` values along an axis as one, by torch's bicubic (a = -0.75); times 32 when the factor is even.

    Example: factor 3 takes the middle one: [1, 2, 3, 4, 5, 6] -> [2, 5]. Factor 4 lies between the second and the
    third of its four, 19 * (second + third) - 3 * (first + fourth): [10, 20, 30, 40] -> [800], which is 25 * 32. Factor
    2 does the same with one value of each neighbour; beyond the edge the edge goes on.
    """

    def every(start: int) -> np.ndarray:
        return values[(*[slice(None)] * axis, slice(start, None, factor))]

    if factor % 2:
        return every(factor // 2)
    if factor == 2:
        edges = np.clip(np.arange(-1, values.shape[axis] + 1), 0, values.shape[axis] - 1)
        values = np.take(values, edges, axis=axis)
        first, second, third, fourth = (every(start)[(*[slice(None)] * axis, slice(CROP_SIZE))] for start in range(4))
    else:
        first, second, third, fourth = (every(factor // 2 + place) for place in (-2, -1, 0, 1))
    kind = np.int16 if values.dtype == np.uint8 else np.int32  # 19 * 510 fits 16 bits; twice shrunk needs more
    inner = np.add(second, third, dtype=kind)
    inner *= 19
    outer = np.add(first, fourth, dtype=kind)
    outer *= 3
    inner -= outer
    return inner
