"""Digits drawn by hand: three faces that need no font file.

What comes in is text made of the ten digits and a pixel height; what goes out is a grey mask (0 = paper, 255 = ink)
that the callers colour. This module knows nothing about scenes, products or captions, and takes its randomness from
the caller.

Faces: `bitmap` (5x7 dots), `segment` (seven bars) and `stroke` (pen lines, which may be jittered to look hand written).
"""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

FACES = ("bitmap", "segment", "stroke")
CELL = 28  # pixels per digit on a plate: what one visual token covers in a crop of 336

Colour = tuple[int, int, int]

_BITMAPS = {  # seven rows of five dots, one string of 35 per digit
    "0": ".###.#...##..###.#.###..##...#.###.",
    "1": "..#...##....#....#....#....#...###.",
    "2": ".###.#...#....#...#...#...#...#####",
    "3": "####.....#....#.###.....#....#####.",
    "4": "...#...##..#.#.#..#.#####...#....#.",
    "5": "######....####.....#....##...#.###.",
    "6": ".###.#....#....####.#...##...#.###.",
    "7": "#####....#...#....#...#....#....#..",
    "8": ".###.#...##...#.###.#...##...#.###.",
    "9": ".###.#...##...#.####....#....#.###.",
}

_BARS = {  # a bar as (x0, y0, x1, y1) in a box one wide and two high
    "a": (0.0, 0.0, 1.0, 0.0),
    "b": (1.0, 0.0, 1.0, 1.0),
    "c": (1.0, 1.0, 1.0, 2.0),
    "d": (0.0, 2.0, 1.0, 2.0),
    "e": (0.0, 1.0, 0.0, 2.0),
    "f": (0.0, 0.0, 0.0, 1.0),
    "g": (0.0, 1.0, 1.0, 1.0),
}
_SEGMENTS = dict(zip("0123456789", "abcdef bc abged abgcd fgbc afgcd afgedc abc abcdefg abcdfg".split(), strict=True))

Point = tuple[float, float]


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> list[Point]:
    """Points on an ellipse from `start` to `stop` degrees (0 = right, 90 = down), about one every 20 degrees."""
    steps = max(2, int(abs(stop - start) / 20))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _stroke_variants() -> dict[str, list[list[list[Point]]]]:
    """Every way to write each digit: digit -> variants -> pen lines -> points in a unit box (y grows downwards)."""
    zero = [_arc(0.5, 0.5, 0.42, 0.5, -90, 270)]
    narrow = [_arc(0.5, 0.5, 0.3, 0.5, -90, 270)]
    two = [_arc(0.5, 0.28, 0.4, 0.28, -170, 30) + [(0.1, 1.0), (0.92, 1.0)]]
    round_two = [_arc(0.48, 0.26, 0.34, 0.26, -160, 60) + [(0.3, 0.78), (0.12, 0.98), (0.5, 0.93), (0.9, 1.0)]]
    three = [_arc(0.45, 0.26, 0.4, 0.26, -150, 90), _arc(0.45, 0.75, 0.43, 0.25, -90, 150)]
    flat_three = [[(0.1, 0.0), (0.85, 0.0), (0.45, 0.42)] + _arc(0.45, 0.7, 0.42, 0.3, -80, 150)]
    five = [[(0.88, 0.0), (0.2, 0.0), (0.15, 0.45)] + _arc(0.47, 0.69, 0.42, 0.31, -120, 140)]
    six = [[(0.75, 0.0), (0.35, 0.25), (0.1, 0.6)] + _arc(0.5, 0.7, 0.4, 0.3, 180, -180)]
    curled_six = [_arc(0.6, 0.4, 0.48, 0.4, -60, -180) + _arc(0.5, 0.7, 0.38, 0.3, 180, 540)]
    eight = [_arc(0.5, 0.25, 0.34, 0.25, 90, 450), _arc(0.5, 0.75, 0.42, 0.25, -90, 270)]
    slim_eight = [_arc(0.52, 0.24, 0.24, 0.24, 90, 450), _arc(0.48, 0.74, 0.28, 0.26, -90, 270)]
    nine = [_arc(0.48, 0.3, 0.38, 0.3, 0, -360) + [(0.86, 0.3), (0.8, 0.65), (0.6, 1.0)]]
    curled_nine = [_arc(0.46, 0.28, 0.36, 0.28, 0, -360) + _arc(0.4, 0.6, 0.46, 0.4, -20, 120)]
    return {
        "0": [zero, narrow],
        "1": [
            [[(0.5, 0.0), (0.5, 1.0)]],
            [[(0.2, 0.25), (0.55, 0.0), (0.55, 1.0)]],
            [[(0.25, 0.22), (0.55, 0.0), (0.55, 1.0)], [(0.2, 1.0), (0.88, 1.0)]],
        ],
        "2": [two, round_two],
        "3": [three, flat_three],
        "4": [
            [[(0.7, 1.0), (0.7, 0.0), (0.05, 0.68), (0.95, 0.68)]],
            [[(0.25, 0.0), (0.12, 0.55), (0.9, 0.55)], [(0.75, 0.05), (0.68, 1.0)]],
            [[(0.5, 0.0), (0.08, 0.62), (0.92, 0.62)], [(0.62, 0.35), (0.58, 1.0)]],
        ],
        "5": [five],
        "6": [six, curled_six],
        "7": [
            [[(0.08, 0.0), (0.9, 0.0), (0.4, 1.0)]],
            [[(0.08, 0.04), (0.9, 0.0), (0.4, 1.0)], [(0.25, 0.5), (0.85, 0.5)]],
        ],
        "8": [eight, slim_eight],
        "9": [nine, curled_nine],
    }


STROKES = _stroke_variants()


def _bitmap_mask(digit: str, height: int) -> Image.Image:
    dot = height / 7.0
    mask = Image.new("L", (max(1, round(5 * dot)), height), 0)
    draw = ImageDraw.Draw(mask)
    for i, cell in enumerate(_BITMAPS[digit]):
        if cell == "#":
            x, y = (i % 5) * dot, (i // 5) * dot
            draw.rectangle((round(x), round(y), round(x + dot) - 1, round(y + dot) - 1), fill=255)
    return mask


def _segment_mask(digit: str, height: int) -> Image.Image:
    width, pen = round(height * 0.62), max(2, round(height * 0.15))
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    sx, sy, half = width - pen, (height - pen) / 2, pen / 2
    for name in _SEGMENTS[digit]:
        x0, y0, x1, y1 = _BARS[name]
        box = (half + x0 * sx, half + y0 * sy, half + x1 * sx, half + y1 * sy)
        draw.rectangle((box[0] - half, box[1] - half, box[2] + half - 1, box[3] + half - 1), fill=255)
    return mask


def stroke_mask(
    digit: str, width: int, height: int, pen: int, rng: Random | None = None, wobble: float = 0.0
) -> Image.Image:
    """One digit in pen lines, filling a `width` x `height` grey mask.

    With `rng` a writing variant is drawn and every point moves by up to `wobble` of the box; without it the first
    variant is drawn exactly.
    """
    variants = STROKES[digit]
    lines = variants[0] if rng is None else rng.choice(variants)
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    half = pen / 2
    shear, bend = (rng.uniform(-wobble, wobble) * 2, rng.uniform(-wobble, wobble)) if rng else (0.0, 0.0)

    def place(point: Point) -> Point:
        x, y = point
        x = x + shear * (0.5 - y) + bend * math.sin(math.pi * y)
        if rng is not None:
            x, y = x + rng.uniform(-wobble, wobble) * 0.4, y + rng.uniform(-wobble, wobble) * 0.4
        x, y = min(1.0, max(0.0, x)), min(1.0, max(0.0, y))
        return half + x * (width - pen - 1), half + y * (height - pen - 1)

    for line in lines:
        points = [place(p) for p in line]
        draw.line(points, fill=255, width=pen, joint="curve")
        for x, y in points:
            draw.ellipse((x - half, y - half, x + half, y + half), fill=255)
    return mask


def digit_mask(digit: str, face: str, height: int) -> Image.Image:
    """A grey mask of one digit, `height` pixels high; the width follows from the face.

    Example: `digit_mask("1", "bitmap", 35).size == (25, 35)`.
    """
    if face == "bitmap":
        return _bitmap_mask(digit, height)
    if face == "segment":
        return _segment_mask(digit, height)
    return stroke_mask(digit, round(height * 0.66), height, max(2, round(height * 0.15)))


def number_mask(text: str, face: str, cell: int) -> Image.Image:
    """The digits of `text`, one in the middle of each square cell of `cell` pixels.

    Example: `number_mask("120", "bitmap", 28).size == (84, 28)`.
    """
    strip = Image.new("L", (cell * len(text), cell), 0)
    for i, digit in enumerate(text):
        mask = digit_mask(digit, face, cell - 3)
        strip.paste(mask, (i * cell + (cell - mask.width) // 2, 1))
    return strip


def paste_plate(
    image: Image.Image, text: str, face: str, corner: tuple[int, int], paper: Colour, ink: Colour, border: Colour | None
) -> None:
    """Draw a plate on `image` whose first digit's cell has its top left at `corner`.

    A cell is `CELL` pixels wide and high, the margin around the cells a third of that; `border` adds a frame of two
    pixels.
    """
    margin = CELL // 3
    x, y = corner
    frame = (x - margin, y - margin, x + CELL * len(text) + margin - 1, y + CELL + margin - 1)
    ImageDraw.Draw(image).rectangle(frame, fill=paper, outline=border, width=2 if border else 0)
    mask = number_mask(text, face, CELL)
    image.paste(Image.new("RGB", mask.size, ink), corner, mask)
