"""The catalogue: the guide's columns, unseen combinations, the same bytes every time."""

import csv
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from phi3v import demo
from phi3v.demo import catalogue, glyphs
from phi3v.errors import ConfigError

GUIDE_COLUMNS = [
    *("website_name", "competence_date", "country_code", "currency_code", "brand", "category1_code", "category2_code"),
    *("category3_code", "product_code", "title", "itemurl", "imageurl", "full_price", "price", "full_price_eur"),
    *("price_eur", "flg_discount"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("catalogue")
    paths = demo.build(place, train=30, test=12)
    assert paths == {"train": place / "train.csv", "test": place / "test.csv"}
    return place


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_columns_are_those_of_the_guides_data_set(folder: Path) -> None:
    for part, count in (("train", 30), ("test", 12)):
        rows = read(folder / f"{part}.csv")
        assert len(rows) == count
        assert list(rows[0]) == GUIDE_COLUMNS
        assert all(value for row in rows for value in row.values())


def test_every_photo_is_there_at_a_relative_path(folder: Path) -> None:
    rows = [*read(folder / "train.csv"), *read(folder / "test.csv")]
    assert len({row["imageurl"] for row in rows}) == len(rows)
    for row in rows:
        assert not Path(row["imageurl"]).is_absolute()
        with Image.open(folder / row["imageurl"]) as photo:
            assert photo.size == (336, 336)


def test_the_same_call_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    demo.build(tmp_path, train=30, test=12)
    for path in sorted(folder.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path


def test_unseen_products_share_no_combination_and_no_price_with_the_training_part() -> None:
    train, test = catalogue.products("train", 1200), catalogue.products("test", 200)
    assert len(test) >= 200
    assert not {p.full_price for p in train} & {p.full_price for p in test}
    assert not {(p.title, p.row()["category3_code"], p.full_price) for p in train} & {
        (p.title, p.row()["category3_code"], p.full_price) for p in test
    }
    assert {p.item for p in train} == {p.item for p in test} == set(catalogue.ITEMS)
    for part in (train, test):
        assert len({(p.title, p.row()["category3_code"], p.full_price) for p in part}) == len(part)
    with pytest.raises(ConfigError, match="26,800 different products, not 26,801"):
        catalogue.products("test", 26_801)


def test_prices_are_split_as_documented() -> None:
    assert catalogue.prices("test")[:2] == [101, 129]
    assert catalogue.prices("train")[:3] == [108, 115, 122]
    assert not set(catalogue.prices("test")) & set(catalogue.prices("train"))


def test_what_an_answer_says_is_visible() -> None:
    """A product that differs in one fact has another photo, also with the same random layout."""
    base = catalogue.Product(5, "Navy", "Check", "Scarf", 108)
    others = [
        catalogue.Product(5, "Teal", "Check", "Scarf", 108),
        catalogue.Product(5, "Navy", "Polka", "Scarf", 108),
        catalogue.Product(5, "Navy", "Check", "Boot", 108),
        catalogue.Product(5, "Navy", "Check", "Scarf", 115),
    ]
    for other in others:
        assert ImageChops.difference(catalogue.photo(base), catalogue.photo(other)).getbbox() is not None


def test_a_tags_digits_fill_the_cells_of_one_visual_token() -> None:
    for face in glyphs.FACES:
        masks = [glyphs.number_mask(digit, face, glyphs.CELL) for digit in "0123456789"]
        assert {mask.size for mask in masks} == {(28, 28)}
        assert len({mask.tobytes() for mask in masks}) == 10
    assert glyphs.number_mask("120", "bitmap", 28).size == (84, 28)
    assert glyphs.digit_mask("1", "bitmap", 35).size == (25, 35)


def test_a_discount_lowers_the_price_and_nothing_else() -> None:
    full, cut = (
        catalogue.Product(1, "Navy", "Check", "Scarf", 500).row(),
        catalogue.Product(5, "Navy", "Check", "Scarf", 500).row(),
    )
    assert (full["full_price"], full["price"], full["flg_discount"]) == ("500", "500", "0")
    assert (cut["full_price"], cut["price"], cut["flg_discount"]) == ("500", "350", "1")
    assert full["title"] == cut["title"] == "Navy Check Scarf"
