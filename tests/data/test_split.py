"""The split: stable when rows are added, images together, and a share that is near what was asked."""

import random

import pytest

from phi3v.data.split import group_rows, split_rows
from phi3v.errors import DataError


@pytest.mark.parametrize(
    ("keys", "groups"),
    [
        ([], []),
        ([["a"], ["b"]], [[0], [1]]),
        ([["a"], ["b", "c"], ["a", "d"], ["c"]], [[0, 2], [1, 3]]),
        ([["a"], ["b"], ["c"], ["c", "a"], ["b"]], [[0, 2, 3], [1, 4]]),
        ([["a", "a"], ["b"], ["b", "a"]], [[0, 1, 2]]),
    ],
)
def test_rows_that_share_an_image_are_one_group(keys: list, groups: list) -> None:
    assert group_rows(keys) == groups


@pytest.mark.parametrize("validation", [0.1, 0.5, 40])
def test_every_row_is_on_one_side_and_images_never_on_both(validation: float) -> None:
    dice = random.Random(0)
    keys = [[f"image {dice.randrange(250)}" for _ in range(dice.choice([1, 1, 1, 2]))] for _ in range(400)]
    train, held_out = split_rows(keys, validation, seed=0)
    assert sorted(train + held_out) == list(range(400))
    seen = {key for row in train for key in keys[row]}
    assert held_out and not seen & {key for row in held_out for key in keys[row]}


def test_a_number_of_rows_is_met_exactly_and_a_share_nearly() -> None:
    keys = [[f"{row}.jpg"] for row in range(2000)]
    for seed in range(3):
        assert len(split_rows(keys, 200, seed)[1]) == 200
        assert 160 < len(split_rows(keys, 0.1, seed)[1]) < 240
    assert split_rows(keys, 200, 0) != split_rows(keys, 200, 1)


def test_a_row_stays_on_its_side_when_rows_are_added_or_shuffled() -> None:
    keys = [[f"{row}.jpg"] for row in range(300)]
    held_out = {keys[row][0] for row in split_rows(keys, 0.2, seed=3)[1]}
    more = [[f"{row}.jpg"] for row in range(900)]
    random.Random(1).shuffle(more)
    assert {key for row in split_rows(more, 0.2, seed=3)[1] for key in more[row]} & {k for [k] in keys} == held_out
    fewest = {keys[row][0] for row in split_rows(keys, 30, seed=3)[1]}
    assert fewest <= {keys[row][0] for row in split_rows(keys, 31, seed=3)[1]}


def test_a_group_that_would_pass_the_number_is_left_out() -> None:
    assert split_rows([["a"], ["b"], ["a"]], 1, seed=0) == ([0, 2], [1])


def test_small_sets_have_rows_on_both_sides() -> None:
    for seed in range(20):
        for share in (0.01, 0.99):
            train, held_out = split_rows([["a"], ["b"], ["c"]], share, seed)
            assert train and held_out


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(DataError, match="3 rows with 1 different images cannot be split"):
        split_rows([["a"], ["a"], ["a"]], 0.1, seed=0)
    for number in (3, 4):
        with pytest.raises(DataError, match=f"asks for {number} of 3 usable rows"):
            split_rows([["a"], ["b"], ["c"]], number, seed=0)
