"""The two graphs around the decoder: images to features, and ids with features to input embeddings.

In comes a folder of merged weights, of which only these parts are read, out go `vision.onnx` and `embedding.onnx` as
onnxruntime-genai has them for Phi-3-V. Both are traced from modules written here without a look at values, so that one
graph does any number of images and crops. Knows nothing of the decoder.

Letters: N images, K crop slots, C real crops, T image tokens, B rows, S positions, H hidden size.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from phi3v.model.vision_phi3_v import Phi3VImageEmbedding, merge_patches
from phi3v.weight_files import read_weights, weight_files

VISION, EMBEDDING = "vision.onnx", "embedding.onnx"


def layout_by_arithmetic(rows: torch.Tensor, columns: torch.Tensor, slots: int, side: int) -> torch.Tensor:
    """What `model.vision_phi3_v.image_layout` builds crop by crop, as one expression of the grids.

    `rows` and `columns` `[N]` are crops of each image, `slots` those that an image has at most, the view of the whole
    included. A separator's place is the number of patches, for the one at the end of a line, and the next.

    Returns: the index `[T]` into the table of all real patches with the two separators behind them.

    Example: one image of 1 x 2 crops with `side=1` has the patches 0 (whole), 1 and 2; 3 ends a line, 4 stands before
    the whole: `[1, 2, 3, 4, 0, 3]`.
    """
    crops = rows * columns + 1
    first = ((crops.cumsum(0) - crops) * side * side)[:, None]
    line_end = (crops.sum() * side * side)[None, None]
    longest = (slots - 1) * (side * side + side) + 1 + side * (side + 1)  # as many tokens as one column of crops has
    token = torch.arange(longest)[None]
    width = (columns * side + 1)[:, None]
    sub_tokens = rows[:, None] * side * width
    line, place = token // width, token % width
    crop = line // side * columns[:, None] + place // side + 1
    sub = first + (crop * side + line % side) * side + place % side
    sub = torch.where(place == width - 1, line_end, sub)
    rest = token - sub_tokens - 1
    whole = torch.where(rest % (side + 1) == side, line_end, first + rest // (side + 1) * side + rest % (side + 1))
    index = torch.where(token < sub_tokens, sub, torch.where(token == sub_tokens, line_end + 1, whole))
    return index[token < sub_tokens + 1 + side * (side + 1)]


class VisionGraph(nn.Module):
    """The image embedding of a model with the layout by arithmetic; same weights."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, K, 3, 336, 336]` and canvas sizes `[N, 2]` to `[T, H]`; padding slots are not looked at."""
        images, slots = self.embedding, pixel_values.shape[1]
        grid = image_sizes // images.crop_size
        rows, columns = grid[:, 0], grid[:, 1]
        crops = pixel_values[torch.arange(slots)[None] < (rows * columns + 1)[:, None]]
        patches = merge_patches(images.img_processor(crops.to(images.projection_dtype))).flatten(0, 1)
        table = torch.cat([patches, images.sub_GN.view(1, -1), images.glb_GN.view(1, -1)])
        return images.img_projection(table[layout_by_arithmetic(rows, columns, slots, images.side)])


class EmbeddingGraph(nn.Module):
    """Words from the table, and image features where Microsoft's negative ids stand, in their order."""

    def __init__(self, words: torch.Tensor) -> None:
        super().__init__()
        self.words = words

    def forward(self, input_ids: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        """Int32 `[B, S]` and `[T, H]` to `[B, S, H]`; the features are row 0's first.

        Example: `[[5, -1, -1, 7]]` with features a and b gives word 5, a, b, word 7. T may be 0.
        """
        is_image = input_ids < 0
        rows = torch.cat([image_features, image_features.new_zeros(1, image_features.shape[1])])  # never none at all
        order = is_image.flatten().to(torch.int64).cumsum(0).view(is_image.shape) - 1
        features = rows[torch.where(is_image, order, 0)]
        words = nn.functional.embedding(torch.where(is_image, 0, input_ids), self.words)
        return torch.where(is_image[..., None], features, words)


def write_vision(config: Any, merged: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes `vision.onnx` of the weights in `merged`, which it takes in float32 and computes in `dtype`."""
    embedding = Phi3VImageEmbedding(config)
    embedding.load_state_dict(_weights_below("model.vision_embed_tokens.", merged))
    pixels, sizes = torch.zeros(2, 5, 3, 336, 336), torch.tensor([[336, 672], [672, 672]])
    images, slots = Dim("images", min=1), Dim("slots", min=2)
    _write(
        VisionGraph(embedding.to(dtype)),
        {"pixel_values": pixels, "image_sizes": sizes},
        "image_features",
        {"pixel_values": {0: images, 1: slots}, "image_sizes": {0: images}},
        folder / VISION,
    )


def write_embedding(merged: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes `embedding.onnx` of the weights in `merged`, in `dtype`."""
    words = _weights_below("model.embed_tokens.", merged)["weight"].to(dtype)
    inputs = {
        "input_ids": torch.tensor([[5, -1, -1, 7], [5, -1, 7, 7]], dtype=torch.int32),
        "image_features": words.new_zeros(3, words.shape[1]),
    }
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "image_features": {0: Dim.DYNAMIC}}
    _write(EmbeddingGraph(words), inputs, "inputs_embeds", shapes, folder / EMBEDDING)


def _weights_below(prefix: str, merged: Path) -> dict[str, torch.Tensor]:
    """The weights whose names begin so, without that: "model.norm." -> {"weight": w}."""
    places = {name: file for name, file in weight_files(merged).items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in read_weights(places)}


def _write(module: nn.Module, inputs: dict[str, torch.Tensor], output: str, shapes: Any, path: Path) -> None:
    """Traces a module and writes its graph, the weights in a file beside it."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval().requires_grad_(False),
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it names the files of this machine
    program.save(path, external_data=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what the exporter says of torchvision's absence and of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
