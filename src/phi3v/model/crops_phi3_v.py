"""The forms in which a batch's images may come, and the one that the tower takes: real crops, one after another.

In: pixel values in one of three forms, with the grid of each image. Out: `[C, 3, 336, 336]` floats, of each image its
view of the whole and then its sub crops, row by row.

| form | `pixel_values` | `global_views` |
|---|---|---|
| padded, as the processor makes it | float `[N, K, 3, 336, 336]`, slots behind an image's crops are not looked at | - |
| flat | float `[C, 3, 336, 336]` | - |
| bytes | uint8 `[C - N, 3, 336, 336]`, sub crops alone, grey levels | float `[N, 3, 336, 336]`, normalised |

Bytes are a quarter of the floats to send to a device, and are normalised there by the arithmetic of the processor: the
same floats to the last bit, on the CPU and wherever division, subtraction and rounding are IEEE's. The view of the
whole lies between grey levels and stays float.

Letters: N images, K crop slots, C real crops with the views of the whole.
"""

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

Grids = list[tuple[int, int]]


def real_crops(
    pixel_values: torch.Tensor, global_views: torch.Tensor | None, grids: Grids, crop_size: int
) -> torch.Tensor:
    """`[C, 3, 336, 336]` from any form.

    Example: images of 1 x 1 and 1 x 2 crops in bytes, sub crops [a, b, c] and views [A, B]: [A, a, B, b, c].

    Raises: ValueError if sizes and pixels do not belong together.
    """
    _check(pixel_values, global_views, grids, crop_size)
    if pixel_values.ndim == 5:
        if all(rows * columns + 1 == pixel_values.shape[1] for rows, columns in grids):
            return pixel_values.flatten(0, 1)
        return torch.cat([pixel_values[image, : rows * columns + 1] for image, (rows, columns) in enumerate(grids)])
    if global_views is None:
        return pixel_values
    crops = normalise_bytes(pixel_values, global_views.dtype).split([rows * columns for rows, columns in grids])
    return torch.cat([part for view, own in zip(global_views.split(1), crops, strict=True) for part in (view, own)])


def seen_twice(crops: torch.Tensor, grids: Grids) -> list[int]:
    """Places of sub crops that equal the crop before them, their image's view of the whole.

    An image of one crop is such a pair by the processor's arithmetic: a view of the crop's own size is that crop.

    Example: images of 1 x 1 and 1 x 2 crops, [A, A, B, b, c]: [1]; with [A, a, B, b, c]: [].
    """
    places, first = [], 0
    for rows, columns in grids:
        if rows == columns == 1 and torch.equal(crops[first], crops[first + 1]):
            places.append(first + 1)
        first += rows * columns + 1
    return places


def normalise_bytes(crops: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Grey levels `[C, 3, H, W]` as CLIP takes them, `(level / 255 - mean) / std` channel by channel.

    Example: level 255 of the red channel is (1 - 0.48145466) / 0.26862954 = 1.9303.
    """
    constants = torch.tensor([[255.0] * 3, list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)])
    # By a tensor: a GPU would multiply by the reciprocal of a number, which rounds otherwise.
    levels, mean, std = to_device(constants.view(3, 3, 1, 1), crops.device)
    return crops.to(torch.float32).div_(levels).sub_(mean).div_(std).to(dtype)


def to_device(small: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU on a device, without waiting: from pinned memory, which torch keeps for reuse."""
    if device.type == "cuda" and small.device.type == "cpu":
        small = small.pin_memory()
    return small.to(device, non_blocking=True)


def _check(pixel_values: torch.Tensor, global_views: torch.Tensor | None, grids: Grids, crop_size: int) -> None:
    """Raises: ValueError."""
    in_bytes = pixel_values.dtype == torch.uint8
    if in_bytes != (global_views is not None):
        given, needed = ("uint8", "need") if in_bytes else (str(pixel_values.dtype).removeprefix("torch."), "take no")
        raise ValueError(f"pixel_values of type {given} {needed} global_views: bytes are sub crops alone")
    for number, (rows, columns) in enumerate(grids):
        if rows < 1 or columns < 1:
            raise ValueError(f"image {number} has a grid of {rows}x{columns} crops")
    shape = list(pixel_values.shape)
    if pixel_values.ndim == 4:
        crops = sum(rows * columns + (not in_bytes) for rows, columns in grids)
        views = len(grids) if global_views is None else global_views.shape[0]
        if shape[0] != crops or views != len(grids):
            raise ValueError(
                f"image_sizes name {len(grids)} images of {crops} crops in all, but pixel_values hold {shape[0]} crops"
                + (f" and global_views {views} images" if in_bytes else "")
            )
        return
    if pixel_values.ndim != 5 or shape[0] != len(grids):
        raise ValueError(
            f"pixel_values must be [images, crops, 3, {crop_size}, {crop_size}], one image per row of "
            f"image_sizes, but have shape {shape} for {len(grids)} sizes"
        )
    for number, (rows, columns) in enumerate(grids):
        if rows * columns + 1 > shape[1]:
            raise ValueError(
                f"image {number} has a grid of {rows}x{columns} crops, but pixel_values hold {shape[1] - 1} sub crops "
                "an image"
            )
