"""A batch as a training step takes it: what a step would have to ask the device for is known here, on the CPU.

In comes a batch of the collator, rows padded on the right or packed; out comes the same batch with indices in place of
masks and sizes as plain numbers. Knows nothing of text, images or models.
"""

from collections.abc import Mapping
from typing import Any

import torch

IGNORED = -100


def step_batch(batch: Mapping[str, torch.Tensor], image_token_id: int) -> dict[str, Any]:
    """The batch of a training step.

    Positions are flat, `row * columns + column`. `trained_positions` are those whose logits are compared with a label:
    the column before it. `image_positions` are those of image tokens. The mask becomes `position_ids`, in which padding
    repeats a row's last position; behind a causal attention, padding on the right needs no mask. `image_sizes` become
    numbers of Python.

    Example, image token 9: input_ids [[1, 9, 9, 5, 6], [1, 7, 0, 0, 0]] with labels [[-100, -100, -100, 5, 6],
    [-100, 7, -100, -100, -100]] -> trained_positions [2, 3, 5], image_positions [1, 2], position_ids [[0, 1, 2, 3, 4],
    [0, 1, 1, 1, 1]].

    Args:
        batch: input_ids and labels [rows, columns], attention_mask [rows, columns] unless there are position_ids;
            anything else stays as it is.
        image_token_id: stands in input_ids where images are placed, in the order of the images.
    """
    made: dict[str, Any] = {**batch}
    columns = batch["labels"].shape[1]
    rows, before = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    made["trained_positions"] = rows * columns + before
    made["image_positions"] = (batch["input_ids"].flatten() == image_token_id).nonzero()[:, 0]
    mask = made.pop("attention_mask", None)
    if mask is not None and "position_ids" not in made:
        assert bool((mask[:, 0] == 1).all()), "the rows of a step are padded on the right"
        made["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if isinstance(made.get("image_sizes"), torch.Tensor):
        made["image_sizes"] = made["image_sizes"].tolist()
    return made
