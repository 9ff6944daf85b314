"""The demo's product catalogue: generated photos and a table in the schema of the guide's data set.

`write_catalogue(folder)` writes `images/*.png`, `train.csv` and `test.csv`. Each photo shows one product, in one
colour and one pattern, and a price tag: title, `category3_code` and `full_price` can be read off what is visible, and
nothing else tells them. Prices of the test part never occur in the training part, so no combination of title,
category and price does.

Prices are numbers whose remainder by 7 is 3, which `scenes` never draws, and which the drill of `echoing` never held;
titles and templates differ from theirs too. No two products of a part are alike in title, category and price.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random

from PIL import Image

from phi3v.demo import glyphs, painting
from phi3v.demo.painting import box, round_outline
from phi3v.errors import ConfigError

SIDE = 336
PROMPT = "What is shown in this image?"
ANSWER = "Product: {title}, Category: {category3_code}, Full Price: {full_price}"
COLOURS = {  # word in the title -> hue in degrees, saturation, value
    "Crimson": (352, 0.86, 0.76),
    "Amber": (42, 0.9, 0.95),
    "Olive": (82, 0.7, 0.48),
    "Teal": (174, 0.8, 0.55),
    "Navy": (228, 0.8, 0.45),
    "Plum": (296, 0.55, 0.5),
    "Rose": (340, 0.42, 0.96),
    "Charcoal": (0, 0.0, 0.26),
}
DRILLED = (381,)
"""Not sold, though its remainder is 3: the drill that the packaged model learned to repeat by (`echoing`, seed 0, step
49) has this number among its random pieces."""
PATTERNS = {"Solid": "flat", "Breton": "rows", "Pinstripe": "columns", "Polka": "dots", "Check": "checks"}


@dataclass(frozen=True)
class Item:
    """A kind of product: its category codes, its (width, height) as shares of the usual size, its outline in a unit
    box."""

    category2: str
    category3: str
    proportions: tuple[float, float]
    filled: list[painting.Outline]
    holes: list[painting.Outline]


ITEMS = {
    "Scarf": Item(
        "ACCESSORIES",
        "SCARVES",
        (1.0, 1.0),
        [
            round_outline(0.5, 0.24, 0.46, 0.24),
            [(0.3, 0.4), (0.5, 0.44), (0.26, 1.0), (0.06, 0.94)],
            [(0.44, 0.42), (0.66, 0.4), (0.82, 0.86), (0.62, 0.92)],
        ],
        [round_outline(0.5, 0.2, 0.24, 0.09)],
    ),
    "Tote": Item(
        "LEATHER",
        "BAGS",
        (0.95, 1.0),
        [[(0.05, 0.38), (0.95, 0.38), (0.85, 1.0), (0.15, 1.0)], round_outline(0.5, 0.38, 0.28, 0.38, 180, 360)],
        [round_outline(0.5, 0.38, 0.18, 0.28, 180, 360)],
    ),
    "Clutch": Item(
        "LEATHER",
        "BAGS",
        (1.15, 0.75),
        [box(0.0, 0.28, 1.0, 0.8), [(0.0, 0.28), (1.0, 0.28), (0.5, 0.1)]],
        [round_outline(0.5, 0.52, 0.09, 0.09)],
    ),
    "Coat": Item(
        "CLOTHING",
        "OUTERWEAR",
        (0.9, 1.0),
        [
            box(0.24, 0.05, 0.76, 1.0),
            [(0.24, 0.05), (0.24, 0.3), (0.14, 0.8), (0.0, 0.78), (0.1, 0.12)],
            [(0.76, 0.05), (0.76, 0.3), (0.86, 0.8), (1.0, 0.78), (0.9, 0.12)],
        ],
        [[(0.42, 0.0), (0.58, 0.0), (0.5, 0.25)], box(0.485, 0.25, 0.515, 1.0)],
    ),
    "Shirt": Item(
        "CLOTHING",
        "TOPS",
        (1.05, 0.8),
        [
            box(0.25, 0.12, 0.75, 0.92),
            [(0.25, 0.12), (0.4, 0.08), (0.3, 0.4), (0.12, 0.5), (0.0, 0.32)],
            [(0.75, 0.12), (0.6, 0.08), (0.7, 0.4), (0.88, 0.5), (1.0, 0.32)],
        ],
        [round_outline(0.5, 0.1, 0.12, 0.1)],
    ),
    "Trousers": Item(
        "CLOTHING",
        "BOTTOMS",
        (0.62, 1.05),
        [
            box(0.22, 0.0, 0.78, 0.2),
            [(0.22, 0.18), (0.5, 0.18), (0.44, 1.0), (0.16, 1.0)],
            [(0.5, 0.18), (0.78, 0.18), (0.84, 1.0), (0.56, 1.0)],
        ],
        [],
    ),
    "Skirt": Item("CLOTHING", "BOTTOMS", (1.1, 0.7), [[(0.34, 0.1), (0.66, 0.1), (1.0, 0.9), (0.0, 0.9)]], []),
    "Boot": Item(
        "SHOES",
        "BOOTS",
        (0.85, 1.0),
        [
            box(0.2, 0.0, 0.58, 0.72),
            [(0.2, 0.66), (0.58, 0.6), (1.0, 0.8), (1.0, 0.92), (0.2, 0.92)],
            box(0.2, 0.9, 0.42, 1.0),
        ],
        [],
    ),
    "Cap": Item(
        "ACCESSORIES",
        "HATS",
        (1.05, 0.85),
        [
            round_outline(0.42, 0.68, 0.4, 0.5, 180, 360),
            [(0.02, 0.66), (0.98, 0.66), (1.0, 0.8), (0.5, 0.78), (0.02, 0.76)],
        ],
        [],
    ),
    "Dress": Item(
        "CLOTHING",
        "DRESSES",
        (0.75, 1.05),
        [[(0.36, 0.0), (0.64, 0.0), (0.62, 0.42), (0.92, 1.0), (0.08, 1.0), (0.38, 0.42)]],
        [round_outline(0.5, 0.0, 0.09, 0.14)],
    ),
}


@dataclass(frozen=True)
class Product:
    """One row of the catalogue; `row()` gives the seventeen columns."""

    number: int
    colour: str
    pattern: str
    item: str
    full_price: int

    @property
    def title(self) -> str:
        """Colour, pattern and item, for instance `Navy Check Scarf`."""
        return f"{self.colour} {self.pattern} {self.item}"

    def row(self) -> dict[str, str]:
        """The columns of the guide's data set; `imageurl` is a path relative to the table's folder."""
        discount = self.number % 5 == 0
        price = round(self.full_price * (0.7 if discount else 1.0), 2)
        item, code = ITEMS[self.item], f"P{self.number:05d}"
        in_euro = 0.92
        return {
            "website_name": "Phi3v Demo",
            "competence_date": "20260101",
            "country_code": "USA",
            "currency_code": "USD",
            "brand": "Embedded",
            "category1_code": "APPAREL",
            "category2_code": item.category2,
            "category3_code": item.category3,
            "product_code": code,
            "title": self.title,
            "itemurl": f"items/{code}",
            "imageurl": f"images/{code}.png",
            "full_price": str(self.full_price),
            "price": f"{price:g}",
            "full_price_eur": f"{self.full_price * in_euro:.2f}",
            "price_eur": f"{price * in_euro:.2f}",
            "flg_discount": str(int(discount)),
        }


def prices(part: str) -> list[int]:
    """The prices of `"train"` or of `"test"`: numbers from 100 to 1999 with n % 7 == 3, every fourth of them for the
    test, those of `DRILLED` for none.

    Example: `prices("test")[:2] == [101, 129]` and `prices("train")[:3] == [108, 115, 122]`.
    """
    reserved = [n for n in range(100, 2000) if n % 7 == 3]
    return [n for i, n in enumerate(reserved) if (i % 4 == 0) == (part == "test") and n not in DRILLED]


def products(part: str, count: int, seed: int = 0) -> list[Product]:
    """`count` random products of one part, no two alike; numbers run on from 0 for `"train"`, 50000 for `"test"`."""
    rng = Random(f"catalogue {part} {seed}")
    first, choice = (50_000 if part == "test" else 0), prices(part)
    kinds = (tuple(COLOURS), tuple(PATTERNS), tuple(ITEMS), choice)
    if count > (most := prod(map(len, kinds))):
        raise ConfigError(f"the catalogue's {part} part has at most {most:,} different products, not {count:,}")
    drawn: dict[tuple[str, str, str, int], None] = {}  # a set that keeps its order
    while len(drawn) < count:
        drawn[rng.choice(kinds[0]), rng.choice(kinds[1]), rng.choice(kinds[2]), rng.choice(kinds[3])] = None
    return [Product(first + i, *facts) for i, facts in enumerate(drawn)]


def photo(product: Product, seed: int = 0) -> Image.Image:
    """The product's picture, 336 x 336: the item on a pale ground and a white tag with the price below it."""
    rng = Random(f"photo {product.number} {seed}")
    image = Image.new("RGB", (SIDE, SIDE), painting.vary(rng.uniform(0, 360), rng.uniform(0.0, 0.1), 0.95, rng, 0.6))
    item = ITEMS[product.item]
    size = rng.randint(192, 204)
    width, height = round(size * item.proportions[0]), round(size * item.proportions[1])
    main = painting.vary(*COLOURS[product.colour], rng, 0.6)
    second = painting.tint(main, rng)
    cover = painting.surface(PATTERNS[product.pattern], main, second, width, height, rng.randint(24, 34))
    middle = (168 + rng.randint(-6, 6), 112 + rng.randint(-6, 6))
    corner = (middle[0] - width // 2, middle[1] - height // 2)
    painting.paint(image, painting.silhouette(item.filled, item.holes, width, height), cover, corner, edge=(50, 50, 50))
    text = str(product.full_price)
    column, row = rng.randint(1, 11 - len(text)), rng.choice((9, 10))
    dark = (rng.randint(0, 40),) * 3
    tag = (glyphs.CELL * column, glyphs.CELL * row)
    glyphs.paste_plate(image, text, rng.choice(glyphs.FACES), tag, (255, 255, 255), dark, dark)
    return image


def write_catalogue(folder: Path, train: int = 1000, test: int = 200, seed: int = 0) -> dict[str, Path]:
    """Write photos and both tables; returns the paths of `train` and `test`. The same arguments write the same
    bytes."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for part, count in (("train", train), ("test", test)):
        rows = []
        for product in products(part, count, seed):
            rows.append(product.row())
            photo(product, seed).save(folder / rows[-1]["imageurl"], compress_level=1)
        written[part] = folder / f"{part}.csv"
        with open(written[part], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return written


def vocabulary() -> list[str]:
    """Every text fragment a prompt or an answer of the catalogue is made of; the tokenizer learns its pieces from
    them."""
    categories = [item.category3 for item in ITEMS.values()]
    return [PROMPT, ANSWER.replace("{", "").replace("}", ""), *COLOURS, *PATTERNS, *ITEMS, *categories]
