"""Random changes of training images, so that a photo is not seen twice alike: cut, turned, brighter, mirrored.

In comes an opened image, out comes another one of the same size, so that its tokens stay as many as they were counted.
What is drawn follows from the seed, the epoch, the row's place and the image's number alone, in whichever process: a
run that goes on draws what the undisturbed one would have. Knows no recipes and no tensors of the model.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageEnhance

Change = Callable[[int, Any], Any]
"""What is done to the images of a row once they are open: (number in the row, image) -> image."""


@dataclass(frozen=True)
class Augmentation:
    """How much images are changed at most; 0 leaves that change out.

    Attributes:
        crop: share of width and of height that is cut off; what is left is enlarged to the old size.
        rotate: degrees, either way; corners that come in are black.
        brightness: 0.2 draws a factor between 0.8 and 1.2.
        contrast: the same.
        saturation: the same.
        mirror: probability of left and right being swapped, which makes texts unreadable.
    """

    crop: float = 0.0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    mirror: float = 0.0

    def changed(self, image: Any, draws: random.Random) -> Image.Image:
        """An image, PIL's or an array `[height, width, 3]`, as one of these draws; as large as it was, RGB.

        Each change takes its draws whether it is wanted or not: another brightness cuts no other piece.
        """
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        shares = [draws.random() for _ in range(8)]
        width, height = image.size
        if self.mirror and shares[0] < self.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rotate:
            image = image.rotate(self.rotate * (2 * shares[1] - 1), Image.Resampling.BICUBIC)
        if self.crop:
            wide, high = width * (1 - self.crop * shares[2]), height * (1 - self.crop * shares[3])
            left, top = (width - wide) * shares[4], (height - high) * shares[5]
            box = (left, top, left + wide, top + high)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        amounts = (self.brightness, self.contrast, self.saturation)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind, amount, share in zip(kinds, amounts, (shares[6], shares[7], draws.random()), strict=True):
            if amount:
                image = kind(image).enhance(1 + amount * (2 * share - 1))
        return image


class Augmented:
    """The changes of a run's training images: other ones in each epoch and for each row."""

    def __init__(self, how: Augmentation, seed: int) -> None:
        """Begins with the first epoch."""
        self.how, self.seed = how, seed
        # In memory that loader workers share, which may live longer than an epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def choose_epoch(self, epoch: int) -> None:
        """From now on images are changed as in this epoch, in loader workers too."""
        self._epoch.fill_(epoch)

    def of(self, row: int) -> Change:
        """What is done to the images of the row in this place of the epoch's rows."""
        epoch = int(self._epoch)
        return lambda number, image: self.how.changed(image, random.Random(f"phi3v {self.seed} {epoch} {row} {number}"))
