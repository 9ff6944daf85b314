"""Crops in three forms are the same crops: padded floats, flat floats, bytes; and a frozen tower leaves no trace."""

from typing import Any

import numpy as np
import pytest
import torch
from golden_models import tiny_model
from PIL import Image
from tiny_prompts import prompt, without

from phi3v.model.crops_phi3_v import normalise_bytes, real_crops, seen_twice
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.vision_phi3_v import Phi3VVisionTransformer

SIZES = [(300, 200), (90, 400), (500, 500)]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in SIZES]


def in_forms(photos: list[Image.Image], **settings: Any) -> dict[str, dict[str, torch.Tensor]]:
    """`forward`'s image arguments for the same photos in each form."""
    processor = Phi3VImageProcessor(num_crops=4, **settings)
    padded = without(processor(photos, return_tensors="pt"), "num_img_tokens")
    in_bytes = without(processor(photos, byte_crops=True, return_tensors="pt"), "num_img_tokens")
    flat = {**padded, "pixel_values": real_crops(padded["pixel_values"], None, grids(padded), 336)}
    return {"padded": padded, "flat": flat, "bytes": in_bytes}


def grids(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    return [(height // 336, width // 336) for height, width in batch["image_sizes"].tolist()]


def all_levels() -> torch.Tensor:
    """Every grey level in every channel, `[1, 3, 16, 16]`."""
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()


def processors_arithmetic(levels: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(Phi3VImageProcessor.image_mean).view(3, 1, 1)
    std = torch.tensor(Phi3VImageProcessor.image_std).view(3, 1, 1)
    return levels.float().div_(255).sub_(mean).div_(std)


def test_bytes_become_the_processors_floats_to_the_last_bit() -> None:
    assert torch.equal(normalise_bytes(all_levels()), processors_arithmetic(all_levels()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bytes_become_the_same_floats_on_a_gpu() -> None:
    found = normalise_bytes(all_levels().cuda()).cpu()
    torch.testing.assert_close(found, processors_arithmetic(all_levels()), rtol=0, atol=2.4e-7)


@pytest.mark.parametrize("fast", [False, True])
def test_the_forms_hold_the_same_crops(photos: list[Image.Image], fast: bool) -> None:
    forms = in_forms(photos, fast=fast)
    assert forms["bytes"]["pixel_values"].dtype == torch.uint8
    counts = [rows * columns for rows, columns in grids(forms["padded"])]
    assert forms["bytes"]["pixel_values"].shape[0] == sum(counts) == forms["flat"]["pixel_values"].shape[0] - 3
    sent = sum(forms["bytes"][name].nbytes for name in ("pixel_values", "global_views"))
    assert sent < forms["flat"]["pixel_values"].nbytes / 2
    made = [real_crops(form["pixel_values"], form.get("global_views"), grids(form), 336) for form in forms.values()]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_the_model_gives_the_same_for_each_form(photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    forms, model = in_forms(photos), tiny_model()
    seen: list[tuple[int, ...]] = []
    original = Phi3VVisionTransformer.forward

    def spy(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append((*pixels.shape[:1], pixels.dtype))
        return original(self, pixels)

    monkeypatch.setattr(Phi3VVisionTransformer, "forward", spy)
    with torch.no_grad():
        made = [model.get_image_features(**form).last_hidden_state for form in forms.values()]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert seen == [(forms["flat"]["pixel_values"].shape[0], torch.float32)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_views": None}, "uint8 need global_views"),
        ({"image_sizes": [[336, 336]]}, "images of 1 crops in all"),
        ({"pixel_values": torch.zeros(2, 3, 336, 336)}, "float32 take no global_views"),
        ({"image_sizes": [[0, 336]]}, "grid of 0x1"),
        ({"global_views": torch.zeros(2, 3, 336, 336)}, "global_views 2 images"),
    ],
)
def test_forms_that_do_not_fit_are_refused(photos: list[Image.Image], change: dict, message: str) -> None:
    form = in_forms(photos[:1])["bytes"]
    with pytest.raises(ValueError, match=message):
        tiny_model().get_image_features(**{**form, **change})


def test_bytes_need_the_normalisation_that_the_model_knows(photos: list[Image.Image]) -> None:
    other = Phi3VImageProcessor(num_crops=1, image_mean=[0.5, 0.5, 0.5])
    assert Phi3VImageProcessor().normalises_as_clip and not other.normalises_as_clip
    with pytest.raises(ValueError, match="this processor has others"):
        other(photos[0], byte_crops=True)


def test_beams_need_one_row_of_crops_an_image() -> None:
    model, one = tiny_model(), without(prompt(0, [4, 9], [(1, 1)]), "labels")
    flat = {**one, "pixel_values": one["pixel_values"][0]}
    with pytest.raises(ValueError, match="flat crops are for training"):
        model.generate(**flat, num_beams=2, max_new_tokens=2)


def kept_for_backward(model: Phi3VForCausalLM, batch: dict) -> int:
    """Tensors that a backward pass through the images' features would find."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.get_image_features(batch["pixel_values"], batch["image_sizes"]).last_hidden_state
    assert features.requires_grad == bool(kept)
    return len(kept)


@pytest.mark.parametrize("asks", [False, True])
def test_a_frozen_tower_keeps_nothing(asks: bool) -> None:
    """Not even where checkpointing has every embedding, the tower's own too, ask for a gradient."""
    batch = prompt(0, [4, 9], [(1, 2)])
    model = tiny_model().train().requires_grad_(False)
    if asks:
        model.enable_input_require_grads()
        tower = model.model.vision_embed_tokens.img_processor.vision_model.embeddings
        assert tower.register_forward_hook(lambda module, given, made: made.requires_grad_(True))
    assert kept_for_backward(model, batch) == 0
    model.model.vision_embed_tokens.img_projection.requires_grad_(True)
    projector = kept_for_backward(model, batch)
    model.model.vision_embed_tokens.img_processor.requires_grad_(True)
    assert 0 < projector < 10 < kept_for_backward(model, batch)


def test_a_gradient_for_the_pixels_still_goes_through_a_frozen_tower() -> None:
    batch = prompt(0, [4, 9], [(1, 1)])
    pixels = batch["pixel_values"].requires_grad_(True)
    model = tiny_model().requires_grad_(False)
    model.get_image_features(pixels, batch["image_sizes"]).last_hidden_state.sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.any())


def test_an_image_of_one_crop_goes_through_the_tower_once(
    photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its view of the whole is that crop; one other pixel, and it is not."""
    images = without(Phi3VImageProcessor(num_crops=1)([photos[0], photos[2]], return_tensors="pt"), "num_img_tokens")
    assert images["image_sizes"].tolist() == [[336, 336]] * 2 and images["pixel_values"].shape[1] == 2
    model, seen = tiny_model().double(), []
    original = Phi3VVisionTransformer.forward
    monkeypatch.setattr(
        Phi3VVisionTransformer, "forward", lambda self, got: seen.append(len(got)) or original(self, got)
    )
    with torch.no_grad():
        found = model.get_image_features(**images).last_hidden_state
        monkeypatch.setattr("phi3v.model.vision_phi3_v.seen_twice", lambda crops, grids: [])
        plain = model.get_image_features(**images).last_hidden_state
        monkeypatch.undo()
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    assert seen == [2, 4]
    crops = real_crops(images["pixel_values"], None, grids(images), 336)
    assert seen_twice(crops, grids(images)) == [1, 3]
    crops[3, 2, 335, 335] += 1
    assert seen_twice(crops, grids(images)) == [1]
