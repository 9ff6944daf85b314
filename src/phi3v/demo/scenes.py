"""Random scenes with questions and answers: what the tiny model learns in the third part of its pretraining.

`scene(seed, index)` gives one 336 x 336 picture and a list of question and answer pairs about it; the same arguments
give the same scene on every machine. Four kinds: lines of numbers, a grid of objects, an object with number plates,
and one large digit.

Its words, its question templates and its numbers are kept apart from the demo's catalogue: a number whose remainder by
`RESERVED_MODULUS` is `RESERVED_REMAINDER` belongs to the catalogue's prices and is never drawn here (a test compares
both).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from phi3v.demo import glyphs, painting
from phi3v.demo.painting import box, regular, round_outline

SIDE = 336
RESERVED_MODULUS, RESERVED_REMAINDER = 7, 3

COLOURS = {  # word -> hue in degrees, saturation, value
    "red": (2, 0.88, 0.85),
    "orange": (28, 0.92, 0.97),
    "yellow": (54, 0.88, 0.95),
    "green": (118, 0.75, 0.62),
    "turquoise": (178, 0.75, 0.75),
    "blue": (222, 0.85, 0.8),
    "purple": (278, 0.7, 0.65),
    "pink": (328, 0.5, 0.97),
    "brown": (24, 0.72, 0.45),
    "grey": (0, 0.0, 0.52),
    "black": (0, 0.0, 0.08),
    "white": (0, 0.0, 0.97),
}

SURFACES = {  # word -> pattern of painting.PATTERNS
    "plain": "flat",
    "striped": "rows",
    "barred": "columns",
    "slanted": "slanted",
    "dotted": "dots",
    "chequered": "checks",
}

Outlines = tuple[list[painting.Outline], list[painting.Outline]]
SHAPES: dict[str, Outlines] = {  # word -> filled outlines, holes
    "circle": ([round_outline(0.5, 0.5, 0.5, 0.5)], []),
    "square": ([box(0.04, 0.04, 0.96, 0.96)], []),
    "triangle": ([[(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]], []),
    "star": ([regular(5, inner=0.42)], []),
    "cross": ([box(0.33, 0, 0.67, 1), box(0, 0.33, 1, 0.67)], []),
    "arrow": ([[(0.0, 0.32), (0.5, 0.32), (0.5, 0.05), (1.0, 0.5), (0.5, 0.95), (0.5, 0.68), (0.0, 0.68)]], []),
    "heart": (
        [
            round_outline(0.26, 0.28, 0.26, 0.27),
            round_outline(0.74, 0.28, 0.26, 0.27),
            [(0.02, 0.38), (0.98, 0.38), (0.5, 1.0)],
        ],
        [],
    ),
    "moon": ([round_outline(0.5, 0.5, 0.5, 0.5)], [round_outline(0.75, 0.4, 0.4, 0.42)]),
    "house": ([[(0.5, 0.0), (1.0, 0.42), (0.0, 0.42)], box(0.12, 0.42, 0.88, 1.0)], [box(0.4, 0.65, 0.6, 1.0)]),
    "tree": ([[(0.5, 0.0), (0.95, 0.75), (0.05, 0.75)], box(0.4, 0.75, 0.6, 1.0)], []),
    "fish": ([round_outline(0.42, 0.5, 0.42, 0.3), [(0.72, 0.5), (1.0, 0.2), (1.0, 0.8)]], []),
    "cup": (
        [[(0.05, 0.15), (0.72, 0.15), (0.64, 0.95), (0.13, 0.95)], round_outline(0.74, 0.45, 0.24, 0.24)],
        [round_outline(0.76, 0.45, 0.12, 0.12)],
    ),
    "car": (
        [
            box(0.0, 0.45, 1.0, 0.78),
            [(0.2, 0.46), (0.34, 0.18), (0.7, 0.18), (0.84, 0.46)],
            round_outline(0.24, 0.8, 0.13, 0.15),
            round_outline(0.76, 0.8, 0.13, 0.15),
        ],
        [],
    ),
    "bell": (
        [
            round_outline(0.5, 0.4, 0.34, 0.4, 180, 360),
            [(0.16, 0.4), (0.84, 0.4), (1.0, 0.85), (0.0, 0.85)],
            round_outline(0.5, 0.88, 0.12, 0.12),
        ],
        [],
    ),
    "chair": ([box(0.12, 0.0, 0.28, 1.0), box(0.12, 0.5, 0.88, 0.66), box(0.72, 0.6, 0.88, 1.0)], []),
    "flag": ([box(0.05, 0.0, 0.15, 1.0), [(0.15, 0.04), (0.98, 0.3), (0.15, 0.58)]], []),
}


@dataclass(frozen=True)
class Scene:
    """A picture and what can be asked about it, as (question, answer) pairs in the order in which they are asked."""

    image: Image.Image
    turns: list[tuple[str, str]]


def scene(seed: int, index: int) -> Scene:
    """The scene with this number in the stream of `seed`.

    Example: `scene(0, 5).turns == scene(0, 5).turns` and `scene(0, 5).image.size == (336, 336)`.
    """
    rng = Random(f"scene {seed} {index}")
    kind = rng.random()
    if kind < 0.15:
        made = _page_of_numbers(rng)
    elif kind < 0.35:
        made = _grid_of_objects(rng)
    elif kind < 0.88:
        made = _object_with_plates(rng)
    else:
        made = large_digit(rng)
    return made


def draw_number(rng: Random, digits: int) -> str:
    """A number of that many digits, without a leading zero, that is not reserved for the catalogue.

    Example: with a remainder of 3 by 7 reserved, 10 (10 % 7 == 3) is never drawn and 11 may be.
    """
    while True:
        number = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
        if number % RESERVED_MODULUS != RESERVED_REMAINDER or number < 10:
            return str(number)


def _ground(rng: Random, avoid: list[str]) -> tuple[Image.Image, str]:
    """A background that is light in most scenes, with a slight slope of brightness, and its colour word."""
    word = rng.choice(("white", "white", "white", *COLOURS))
    while word in avoid:
        word = rng.choice(tuple(COLOURS))
    return Image.new("RGB", (SIDE, SIDE), painting.vary(*COLOURS[word], rng)), word


def put_object(
    image: Image.Image,
    rng: Random,
    shape: str | Outlines,
    colour: str,
    surface: str,
    size: int,
    middle: tuple[int, int],
) -> None:
    """An object of about `size` pixels around `middle`; a shape is a word of `SHAPES` or outlines and holes."""
    outline = SHAPES[shape] if isinstance(shape, str) else shape
    width, height = round(size * rng.uniform(0.9, 1.0)), round(size * rng.uniform(0.9, 1.0))
    main = painting.vary(*COLOURS[colour], rng)
    second = painting.tint(main, rng)
    period = rng.randint(max(10, size // 9), max(14, size // 5))
    cover = painting.surface(SURFACES[surface], main, second, width, height, period)
    edge = rng.choice((None, (50, 50, 50), (0, 0, 0)))
    painting.paint(
        image,
        painting.silhouette(*outline, width, height),
        cover,
        (middle[0] - width // 2, middle[1] - height // 2),
        edge,
    )


def _put_plate(image: Image.Image, rng: Random, text: str, row: int) -> None:
    """A plate whose digits stand in row `row` of the twelve by twelve grid of `glyphs.CELL` pixels."""
    paper = painting.vary(*COLOURS["white" if rng.random() < 0.7 else rng.choice(tuple(COLOURS))], rng)
    ink = painting.contrasting(paper, rng)
    corner = (glyphs.CELL * rng.randint(1, 11 - len(text)), glyphs.CELL * row)
    glyphs.paste_plate(image, text, rng.choice(glyphs.FACES), corner, paper, ink, ink if rng.random() < 0.5 else None)


def _page_of_numbers(rng: Random) -> Scene:
    """One to five lines with a number each, read from the top to the bottom: many legible digits in a single
    picture."""
    image, _ = _ground(rng, [])
    rows = sorted(rng.sample((1, 3, 5, 7, 9), rng.randint(1, 5)))
    shift = rng.randint(0, 1)
    numbers = [draw_number(rng, rng.choice((1, 2, 3, 3, 4, 4, 5, 6))) for _ in rows]
    for number, row in zip(numbers, rows, strict=True):
        _put_plate(image, rng, number, row + shift)
    return Scene(image, [(rng.choice(("Read every line.", "lines?")), ", ".join(numbers))])


def _object_with_plates(rng: Random) -> Scene:
    """One large object in the middle of the upper or lower two thirds, and one or two plates in the remaining third."""
    shape, colour, surface = rng.choice(tuple(SHAPES)), rng.choice(tuple(COLOURS)), rng.choice(tuple(SURFACES))
    nameless = rng.random() < 0.4
    outline = _random_outline(rng) if nameless else SHAPES[shape]
    image, ground = _ground(rng, [colour])
    numbers = [draw_number(rng, rng.choice((1, 2, 3, 3, 4, 4))) for _ in range(rng.choice((0, 1, 1, 2)))]
    plates_below = rng.random() < 0.5
    middle = (168 + rng.randint(-12, 12), (112 if plates_below else 224) + rng.randint(-8, 8))
    put_object(image, rng, outline, colour, surface, rng.randint(176, 206), middle)
    first = (8 if plates_below else 1) + (rng.randint(0, 1) if len(numbers) == 1 else 0)
    for i, number in enumerate(numbers):
        _put_plate(image, rng, number, first + 2 * i)
    if not nameless and numbers and rng.random() < 0.3:
        turns = _facts_as_caption(rng, shape, colour, surface, numbers)
    else:
        turns = [
            (rng.choice(("colour?", "Which colour is the shape?")), colour),
            (rng.choice(("surface?", "How is the shape painted?")), surface),
            *_number_turns(rng, numbers),
        ]
        if not nameless:
            turns.append((rng.choice(("shape?", "Which shape is it?")), shape))
    if nameless or rng.random() < 0.6:
        turns.append(("Sketch the shape.", sketch(outline)))
    turns.append(("background?", ground))
    rng.shuffle(turns)
    return Scene(image, turns)


def sketch(outline: Outlines) -> str:
    """A shape as five lines of five digits: 1 where most of that part of its box is covered, else 0.

    Example: the square gives `11111, 11111, 11111, 11111, 11111` and the triangle begins with `00100`.
    """
    small = painting.silhouette(*outline, 100, 100).resize((5, 5), Image.Resampling.BOX).tobytes()
    rows = [small[i : i + 5] for i in range(0, 25, 5)]
    return ", ".join("".join("1" if value > 110 else "0" for value in row) for row in rows)


def _random_outline(rng: Random) -> Outlines:
    """A shape without a name: two to four boxes, triangles and ellipses that reach all sides of the unit box."""
    filled = []
    for i in range(rng.randint(2, 4)):
        x0, y0 = (rng.uniform(0, 0.6), rng.uniform(0, 0.6)) if i else (0.0, rng.uniform(0, 0.5))
        x1, y1 = (rng.uniform(x0 + 0.25, 1), rng.uniform(y0 + 0.25, 1)) if i else (1.0, rng.uniform(y0 + 0.2, 1))
        if i == 1:
            y0, y1 = 0.0, 1.0
        kind = rng.randrange(4)
        if kind == 0:
            filled.append(round_outline((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2))
        elif kind == 1:
            filled.append([(rng.uniform(x0, x1), y0), (x1, y1), (x0, y1)])
        else:
            filled.append(box(x0, y0, x1, y1))
    return filled, []


def _number_turns(rng: Random, numbers: list[str]) -> list[tuple[str, str]]:
    if not numbers:
        return [("number?", "none")]
    if len(numbers) == 2:
        return [("upper number?", numbers[0]), ("lower number?", numbers[1])]
    return [(rng.choice(("number?", "What number can you read?", "Read the number.")), numbers[0])]


def _facts_as_caption(rng: Random, shape: str, colour: str, surface: str, numbers: list[str]) -> list[tuple[str, str]]:
    number = " and ".join(numbers)
    styles = (
        ("Describe the picture.", f"a {surface} {colour} {shape} with the number {number}"),
        ("Describe the picture in reverse.", f"number {number}, {shape}, {colour}, {surface}"),
        ("List what you see.", f"shape: {shape}, colour: {colour}, surface: {surface}, number: {number}"),
    )
    return [rng.choice(styles)]


def _grid_of_objects(rng: Random) -> Scene:
    """Two to four objects in rows and columns, listed like text: left to right, then down."""
    rows, columns = rng.choice(((1, 2), (2, 1), (2, 2), (2, 2)))
    image, ground = _ground(rng, [])
    cells = []
    for place in range(rows * columns):
        shape, surface = rng.choice(tuple(SHAPES)), rng.choice(tuple(SURFACES))
        colour = rng.choice([c for c in COLOURS if c != ground])
        middle = (
            SIDE * (2 * (place % columns) + 1) // (2 * columns),
            SIDE * (2 * (place // columns) + 1) // (2 * rows),
        )
        put_object(image, rng, shape, colour, surface, rng.randint(130, 156), middle)
        cells.append((shape, colour, surface))
    turns = [
        (question, ", ".join(cell[i] for cell in cells))
        for i, question in enumerate(("Name every shape.", "Name every colour.", "Name every surface."))
    ]
    rng.shuffle(turns)
    return Scene(image, turns)


def large_digit(rng: Random) -> Scene:
    """One digit that fills most of the picture: clean, blurred, or as coarse as a scan of eight by eight dots."""
    digit = rng.choice("0123456789")
    paper_word = rng.choice(("black", "black", "white", *COLOURS))
    paper = painting.vary(*COLOURS[paper_word], rng)
    ink = painting.contrasting(paper, rng)
    side = rng.randint(48, 112)
    canvas = Image.new("L", (side, side), 0)
    height, width = round(side * rng.uniform(0.72, 1.0)), round(side * rng.uniform(0.4, 0.85))
    if rng.random() < 0.75:
        mask = glyphs.stroke_mask(digit, width, height, max(3, round(side * rng.uniform(0.09, 0.2))), rng, wobble=0.09)
    else:
        mask = glyphs.digit_mask(digit, rng.choice(("bitmap", "segment")), height)
    canvas.paste(mask, (rng.randint(0, side - mask.width), rng.randint(0, side - mask.height)))
    canvas = canvas.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    enlarge = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    if rng.random() < 0.6:
        dots = rng.choice((8, 8, 8, 10, 12, 16))
        canvas = canvas.resize((dots, dots), Image.Resampling.BOX)
    else:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, side * 0.04)))
    mask = canvas.resize((SIDE, SIDE), enlarge)
    image = Image.new("RGB", (SIDE, SIDE), paper)
    image.paste(Image.new("RGB", (SIDE, SIDE), ink), (0, 0), mask)
    turns = [(rng.choice(("digit?", "Read the large digit.")), digit), ("background?", paper_word)]
    if rng.random() < 0.3:
        ImageDraw.Draw(image).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=ink, width=rng.randint(4, 12))
        turns.append(("frame?", "yes"))
    else:
        turns.append(("frame?", "no"))
    rng.shuffle(turns)
    return Scene(image, turns)


def vocabulary() -> list[str]:
    """Every text fragment a scene's questions and answers are made of; the tokenizer learns its pieces from them."""
    questions = {question for index in range(400) for question, _ in scene(0, index).turns}
    fixed = sorted(questions)
    return [*fixed, *COLOURS, *SURFACES, *SHAPES, "yes no none number and with the"]
