"""Pixels for Phi-3-V: one image becomes a view of the whole and up to `num_crops` crops of 336 x 336.

In: PIL images, arrays, paths or URLs, as transformers takes them. Out: `pixel_values`, `image_sizes`, `num_img_tokens`.
Resizing is PIL's, bit for bit what the original did, unless `fast` is set (see `pixels_phi3_v`). No torchvision. What
an image file means (EXIF rotation, alpha, depth) is decided where images are opened: a PIL image is taken as it is,
`convert("RGB")` and nothing else.

Shape letters: N images, K crop slots (1 + crops), C 3 channels, H and W 336 unless a line says canvas.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from phi3v.errors import ImageError
from phi3v.image_tokens import CROP_SIZE, crop_grid, grid_tokens, num_image_tokens

from .pixels_phi3_v import draw_canvas, fill_bytes, fill_crops, image_size


class Phi3VImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings of the image processor, at construction, in `preprocessor_config.json` or for one call.

    Attributes:
        num_crops: The most crops an image is cut into: 16 for Phi-3-vision, 4 for Phi-3.5-vision, 1 when not said.
        pad_crops: True pads every image to `num_crops` + 1 crop slots with zeros, as the original; False only to the
            largest grid of the call, which is all the model needs.
        fast: True resizes with torch, in a third of the time; crops then differ by at most one grey level.
        byte_crops: True gives sub crops as bytes, without gaps, and the views of the whole beside them, for a model
            that normalises where it computes (see `crops_phi3_v`).
    """

    num_crops: int | None
    pad_crops: bool | None
    fast: bool | None
    byte_crops: bool | None


class Phi3VImageProcessor(PilBackend):
    """Cuts images into crops as Phi-3-V was trained on them.

    Example: `Phi3VImageProcessor(num_crops=4)(image, return_tensors="pt")` with an image of 1000 x 300 pixels gives
    `pixel_values` [1, 5, 3, 336, 336] (view of the whole, 3 crops, 1 crop of zeros), `image_sizes` [[336, 1008]] and
    `num_img_tokens` [601].
    """

    valid_kwargs = Phi3VImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes", "num_img_tokens"]

    do_convert_rgb = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    num_crops = 1
    pad_crops = True
    fast = False
    byte_crops = False

    def __init__(self, **kwargs: Unpack[Phi3VImageProcessorKwargs]) -> None:
        """Takes the keys of Microsoft's `preprocessor_config.json` too.

        Its `num_img_tokens` (always 144, features per crop) and `auto_map` (remote code, never run) are not kept.
        """
        settings: dict[str, Any] = {**kwargs}
        for unused in ("num_img_tokens", "auto_map"):
            settings.pop(unused, None)
        super().__init__(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings to save, with the `num_img_tokens` (144) that Microsoft's own processor asks for."""
        return {**super().to_dict(), "num_img_tokens": 144}

    @property
    def normalises_as_clip(self) -> bool:
        """Whether mean and std are CLIP's, as the model's own normalisation of `byte_crops` has them."""
        return _as_clip(self.image_mean, self.image_std)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Image tokens of an image of this size, at this processor's `num_crops`. Example: 601 for 1000 x 300 at 4."""
        return num_image_tokens(width, height, self.num_crops)

    def calc_num_image_tokens(self, images: ImageInput) -> list[int]:
        """Image tokens of each image, at this processor's `num_crops`, without making pixels."""
        prepared = self._prepare_image_like_inputs(images)
        return [num_image_tokens(*image_size(image), self.num_crops) for image in prepared]

    def process_image(
        self, image: ImageInput, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> Image.Image | np.ndarray:
        """One PIL image, array or tensor as an RGB image; PIL's own rules decide about modes.

        Arrays and tensors are uint8, [height, width], [height, width, channels] or [channels, height, width] with 1, 3
        or 4 channels; the layout is inferred when `input_data_format` does not say it.

        Returns:
            A PIL image, or what was an RGB array as [height, width, 3].

        Raises:
            ImageError: The array is not uint8 or has another shape.
        """
        if isinstance(image, Image.Image):
            return image if image.mode == "RGB" else image.convert("RGB")
        pixels = image.numpy(force=True) if isinstance(image, torch.Tensor) else np.asarray(image)
        if pixels.dtype != np.uint8:
            raise ImageError(
                f"an image array must hold uint8 values 0..255, not {pixels.dtype}: convert it or pass PIL"
            )
        if pixels.ndim == 3:
            if not {1, 3, 4} & {pixels.shape[0], pixels.shape[-1]}:
                raise ImageError(f"an image array of shape {list(pixels.shape)} has no axis of 1, 3 or 4 channels")
            layout = input_data_format or infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
            pixels = np.moveaxis(pixels, 0, -1) if ChannelDimension(layout) is ChannelDimension.FIRST else pixels
            if pixels.shape[-1] == 3:
                return pixels
            pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        elif pixels.ndim != 2:
            raise ImageError(f"an image array must have 2 or 3 axes, not shape {list(pixels.shape)}")
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")

    def flatten_images(self, images: ImageInput) -> list[ImageInput]:
        """Every image of an image, a list, nested lists or a stack [N, ...], in order; paths and URLs are opened.

        Raises:
            ImageError: Something in there is no image; the message counts images from 0.
        """
        flat: list[ImageInput] = []
        for image in _leaves(images):
            if not isinstance(image, str | Image.Image | np.ndarray | torch.Tensor):
                kind = type(image).__name__
                raise ImageError(f"image {len(flat)} is a {kind}: pass a PIL image, an array, a path or a URL")
            flat.append(self.fetch_images(image) if isinstance(image, str) else image)
        return flat

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[ImageInput]:
        """The flat list that transformers' preprocessing walks over."""
        flat = self.flatten_images(images)
        if not flat:
            raise ImageError("no image to process: the list is empty")
        return flat

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        """Refuses settings that would make pixels the model has never seen, instead of ignoring them."""
        for setting in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
            if kwargs.get(setting) is False:
                raise ValueError(
                    f"{setting}=False is not possible: Phi-3-V's images are always converted and normalised"
                )
        for setting in ("size", "crop_size", "pad_size", "resample", "do_center_crop", "do_pad"):
            if kwargs.get(setting):
                raise ValueError(f"{setting} cannot be set: num_crops alone decides the size of Phi-3-V's images")
        if kwargs.get("byte_crops") and not _as_clip(kwargs["image_mean"], kwargs["image_std"]):
            raise ValueError(
                "byte_crops are normalised by the model, with CLIP's mean and std: this processor has others"
            )
        num_crops = kwargs["num_crops"]
        if num_crops is None or num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, not {num_crops}")
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess(
        self,
        images: list[Image.Image | np.ndarray],
        num_crops: int,
        pad_crops: bool,
        fast: bool,
        byte_crops: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """RGB images to the model's inputs.

        Returns:
            `pixel_values` float32 [N, K, 3, 336, 336]: view of the whole, crops row by row, then zeros. `image_sizes`
            int64 [N, 2]: height and width of the canvas in pixels. `num_img_tokens` int64 [N]. With `byte_crops`
            `pixel_values` are uint8 [C, 3, 336, 336], the crops of all images, and `global_views` float32
            [N, 3, 336, 336].
        """
        grids = [crop_grid(*image_size(image), num_crops) for image in images]
        mean = torch.tensor(image_mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(image_std, dtype=torch.float32).view(3, 1, 1)
        canvases = (draw_canvas(image, num_crops, fast).transpose(2, 0, 1) for image in images)
        if byte_crops:
            data = _in_bytes(canvases, grids, mean, std)
        else:
            slots = 1 + (num_crops if pad_crops else max(rows * columns for rows, columns in grids))
            pixel_values_NKCHW = torch.empty(len(images), slots, 3, CROP_SIZE, CROP_SIZE)
            for canvas_CHW, (rows, columns), crops_KCHW in zip(canvases, grids, pixel_values_NKCHW, strict=True):
                fill_crops(crops_KCHW, canvas_CHW, mean, std)
                crops_KCHW[1 + rows * columns :].zero_()
            data = {"pixel_values": pixel_values_NKCHW.numpy()}
        data["image_sizes"] = np.array(grids, dtype=np.int64) * CROP_SIZE
        data["num_img_tokens"] = np.array([grid_tokens(*grid) for grid in grids], dtype=np.int64)
        return BatchFeature(data=data, tensor_type=return_tensors)


def _as_clip(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether a normalisation is CLIP's."""
    return [*mean, *std] == [*OPENAI_CLIP_MEAN, *OPENAI_CLIP_STD]


def _in_bytes(
    canvases: Iterable[np.ndarray], grids: list[tuple[int, int]], mean: torch.Tensor, std: torch.Tensor
) -> dict[str, np.ndarray]:
    """`pixel_values` uint8 and `global_views` of images, from their canvases uint8 [3, height, width]."""
    counts = [rows * columns for rows, columns in grids]
    crops_CCHW = torch.empty(sum(counts), 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8)
    views_NCHW = torch.empty(len(grids), 3, CROP_SIZE, CROP_SIZE)
    for canvas_CHW, view_CHW, crops_KCHW in zip(canvases, views_NCHW, crops_CCHW.split(counts), strict=True):
        fill_bytes(view_CHW, crops_KCHW, canvas_CHW, mean, std)
    return {"pixel_values": crops_CCHW.numpy(), "global_views": views_NCHW.numpy()}


def _leaves(images: Any) -> Iterator[Any]:
    """Single images out of nested lists and of stacks [N, height, width, channels]."""
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim > 3):
        for image in images:
            yield from _leaves(image)
    else:
        yield images


__all__ = ["Phi3VImageProcessor"]
