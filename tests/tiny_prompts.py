"""Prompts for the tiny models, made of random words and random pictures, and batches of them."""

import torch

from phi3v.model.vision_phi3_v import image_layout

PAD = 500  # the tiny models' padding id
IMAGE = 509  # the image token where a test gives the tiny models one


def image_tokens(grid: tuple[int, int]) -> int:
    """Image tokens of a grid of crops: `image_tokens((1, 1))` is 313."""
    return image_layout([grid])[1][0]


def prompt(seed: int, words: list[int], grids: tuple = (), image_id: int | None = None) -> dict[str, torch.Tensor]:
    """One prompt: `words[0]` text tokens, an image, `words[1]` text tokens, ..., and the images' pixels.

    Images stand as `image_id`, or as Microsoft's -1, -2, ... where that is None. Labels are the last words.

    Example: `prompt(0, [3, 4], [(1, 1)])` has 3 + 313 + 4 tokens, pixel values `[1, 2, 3, 336, 336]` and image sizes
    `[[336, 336]]`.
    """
    random = torch.Generator().manual_seed(seed)
    pieces = []
    for number, count in enumerate(words):
        pieces.append(torch.randint(3, 499, (count,), generator=random))
        if number < len(grids):
            carrier = -number - 1 if image_id is None else image_id
            pieces.append(torch.full((image_tokens(grids[number]),), carrier))
    ids = torch.cat(pieces)
    made = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if grids:
        slots = max(h * w for h, w in grids) + 1
        pixels = torch.zeros(len(grids), slots, 3, 336, 336)
        for number, (h, w) in enumerate(grids):
            coarse = (
                torch.randn(h * w + 1, 3, 28, 28, generator=random).repeat_interleave(12, 2).repeat_interleave(12, 3)
            )
            pixels[number, : h * w + 1] = coarse + 0.1 * torch.randn(h * w + 1, 3, 336, 336, generator=random)
        made |= {"pixel_values": pixels, "image_sizes": torch.tensor([[336 * h, 336 * w] for h, w in grids])}
    made["labels"] = torch.full_like(ids, -100)[None]
    made["labels"][0, -words[-1] + 1 :] = ids[-words[-1] + 1 :]
    return made


def batch_of(prompts: list[dict], side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts of different lengths as one batch, padded on one side; images one after the other, crops zero-padded."""
    length = max(one["input_ids"].shape[1] for one in prompts)
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    batch = {}
    for key, value in fill.items():
        rows = []
        for one in prompts:
            gap = torch.full((length - one[key].shape[1],), value)
            rows.append(torch.cat([gap, one[key][0]] if side == "left" else [one[key][0], gap]))
        batch[key] = torch.stack(rows)
    pixels = [one["pixel_values"] for one in prompts if "pixel_values" in one]
    if pixels:
        slots = max(one.shape[1] for one in pixels)
        padded = [torch.cat([one, one.new_zeros(len(one), slots - one.shape[1], 3, 336, 336)], dim=1) for one in pixels]
        batch["pixel_values"] = torch.cat(padded)
        batch["image_sizes"] = torch.cat([one["image_sizes"] for one in prompts if "image_sizes" in one])
    return batch


def without(batch: dict, *keys: str) -> dict:
    """The batch less some keys: `without({"a": 1, "labels": 2}, "labels")` is `{"a": 1}`."""
    return {key: value for key, value in batch.items() if key not in keys}
