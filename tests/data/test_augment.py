"""Images that are changed at random: as large as they were, the same draws for the same place, others elsewhere."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from tiny_models import write_tiny_model

from phi3v.data.augment import Augmentation, Augmented
from phi3v.data.encode import EncodedRows
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.errors import ConfigError
from phi3v.loading import load_processor
from phi3v.recipe import Recipe

ALL = {"crop": 0.2, "rotate": 10.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "mirror": 0.5}


def photo() -> Image.Image:
    """40 wide, 30 high: red grows to the right, green downwards, blue is left out."""
    right, down = np.meshgrid(np.arange(40) * 6, np.arange(30) * 8)
    return Image.fromarray(np.stack([right, down, 0 * down], axis=-1).astype(np.uint8))


class Shares(random.Random):
    """Draws that are known: these shares one after the other."""

    def __init__(self, *shares: float) -> None:
        super().__init__()
        self.shares = iter([*shares, *[0.5] * 20])

    def random(self) -> float:
        return next(self.shares)


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def test_each_change_does_what_its_name_says() -> None:
    """Draws are, in this order: mirror, angle, width, height, left, top, brightness, contrast, saturation."""
    mirrored = Augmentation(mirror=0.5)
    assert np.array_equal(pixels(mirrored.changed(photo(), Shares(0.49))), pixels(photo())[:, ::-1])
    assert np.array_equal(pixels(mirrored.changed(photo(), Shares(0.51))), pixels(photo()))
    # The whole draw of both sides, all from the left and nothing from the top: columns 20 to 40, rows 0 to 15.
    cut = Augmentation(crop=0.5).changed(photo(), Shares(0.5, 0.5, 1.0, 1.0, 1.0, 0.0))
    assert np.array_equal(pixels(cut), pixels(photo().resize((40, 30), Image.Resampling.BICUBIC, box=(20, 0, 40, 15))))
    assert pixels(cut)[15, 0, 0] > 110 and pixels(cut)[0, 20, 1] < 10
    turned = Augmentation(rotate=10).changed(photo(), Shares(0.5, 0.0))
    assert np.array_equal(pixels(turned), pixels(photo().rotate(-10, Image.Resampling.BICUBIC)))
    brighter = Augmentation(brightness=0.2).changed(photo(), Shares(*[0.5] * 6, 1.0))
    assert np.array_equal(pixels(brighter), pixels(ImageEnhance.Brightness(photo()).enhance(1.2)))
    assert abs(pixels(brighter)[10, 20] - 1.2 * pixels(photo())[10, 20]).max() < 1
    grey = Augmentation(saturation=0.99).changed(photo(), Shares(*[0.5] * 8, 0.0))
    assert np.ptp(pixels(grey)[10, 20]) < 0.02 * 255
    softer = Augmentation(contrast=0.5).changed(photo(), Shares(*[0.5] * 7, 0.0))
    assert abs(np.ptp(pixels(softer)) - 0.5 * np.ptp(pixels(photo()))) < 3
    as_array = Augmentation(**ALL).changed(np.asarray(photo()), random.Random(1))
    assert np.array_equal(pixels(as_array), pixels(Augmentation(**ALL).changed(photo(), random.Random(1))))
    assert as_array.size == photo().size


def test_draws_follow_from_seed_epoch_row_and_image_alone(tmp_path: Path) -> None:
    processor = load_processor(str(write_tiny_model(tmp_path / "model")))
    photo().save(tmp_path / "photo.png")
    image = ImageRef(path=str(tmp_path / "photo.png"))
    turns = (Message("user", (ImagePart(0), ImagePart(1), TextPart("What?"))), Message("assistant", (TextPart("Red"),)))
    rows = [Row(turns, (image, image), {}, "rows", number) for number in range(2)]
    plain = EncodedRows(rows, processor)[0]

    def sample(row: int, epoch: int, seed: int = 3) -> torch.Tensor:
        encoded = EncodedRows(rows, processor, augmented=Augmented(Augmentation(**ALL), seed))
        encoded.choose_epoch(epoch)
        found = encoded[row]
        assert all(torch.equal(found[name], plain[name]) for name in plain if name != "pixel_values")
        return found["pixel_values"]

    random.seed(1)
    first = sample(0, 1)
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(sample(0, 1), first), "something else is drawn from"
    others = [sample(1, 1), sample(0, 2), sample(0, 1, seed=4), plain["pixel_values"]]
    assert not any(torch.equal(one, first) for one in others)
    assert not torch.equal(first[0], first[1]), "both images of the row are changed alike"


def test_a_loader_worker_that_lives_on_sees_the_next_epoch(tmp_path: Path) -> None:
    processor = load_processor(str(write_tiny_model(tmp_path / "model")))
    photo().save(tmp_path / "photo.png")
    turns = (Message("user", (ImagePart(0), TextPart("What?"))), Message("assistant", (TextPart("Red"),)))
    encoded = EncodedRows(
        [Row(turns, (ImageRef(path=str(tmp_path / "photo.png")),), {}, "rows", 0)],
        processor,
        augmented=Augmented(Augmentation(**ALL), 0),
    )
    loader = torch.utils.data.DataLoader(encoded, batch_size=None, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    for epoch in (0, 1, 2):
        encoded.choose_epoch(epoch)
        (found,) = list(loader)
        assert torch.equal(found["pixel_values"], encoded[0]["pixel_values"]), epoch


def test_what_it_does_not_go_with_is_refused(tmp_path: Path) -> None:
    base = {"model": "m", "data": {"train": "rows.jsonl", "prompt": "?", "answer": "{a}"}, "output": str(tmp_path)}
    augment = {"augment": {"crop": 0.1}}
    assert Recipe.from_dict({**base, "image": augment}).image.augments == {"crop": 0.1}
    assert Recipe.from_dict({**base, "image": {"augment": {"crop": 0}}, "vision": {"cache": "memory"}})
    with pytest.raises(ConfigError, match=r"vision.cache .* image.augment"):
        Recipe.from_dict({**base, "image": augment, "vision": {"cache": "memory"}})
    stream = {**base, "data": {**base["data"], "streaming": True}, "training": {"max_steps": 2}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"image.augment .* stream"):
        Recipe.from_dict({**stream, "image": augment})
    for wrong in ({"crop": 1.0}, {"mirror": 2}, {"brightness": -0.1}, {"flip": 0.5}, {"rotate": "much"}):
        with pytest.raises(ConfigError, match=r"image\.augment"):
            Recipe.from_dict({**base, "image": {"augment": wrong}})
