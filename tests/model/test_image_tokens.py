"""The arithmetic of crops and image tokens against every size the original code was asked for."""

import json
import subprocess
import sys

import numpy as np
import pytest

from phi3v.errors import ImageError
from phi3v.image_tokens import canvas_size, crop_grid, grid_tokens, num_image_tokens, resized_size


def test_every_recorded_size_gives_the_original_canvas_and_token_count(golden):
    table = np.load(golden / "hd_sizes.npz")["table"]
    assert len(table) > 2500
    for width, height, num_crops, canvas_width, canvas_height, tokens in table.tolist():
        assert canvas_size(width, height, num_crops) == (canvas_height, canvas_width), (width, height, num_crops)
        assert num_image_tokens(width, height, num_crops) == tokens, (width, height, num_crops)


def test_sizes_the_original_cannot_resize_are_refused_in_one_line(golden):
    for width, height, num_crops, *_ in json.loads((golden / "hd_sizes_degenerate.json").read_text()):
        with pytest.raises(ValueError, match=f"{width}x{height} pixels is too narrow") as caught:
            num_image_tokens(width, height, num_crops)
        assert "\n" not in str(caught.value)


def test_a_transposed_image_has_the_transposed_grid():
    assert crop_grid(1000, 300, 16) == (2, 6)
    assert crop_grid(300, 1000, 16) == (6, 2)
    assert resized_size(300, 1000, 16) == resized_size(1000, 300, 16) == (2016, 604)


def test_the_crops_never_exceed_the_limit():
    for num_crops in range(1, 40):
        for height in (1, 37, 336, 500, 1000):
            for width in (336, 500, 777, 2000):
                try:
                    rows, columns = crop_grid(width, height, num_crops)
                except ImageError:
                    continue
                assert 1 <= rows * columns <= num_crops


def test_token_counts_of_known_grids():
    grids = {(1, 1): 313, (2, 2): 757, (4, 4): 2509, (2, 6): 1909, (6, 2): 1957}
    assert {grid: grid_tokens(*grid) for grid in grids} == grids


@pytest.mark.parametrize(("width", "height", "num_crops"), [(0, 5, 4), (5, -1, 4), (5, 5, 0)])
def test_impossible_numbers_are_refused(width, height, num_crops):
    with pytest.raises(ImageError, match="must be at least 1"):
        crop_grid(width, height, num_crops)


def test_it_needs_neither_torch_nor_transformers():
    check = "import phi3v.image_tokens, sys; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
