"""Silhouettes and surface patterns: the pixels that scenes and products are made of.

What comes in is geometry in a unit box, colours and a pixel size; what goes out is painted onto an RGB image. This
module has no words in it: what a shape or a pattern is called is decided by `scenes` (pretraining) and `catalogue`
(the demo's data), each with its own vocabulary.
"""

from __future__ import annotations

import colorsys
import math
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Outline = list[tuple[float, float]]

PATTERNS = ("flat", "rows", "columns", "slanted", "dots", "checks")


def regular(corners: int, turn: float = -90.0, inner: float | None = None) -> Outline:
    """A regular polygon in the unit box, or a star when `inner` (the inner radius as a share of the outer) is given.

    Example: `len(regular(5, inner=0.4)) == 10`; `regular(4)[0] == (0.5, 0.0)`.
    """
    count = corners * (2 if inner else 1)
    points = []
    for i in range(count):
        radius = 0.5 * (inner if inner and i % 2 else 1.0)
        angle = math.radians(turn + 360.0 * i / count)
        points.append((round(0.5 + radius * math.cos(angle), 6), round(0.5 + radius * math.sin(angle), 6)))
    return points


def round_outline(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> Outline:
    """Points of an ellipse, or of a part of it, in degrees (0 = right, 90 = down)."""
    steps = max(6, int(abs(stop - start) / 10))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float) -> Outline:
    """A rectangle from two corners.

    Example: `box(0, 0, 1, 1) == [(0, 0), (1, 0), (1, 1), (0, 1)]`.
    """
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def silhouette(filled: list[Outline], holes: list[Outline], width: int, height: int) -> Image.Image:
    """A grey mask (255 inside) of outlines given in a unit box; `holes` are cut out after everything is filled."""
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for outlines, value in ((filled, 255), (holes, 0)):
        for outline in outlines:
            draw.polygon([(x * (width - 1), y * (height - 1)) for x, y in outline], fill=value)
    return mask


def surface(pattern: str, main: Colour, second: Colour, width: int, height: int, period: int) -> Image.Image:
    """A rectangle covered with one of `PATTERNS`; `period` is the distance in pixels at which the pattern repeats."""
    image = Image.new("RGB", (width, height), main)
    draw = ImageDraw.Draw(image)
    half = period // 2
    if pattern == "rows":
        for y in range(0, height, period):
            draw.rectangle((0, y, width, y + half - 1), fill=second)
    elif pattern == "columns":
        for x in range(0, width, period):
            draw.rectangle((x, 0, x + half - 1, height), fill=second)
    elif pattern == "slanted":
        for x in range(-height, width, round(period * 1.4)):
            draw.line((x, height, x + height, 0), fill=second, width=half)
    elif pattern == "dots":
        radius = max(2, round(period * 0.3))
        for row, y in enumerate(range(half, height + period, period)):
            for x in range(half if row % 2 else 0, width + period, period):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    elif pattern == "checks":
        for row, y in enumerate(range(0, height, half)):
            for x in range(half * (row % 2), width, 2 * half):
                draw.rectangle((x, y, x + half - 1, y + half - 1), fill=second)
    return image


def vary(hue: float, saturation: float, value: float, rng: Random, amount: float = 1.0) -> Colour:
    """An RGB colour near the given one (hue in degrees, the others 0..1); `amount` scales how far it may stray."""
    h = (hue + rng.uniform(-7, 7) * amount) / 360.0
    s = min(1.0, max(0.0, saturation + rng.uniform(-0.08, 0.05) * amount * (1 if saturation else 0)))
    v = min(1.0, max(0.0, value + rng.uniform(-0.07, 0.07) * amount))
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return round(r * 255), round(g * 255), round(b * 255)


def contrasting(colour: Colour, rng: Random) -> Colour:
    """A near-white for a dark colour and a near-black for a light one: ink for paper."""
    light = _brightness(colour) < 150
    level = rng.randint(225, 255) if light else rng.randint(0, 45)
    return level, level, level


def tint(colour: Colour, rng: Random) -> Colour:
    """A second colour for a pattern: about half way to white for a dark colour, half way to black for a light one.

    The object keeps its colour, and its outline stays visible on the ground.
    """
    share, goal = rng.uniform(0.45, 0.6), (255 if _brightness(colour) < 130 else 0)
    red, green, blue = (round(c + (goal - c) * share) for c in colour)
    return red, green, blue


def _brightness(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def paint(
    image: Image.Image, mask: Image.Image, cover: Image.Image, corner: tuple[int, int], edge: Colour | None = None
) -> None:
    """Put `cover` on `image` at `corner` wherever `mask` is set, with an outline of two pixels in `edge` if given."""
    x, y = corner
    if edge is not None:
        line = Image.new("RGB", mask.size, edge)
        for dx, dy in ((-2, 0), (2, 0), (0, -2), (0, 2)):
            image.paste(line, (x + dx, y + dy), mask)
    image.paste(cover, corner, mask)
