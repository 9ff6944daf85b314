"""`image.fast`: the same pictures within one grey level, from file to tensors, and recorded where it was used."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_images import encoded, odd_images
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.data.encode import encode, encode_prompt
from phi3v.data.fast_jpeg import decode_jpeg
from phi3v.data.images import open_image, open_pixels
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.errors import ImageError
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.pixels_phi3_v import draw_canvas
from phi3v.model.processing_phi3_v import Phi3VProcessor

needs_simplejpeg = pytest.mark.skipif(
    importlib.util.find_spec("simplejpeg") is None, reason="needs simplejpeg (pip install phi3v[fast])"
)
GREY = 1 / 255 / 0.26130258  # a grey level in normalised values, the largest of the three channels


def pictures() -> dict[str, Image.Image]:
    """Noise, smooth noise, gradients and flat colours, of even, odd and extreme sizes."""
    dice = np.random.default_rng(4)
    found: dict[str, Image.Image] = {}
    for width, height in ((336, 336), (337, 335), (1200, 901), (899, 1201), (2500, 40), (3, 700), (1, 1), (17, 5)):
        noise = dice.integers(0, 256, (height, width, 3), dtype=np.uint8)
        coarse = Image.fromarray(dice.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8))
        ramp = np.add.outer(np.linspace(0, 128, height), np.linspace(0, 127, width)).astype(np.uint8)
        name = f"{width}x{height}"
        found[f"noise {name}"] = Image.fromarray(noise)
        found[f"photo-like {name}"] = coarse.resize((width, height), Image.Resampling.BICUBIC)
        found[f"gradient {name}"] = Image.fromarray(np.stack([ramp, ramp.max() - ramp, ramp // 2], axis=2))
        found[f"flat {name}"] = Image.new("RGB", (width, height), (255, 0, 127))
    return found


PICTURES = pictures()


@pytest.mark.parametrize("num_crops", [1, 16])
def test_canvases_are_within_one_grey_level(num_crops: int) -> None:
    """Of white noise, which no camera makes, one value in a million may be two levels off."""
    for name, picture in PICTURES.items():
        exact = draw_canvas(picture, num_crops)
        fast = draw_canvas(np.asarray(picture), num_crops, True)
        assert fast.shape == exact.shape and fast.dtype == np.uint8
        apart = np.abs(fast.astype(np.int16) - exact)
        kind = name.split()[0]
        assert apart.max() <= {"flat": 0, "gradient": 1, "photo-like": 1, "noise": 2}[kind], name
        assert (apart > 1).sum() <= apart.size * 1e-6


def test_tensors_are_within_one_grey_level() -> None:
    """Crops, and views of the whole but for a few values in a million; a view weighs 16 pixels that may all be off."""
    images = [picture for name, picture in PICTURES.items() if name.startswith(("photo-like", "gradient"))]
    exact = Phi3VImageProcessor(num_crops=16)(images, return_tensors="pt")
    fast = Phi3VImageProcessor(num_crops=16, fast=True)(images, return_tensors="pt")
    assert torch.equal(fast["image_sizes"], exact["image_sizes"])
    assert torch.equal(fast["num_img_tokens"], exact["num_img_tokens"])
    apart = (fast["pixel_values"] - exact["pixel_values"]).abs()
    assert 0 < apart[:, 1:].max() <= 1.001 * GREY
    assert apart[:, 0].max() <= 1.4 * GREY and (apart[:, 0] > 1.001 * GREY).float().mean() < 1e-6
    mixed = Phi3VImageProcessor(num_crops=16)(images, fast=True, return_tensors="pt")
    assert torch.equal(mixed["pixel_values"], fast["pixel_values"])
    for name in ("noise 1200x901", "noise 899x1201"):
        one, other = (Phi3VImageProcessor(num_crops=16, fast=fast)(PICTURES[name]) for fast in (False, True))
        apart = torch.as_tensor(np.abs(one["pixel_values"][0, 0] - other["pixel_values"][0, 0]))
        assert apart.max() <= 1.42 * GREY and (apart > 1.001 * GREY).float().mean() < 1e-4, name


def test_arrays_and_images_are_one_in_both_ways() -> None:
    picture = PICTURES["noise 337x335"]
    array = np.asarray(picture)
    forms = (array, array[::-1][::-1], array.transpose(2, 0, 1), np.asfortranarray(array), torch.tensor(array))
    for fast in (False, True):
        processor = Phi3VImageProcessor(num_crops=4, fast=fast)
        wanted = processor(picture)["pixel_values"]
        for form in forms:
            np.testing.assert_array_equal(processor(form)["pixel_values"], wanted)
        assert processor.calc_num_image_tokens([picture, array]) == [757, 757]


@needs_simplejpeg
@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_give_the_same_upright_pixels(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for picture in (PICTURES["photo-like 337x335"], PICTURES["gradient 17x5"].convert("L")):
        for options in ({"quality": 90}, {"quality": 40, "subsampling": 0}, {"progressive": True}):
            data = encoded(picture, "JPEG", exif=exif, **options)
            fast = open_pixels(data)
            assert isinstance(fast, np.ndarray)
            np.testing.assert_array_equal(fast, np.asarray(open_image(data)))


def test_every_file_opens_or_fails_as_in_the_exact_way(shared: Path) -> None:
    files = json.loads((shared / "badimages" / "manifest.json").read_text())["files"]
    arrays = 0
    for file in files:
        path, answers = shared / "badimages" / "files" / file["name"], []
        for opener in (open_image, open_pixels):
            try:
                answers.append(opener(path))
            except ImageError as error:
                answers.append(str(error))
        exact, fast = answers
        arrays += isinstance(fast, np.ndarray)
        if isinstance(exact, str):
            assert fast == exact
        else:
            np.testing.assert_array_equal(np.asarray(fast), np.asarray(exact), err_msg=file["name"])
    assert (arrays > 15) == (importlib.util.find_spec("simplejpeg") is not None)


def test_odd_files_open_alike_with_and_without_the_fast_decoder() -> None:
    for name, (data, size) in odd_images().items():
        fast = open_pixels(ImageRef(name, data=data))
        np.testing.assert_array_equal(np.asarray(fast), np.asarray(open_image(data)), err_msg=name)
        assert np.asarray(fast).shape == (size[1], size[0], 3)


@needs_simplejpeg
def test_a_jpeg_that_is_not_sound_is_left_to_the_exact_decoder() -> None:
    data = encoded(PICTURES["photo-like 337x335"], "JPEG")
    assert decode_jpeg(data) is not None
    assert decode_jpeg(data[: len(data) // 2]) is None and decode_jpeg(b"no picture") is None
    with pytest.raises(ImageError, match="truncated"):
        open_pixels(data[: len(data) // 2])


def test_rows_are_encoded_fast_when_the_processor_says_so() -> None:
    photo = ImageRef("a.jpg", data=encoded(PICTURES["photo-like 899x1201"], "JPEG"))
    turns = (Message("user", (ImagePart(0), TextPart("what"))), Message("assistant", (TextPart("yes"),)))
    row = Row(turns, (photo,), {}, "set", 0)
    exact, fast = (
        Phi3VProcessor(Phi3VImageProcessor(num_crops=4, fast=fast), build_tokenizer()) for fast in (False, True)
    )
    for make in (encode, encode_prompt):
        one, other = make(row, exact), make(row, fast)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if name != "pixel_values")
        apart = (one["pixel_values"] - other["pixel_values"]).abs()
        assert 0 < apart[:, 1:].max() <= 1.001 * GREY
    limited: Any = encode(row, fast, max_length=400, on_too_long="fewer_crops")
    assert limited["image_sizes"].tolist() == [[336, 336]]


def test_saved_processors_say_how_they_resize(tmp_path: Path) -> None:
    for fast in (False, True):
        Phi3VImageProcessor(num_crops=4, fast=fast).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())["fast"] is fast
        assert Phi3VImageProcessor.from_pretrained(tmp_path).fast is fast
