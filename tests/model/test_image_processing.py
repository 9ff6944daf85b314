"""Pixels against the original code's, and the inputs and settings that people hand to an image processor."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from golden_inputs import digest, draw_image
from PIL import Image
from transformers import AutoImageProcessor

from phi3v.errors import ImageError
from phi3v.image_tokens import num_image_tokens
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor, draw_canvas
from phi3v.model.register import register

VISION, VISION_35 = "Phi-3-vision-128k-instruct", "Phi-3.5-vision-instruct"


@pytest.fixture(scope="module")
def record(golden):
    return json.loads((golden / "processor.json").read_text())


@pytest.fixture(scope="module")
def pictures(record):
    drawn = {spec["name"]: draw_image(spec) for spec in record["images"]}
    for spec in record["images"]:
        assert digest(np.asarray(drawn[spec["name"]])) == spec["sha256"], "the test image itself is wrong"
    return drawn


@pytest.fixture(scope="module")
def photo():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("num_crops", [4, 16])
def test_pixels_of_the_original(record, pictures, golden, num_crops):
    views = np.load(golden / "global_views.npz")
    processor = Phi3VImageProcessor(num_crops=num_crops)
    for spec in record["images"]:
        name, expected = spec["name"], spec["results"][str(num_crops)]
        out = processor(pictures[name], return_tensors="pt")
        pixels, used = out["pixel_values"][0].numpy(), expected["used_sub_crops"]
        assert out["pixel_values"].shape == (1, num_crops + 1, 3, 336, 336)
        assert out["image_sizes"].tolist() == [expected["image_sizes"]]
        assert (out["pixel_values"].dtype, out["image_sizes"].dtype) == (torch.float32, torch.int64)
        assert out["num_img_tokens"].tolist() == [expected["num_img_tokens"]], name
        assert digest(pixels[1 : 1 + used]) == expected["sha256_sub_crops_f32"], name
        assert not pixels[1 + used :].any(), name
        view = views[f"{name}.c{num_crops}"]
        np.testing.assert_allclose(pixels[0, :, 3::8, 2::8], view, rtol=0, atol=1e-6, err_msg=name)


def test_whole_views_and_canvases_of_the_original(pictures, shared):
    arrays = np.load(shared / "phi3v" / "golden" / "processor_arrays.npz")
    processor = Phi3VImageProcessor(num_crops=4)
    whole_views = [key for key in arrays if key.endswith(".c4.global_f32")]
    canvases = [key for key in arrays if key.endswith(".c4.canvas_u8")]
    assert len(whole_views) == 3 and len(canvases) == 5
    for key in whole_views:
        view = processor(pictures[key.split(".")[0]])["pixel_values"][0, 0]
        np.testing.assert_allclose(view, arrays[key], rtol=0, atol=1e-6, err_msg=key)
    for key in canvases:
        picture = pictures[key.split(".")[0]].convert("RGB")
        np.testing.assert_array_equal(draw_canvas(picture, 4), arrays[key], err_msg=key)


def test_several_images_in_one_call_are_the_original_stack(record, pictures):
    batch = record["batch_call"]
    images = [pictures[name] for name in batch["names"]]
    out = Phi3VImageProcessor(num_crops=batch["num_crops"])(images, return_tensors="pt")
    assert out["image_sizes"].tolist() == batch["image_sizes"]
    assert out["num_img_tokens"].tolist() == batch["num_img_tokens"]
    singles = [Phi3VImageProcessor(num_crops=4)(pictures[name])["pixel_values"] for name in batch["names"]]
    np.testing.assert_array_equal(out["pixel_values"].numpy(), np.concatenate(singles))


def test_padding_to_the_largest_grid_keeps_everything_but_zeros(pictures):
    images = [pictures["wide"], pictures["tall"]]  # 3 crops each, of at most 4
    padded = Phi3VImageProcessor(num_crops=4)(images, return_tensors="pt")
    tight = Phi3VImageProcessor(num_crops=4)(images, pad_crops=False, return_tensors="pt")
    assert tight["pixel_values"].shape == (2, 4, 3, 336, 336)
    assert torch.equal(tight["pixel_values"], padded["pixel_values"][:, :4]) and not padded["pixel_values"][:, 4].any()
    assert torch.equal(tight["image_sizes"], padded["image_sizes"])


def test_num_crops_is_a_setting_and_an_argument(photo):
    processor = Phi3VImageProcessor()
    assert processor.num_crops == 1 and processor(photo)["num_img_tokens"].tolist() == [313]
    assert processor(photo, num_crops=4)["num_img_tokens"].tolist() == [757]
    assert processor.num_crops == 1
    processor.num_crops = 16
    assert processor(photo)["num_img_tokens"].tolist() == [num_image_tokens(300, 200, 16)]
    assert processor.calc_num_image_tokens_from_image_size(300, 200) == num_image_tokens(300, 200, 16)
    assert processor.calc_num_image_tokens([photo, photo.rotate(90, expand=True)]) == [
        num_image_tokens(300, 200, 16),
        num_image_tokens(200, 300, 16),
    ]


def test_everything_people_call_an_image(photo, tmp_path):
    processor = Phi3VImageProcessor(num_crops=4)
    expected = processor(photo)["pixel_values"]
    array = np.asarray(photo)
    file = tmp_path / "photo.png"
    photo.save(file)
    png = io.BytesIO()
    photo.save(png, format="PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    tensor = torch.tensor(array)
    for form in (array, array.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), str(file), encoded):
        np.testing.assert_array_equal(processor(form)["pixel_values"], expected)
    stack = np.stack([array, array])
    for form in (stack, torch.tensor(stack), [photo, array], [[photo], [], [[photo]]], (photo, photo)):
        np.testing.assert_array_equal(processor(form)["pixel_values"], np.concatenate([expected, expected]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_modes_follow_pil(photo, mode):
    image = photo.convert("L").convert(mode) if mode in ("I;16", "F", "LA", "1") else photo.convert(mode)
    processor = Phi3VImageProcessor(num_crops=1)
    np.testing.assert_array_equal(processor(image)["pixel_values"], processor(image.convert("RGB"))["pixel_values"])


def test_grey_arrays_are_grey_images(photo):
    processor = Phi3VImageProcessor(num_crops=1)
    grey = photo.convert("L")
    expected = processor(grey)["pixel_values"]
    for form in (np.asarray(grey), np.asarray(grey)[..., None], torch.tensor(np.asarray(grey))[None]):
        np.testing.assert_array_equal(processor(form)["pixel_values"], expected)


def test_the_callers_images_are_not_changed(photo):
    array = np.asarray(photo).copy()
    before = array.copy()
    tensor = torch.tensor(array)
    image = Image.fromarray(before.copy())
    Phi3VImageProcessor(num_crops=4)([array, tensor, image])
    assert np.array_equal(array, before) and np.array_equal(tensor.numpy(), before)
    assert np.array_equal(np.asarray(image), before) and image.mode == "RGB"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image to process"),
        ([[], []], "no image to process"),
        ([Image.new("RGB", (8, 8)), None], "image 1 is a NoneType"),
        ({"image": 1}, "image 0 is a dict"),
        (np.zeros((8, 8, 3), dtype=np.float32), "uint8 values 0..255, not float32"),
        (np.zeros((8, 8, 5), dtype=np.uint8), "no axis of 1, 3 or 4 channels"),
        (np.zeros(8, dtype=np.uint8), "must have 2 or 3 axes"),
        (Image.new("RGB", (3000, 1)), "3000x1 pixels is too narrow"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(images, message):
    with pytest.raises(ImageError, match=message) as caught:
        Phi3VImageProcessor(num_crops=1)(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"do_resize": False}, {"do_normalize": False}, {"size": 224}, {"num_crops": 0}])
def test_settings_the_model_has_never_seen_are_refused(photo, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Phi3VImageProcessor(num_crops=1)(photo, **setting)


@pytest.mark.parametrize(("return_tensors", "kind"), [(None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_return_tensors(photo, return_tensors, kind):
    out = Phi3VImageProcessor(num_crops=1)(photo, return_tensors=return_tensors)
    assert set(out) == {"pixel_values", "image_sizes", "num_img_tokens"}
    assert all(isinstance(value, kind) for value in out.values())


@pytest.mark.parametrize(("name", "num_crops"), [(VISION, 16), (VISION_35, 4)])
def test_the_hub_files_load_and_survive_a_round_trip(shared, tmp_path, name, num_crops):
    register()
    folder = shared / "phi3v" / "hub" / name
    for processor in (Phi3VImageProcessor.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)):
        assert type(processor) is Phi3VImageProcessor
        assert processor.num_crops == num_crops and not hasattr(processor, "auto_map")
        np.testing.assert_allclose(processor.image_std, [0.26862954, 0.26130258, 0.27577711])
    assert AutoImageProcessor.from_pretrained(folder, num_crops=7).num_crops == 7
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "Phi3VImageProcessor"


def test_a_saved_image_processor_is_found_by_its_name(tmp_path, photo):
    register()
    Phi3VImageProcessor(num_crops=3, pad_crops=False).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert (type(again), again.num_crops, again.pad_crops) == (Phi3VImageProcessor, 3, False)
    assert again(photo)["pixel_values"].shape[1] == 2
