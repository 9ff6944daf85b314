"""Scenes: the same everywhere, readable, and apart from the catalogue."""

import re

import pytest

from phi3v.demo import catalogue, scenes
from phi3v.demo.scenes import RESERVED_MODULUS, RESERVED_REMAINDER, SHAPES, draw_number, scene, sketch

MANY = 600


@pytest.fixture(scope="module")
def turns() -> list[tuple[str, str]]:
    return [turn for index in range(MANY) for turn in scene(0, index).turns]


def test_a_scene_is_made_of_its_numbers_alone() -> None:
    for index in (0, 7, 8, 31):
        first, second = scene(3, index), scene(3, index)
        assert first.turns == second.turns
        assert first.image.tobytes() == second.image.tobytes()
    assert scene(3, 1).image.tobytes() != scene(4, 1).image.tobytes()


def test_scenes_are_square_pictures_of_one_crop() -> None:
    assert {scene(0, index).image.size for index in range(40)} == {(336, 336)}
    assert {scene(0, index).image.mode for index in range(40)} == {"RGB"}


def test_every_scene_asks_something_and_every_kind_occurs(turns: list[tuple[str, str]]) -> None:
    assert all(scene(0, index).turns for index in range(60))
    assert all(question and answer for question, answer in turns)
    questions = {question for question, _ in turns}
    assert {"digit?", "lines?", "Name every shape.", "shape?", "Sketch the shape.", "background?"} <= questions


def test_no_number_of_a_scene_is_one_of_the_catalogues_prices(turns: list[tuple[str, str]]) -> None:
    sketches = {answer for question, answer in turns if question == "Sketch the shape."}
    numbers = {int(number) for _, answer in turns if answer not in sketches for number in re.findall(r"\d{2,}", answer)}
    assert len(numbers) > 300
    assert not [number for number in numbers if number % RESERVED_MODULUS == RESERVED_REMAINDER]
    prices = {*catalogue.prices("train"), *catalogue.prices("test")}
    assert {price % RESERVED_MODULUS for price in prices} == {RESERVED_REMAINDER}


def test_reserved_numbers_are_never_drawn() -> None:
    import random

    rng = random.Random(0)
    drawn = {int(draw_number(rng, 3)) for _ in range(20_000)}
    assert drawn == {number for number in range(100, 1000) if number % 7 != 3}


def test_templates_titles_and_words_are_apart_from_the_catalogue(turns: list[tuple[str, str]]) -> None:
    text = "\n".join(part for turn in turns for part in turn)
    titles = {product.title for part in ("train", "test") for product in catalogue.products(part, 2000)}
    assert len(titles) == len(catalogue.COLOURS) * len(catalogue.PATTERNS) * len(catalogue.ITEMS)
    assert not [title for title in titles if title in text]
    assert catalogue.PROMPT not in text
    assert not [piece for piece in ("Product:", "Category:", "Full Price:") if piece in text]
    ours = {*scenes.COLOURS, *scenes.SURFACES, *scenes.SHAPES}
    theirs = {word.lower() for word in (*catalogue.COLOURS, *catalogue.PATTERNS, *catalogue.ITEMS)}
    assert not ours & theirs


def test_a_sketch_is_the_shape_in_five_lines_of_five() -> None:
    assert sketch(SHAPES["square"]) == "11111, 11111, 11111, 11111, 11111"
    assert sketch(SHAPES["cross"]) == "00100, 01110, 11111, 01110, 00100"
    assert sketch(SHAPES["triangle"]) == "00100, 00100, 01110, 01110, 11111"
