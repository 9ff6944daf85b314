"""The images and pixel noise the golden vectors were made from, drawn again from their seeds.

Integer arithmetic on numpy's legacy generator, whose stream is frozen: the same bytes on every platform. The order of
the random draws is part of the definition. `processor.json` holds the sha256 of every image: a slip here fails loudly.
"""

import hashlib

import numpy as np
from PIL import Image

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4, "P": 3}
"""Planes that are drawn for an image of this mode; a palette image is an RGB one, quantised."""


def draw_image(spec: dict) -> Image.Image:
    """Image of `spec` (width, height, mode L, RGB, RGBA or P, seed): blocks, a ramp and rings, six rectangles."""
    width, height, mode = spec["width"], spec["height"], spec["mode"]
    random = np.random.RandomState(spec["seed"])
    planes = [_draw_plane(random, width, height) for _ in range(CHANNELS[mode])]
    for _ in range(6):
        left, top = random.randint(0, width), random.randint(0, height)
        right = left + 1 + random.randint(0, max(1, width // 3))
        bottom = top + 1 + random.randint(0, max(1, height // 3))
        for plane in planes:
            plane[top:bottom, left:right] = random.randint(0, 256)
    if mode == "L":
        return Image.fromarray(planes[0])
    stacked = Image.fromarray(np.stack(planes, axis=-1))
    return stacked.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) if mode == "P" else stacked


def _draw_plane(random: np.random.RandomState, width: int, height: int) -> np.ndarray:
    """One channel, uint8 [height, width]."""
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    slope_x, slope_y, spacing = random.randint(1, 7, 3)
    cell_width, cell_height = max(1, width // 9), max(1, height // 7)
    blocks = random.randint(0, 160, (height // cell_height + 1, width // cell_width + 1))
    ramp = x * slope_x * 64 // width + y * slope_y * 64 // height
    rings = ((x - width // 2) ** 2 + (y - height // 3) ** 2) // ((width + height) * spacing) % 40
    return ((blocks[y // cell_height, x // cell_width] + ramp + rings) % 256).astype(np.uint8)


def draw_pixels(seed: int, images: int, crops: int, used: list[int]) -> np.ndarray:
    """Noise in the form of pixel values, float32 [images, crops, 3, 336, 336].

    The whole view (slot 0) and the first `used[i]` crops of image i are filled, the padding crops after them are zero.
    """
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 225, (images, crops, 3, 28, 28)).astype(np.float32)
    fine = random.randint(0, 31, (images, crops, 3, 336, 336)).astype(np.float32)
    values = (coarse.repeat(12, axis=3).repeat(12, axis=4) + fine) / np.float32(255)
    pixels = (values - np.float32(0.5)) / np.float32(0.25)
    for index, count in enumerate(used):
        pixels[index, 1 + count :] = 0.0
    return pixels


def digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order, as the golden files record it."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def expand_runs(runs: list[list[int]]) -> list[int]:
    """Token ids from run lengths: `expand_runs([[1, 1], [-1, 3], [13, 2]]) == [1, -1, -1, -1, 13, 13]`."""
    return [token for token, count in runs for _ in range(count)]
