"""The split: stable when rows are added, images together, and a share that is near what was asked."""

import random

import pytest

from phi3v.data.split import Split, split_rows
from phi3v.errors import DataError


@pytest.mark.parametrize("validation", [0.1, 0.5, 40])
def test_every_row_is_on_one_side_and_images_never_on_both(validation: float) -> None:
    dice = random.Random(0)
    keys = [[f"image {dice.randrange(250)}" for _ in range(dice.choice([1, 1, 1, 2]))] for _ in range(400)]
    split = split_rows(keys, validation, seed=0)
    assert sorted(split.train + split.validation + split.left_out) == list(range(400))
    seen = {key for row in split.train for key in keys[row]}
    held_out = {key for row in split.validation for key in keys[row]}
    assert held_out and not seen & held_out
    assert 0 < len(split.left_out) < 80
    for row in split.left_out:  # none without a reason
        assert held_out & set(keys[row])


def test_a_number_of_rows_is_met_exactly_and_a_share_nearly() -> None:
    keys = [[f"{row}.jpg"] for row in range(2000)]
    for seed in range(3):
        assert len(split_rows(keys, 200, seed).validation) == 200
        assert 160 < len(split_rows(keys, 0.1, seed).validation) < 240
    assert split_rows(keys, 200, 0) != split_rows(keys, 200, 1)


def test_a_row_stays_on_its_side_when_rows_are_added_or_shuffled() -> None:
    keys = [[f"{row}.jpg"] for row in range(300)]
    held_out = {keys[row][0] for row in split_rows(keys, 0.2, seed=3).validation}
    more = [[f"{row}.jpg"] for row in range(900)]
    random.Random(1).shuffle(more)
    again = {more[row][0] for row in split_rows(more, 0.2, seed=3).validation}
    assert again & {key for [key] in keys} == held_out
    fewest = {keys[row][0] for row in split_rows(keys, 30, seed=3).validation}
    assert fewest <= {keys[row][0] for row in split_rows(keys, 31, seed=3).validation}


def test_a_group_that_would_pass_the_number_is_left_out() -> None:
    assert split_rows([["a"], ["b"], ["a"]], 1, seed=0) == Split([0, 2], [1], [])


def test_small_sets_have_rows_on_both_sides() -> None:
    for seed in range(20):
        for share in (0.01, 0.99):
            split = split_rows([["a"], ["b"], ["c"]], share, seed)
            assert split.train and split.validation and not split.left_out


def test_of_sets_so_small_that_a_side_would_be_empty_one_row_goes_over_and_back() -> None:
    few, more = ([[f"{row}.jpg"] for row in range(rows)] for rows in (5, 200))
    gone = 0
    for seed in range(20):
        before, after = (set(split_rows(keys, 0.1, seed).validation) for keys in (few, more))
        gone += len(before - after)
        assert not before - after or (len(before) == 1 and not after & set(range(5)))
        assert after & set(range(5)) <= before
    assert gone  # at this size it happens


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(DataError, match="^no row can be used, so none can be held out: mend the data$"):
        split_rows([], 0.1, seed=0)
    for keys, words in (([["a"]], "1 usable row"), ([["a"]] * 3, "3 rows of the same image")):
        with pytest.raises(DataError, match=f"^{words} cannot be split into train and validation: give data.valid"):
            split_rows(keys, 0.1, seed=0)
    for number in (3, 4):
        with pytest.raises(DataError, match=f"asks for {number} of 3 usable rows"):
            split_rows([["a"], ["b"], ["c"]], number, seed=0)


def test_no_row_changes_sides_when_a_row_ties_two_others() -> None:
    """A hundred rows of one image each, then rows of two images from both sides, in front and behind."""
    keys = [[f"{row}.jpg"] for row in range(100)]
    before = split_rows(keys, 0.3, seed=1)
    a, b = before.train[0], before.validation[0]
    ties = [[f"{one}.jpg", f"{other}.jpg"] for one, other in ((a, b), (b, a), (a, before.train[1]), (b, a))]
    after = split_rows([*ties, *keys], 0.3, seed=1)
    assert {row - 4 for row in after.validation if row >= 4} == set(before.validation)
    gone = {row - 4 for row in after.left_out if row >= 4}
    assert {row - 4 for row in after.train if row >= 4} == set(before.train) - gone and gone <= {a}
    seen = {key for row in after.train for key in [*ties, *keys][row]}
    assert not seen & {key for row in after.validation for key in [*ties, *keys][row]}
