"""What a model computes for one prompt with two images: exports are compared by it."""

from typing import Any

import torch
from PIL import Image


def logits(model: Any, processor: Any) -> torch.Tensor:
    """Of a prompt with two images of different sizes."""
    photos = [Image.new("RGB", size, colour) for size, colour in (((500, 300), "teal"), ((40, 60), "brown"))]
    text = "<|user|>\n<|image_1|>\nand <|image_2|>\nWhat?<|end|>\n<|assistant|>\n"
    with torch.no_grad():
        return model(**processor(text=text, images=photos, return_tensors="pt")).logits
