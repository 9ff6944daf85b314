"""Names by pixels and weights, features made once, and batches of which only a part is kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config

from phi3v.data.collate import Collator
from phi3v.features.collate import CollateFeatures, use_features
from phi3v.features.store import FeatureMemory
from phi3v.features.vision import (
    Picture,
    VisionFeatures,
    image_name,
    images_of,
    sees_alike_all_the_time,
    sees_plainly,
    vision_digest,
)
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.placement_phi3_v import missing_images
from phi3v.tuning import attach_lora

Example = dict[str, Any]
GRIDS = ((1, 1), (1, 2), (2, 1))


def make_model() -> Phi3VForCausalLM:
    torch.manual_seed(0)
    return Phi3VForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return make_model()


def make_example(model: Phi3VForCausalLM, grids: tuple[tuple[int, int], ...], seed: int) -> Example:
    """A sample with images of these crop grids, of real pixels in real slots and rubbish in padded ones."""
    generator = torch.Generator().manual_seed(seed)
    most = max((rows * columns for rows, columns in grids), default=0)
    sizes = torch.tensor([[rows * 336, columns * 336] for rows, columns in grids]).view(-1, 2)
    counts = model.model.vision_embed_tokens.token_counts(sizes)
    ids = [1, *(token for count in counts for token in [*[model.config.image_token_id] * count, 7]), 8, 9]
    example = {"input_ids": torch.tensor(ids), "labels": torch.tensor([*[-100] * (len(ids) - 2), 8, 9])}
    if grids:
        example["pixel_values"] = torch.randn(len(grids), most + 1, 3, 336, 336, generator=generator)
        example["image_sizes"] = sizes
    return example


def vision_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return list(model.model.vision_embed_tokens.named_parameters())


def test_one_changed_pixel_has_another_name(model: Phi3VForCausalLM) -> None:
    example = make_example(model, ((1, 1), (1, 2)), seed=1)
    found = VisionFeatures(model, FeatureMemory(10**9)).names(example)
    assert len(set(found)) == 2 == len(found) and all(len(one) == 64 for one in found)
    again = VisionFeatures(model, FeatureMemory(1)).names(example)
    assert again == found
    pixels = example["pixel_values"]
    for image, crop, place in ((0, 0, (0, 0, 0)), (0, 1, (2, 335, 335)), (1, 2, (1, 100, 7))):
        value = pixels[image, crop][place].clone()
        pixels[image, crop][place] = torch.nextafter(value, torch.tensor(9.0))
        changed = VisionFeatures(model, FeatureMemory(1)).names(example)
        assert [one != two for one, two in zip(changed, found, strict=True)] == [image == 0, image == 1]
        pixels[image, crop][place] = value
    pixels[0, 2] = 5.0  # a slot of padding, which the tower never sees
    assert VisionFeatures(model, FeatureMemory(1)).names(example) == found
    first = images_of(example)[0]
    others = [
        replace(first, size=(336, 672)),
        Picture({"pixel_values": first.parts["pixel_values"].bfloat16()}, first.size),
    ]
    assert len({image_name("w", first), image_name("v", first), *(image_name("w", other) for other in others)}) == 4


def test_one_changed_weight_has_another_digest() -> None:
    model = make_model()
    found = {vision_digest(model, None)}
    for number, (_, weight) in enumerate(vision_weights(model), start=2):
        with torch.no_grad():
            last = weight.view(-1)[-1]
            last.copy_(torch.nextafter(last, torch.tensor(9.0)))
        found.add(vision_digest(model, None))
        assert len(found) == number
    assert {"sub_GN", "glb_GN", "img_projection.2.bias"} <= {name for name, _ in vision_weights(model)}
    before = vision_digest(model, None)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert vision_digest(model, None) == before
    assert vision_digest(model, torch.bfloat16) != before
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    for owner, name, other in ((tower, "layers_read", 1), (tower.config, "_attn_implementation", "eager")):
        kept = getattr(owner, name)
        assert kept != other
        setattr(owner, name, other)
        assert vision_digest(model, None) != before, name
        setattr(owner, name, kept)
    assert vision_digest(model, None) == before
    assert vision_digest(model.bfloat16(), None) != before


def test_an_adapter_on_the_language_model_changes_no_name_and_one_on_the_vision_parts_is_seen() -> None:
    base = make_model()
    before = vision_digest(base, None)
    assert sees_plainly(base) and not sees_alike_all_the_time(base)  # all of it would train
    tuned = attach_lora(base, {"r": 2})
    assert VisionFeatures(tuned, FeatureMemory(1)).weights == before
    assert sees_plainly(tuned) and sees_alike_all_the_time(tuned)
    trained = attach_lora(make_model(), {"r": 2}, projector="train")
    assert not sees_plainly(trained) and not sees_alike_all_the_time(trained)


def test_features_are_made_once_and_are_the_models_own(model: Phi3VForCausalLM) -> None:
    example = make_example(model, ((1, 1), (1, 2)), seed=2)
    features = VisionFeatures(model, FeatureMemory(10**9))
    first, second = features.complete(example), features.complete(example)
    assert features.computed == 2 and "pixel_values" not in first and "pixel_values" in example
    with torch.no_grad():
        own = [
            model.get_image_features(**one.parts, image_sizes=torch.tensor([one.size])).last_hidden_state
            for one in images_of(example)
        ]
    for found in (first, second):
        assert torch.equal(found["image_features"], torch.cat(own)) and not found["image_features"].requires_grad
    assert features.complete({"input_ids": torch.tensor([1])}) == {"input_ids": torch.tensor([1])}
    assert [features.size_of(one.size) for one in images_of(example)] == [one.nbytes for one in own]
    little = VisionFeatures(model, FeatureMemory(own[0].nbytes))
    assert torch.equal(little.complete(example)["image_features"], first["image_features"])
    little.complete(example)
    assert (little.computed, little.refused) == (3, 2)  # the second image each time


def test_nothing_goes_through_the_tower_that_would_not_be_kept(model: Phi3VForCausalLM) -> None:
    example = make_example(model, ((1, 2), (1, 1)), seed=3)
    features = VisionFeatures(model, FeatureMemory(313 * 32 * 4))
    assert features.keep(example, features.names(example)) == [False, True] and features.computed == 1


def test_features_come_from_mixed_precision_where_the_training_uses_it(model: Phi3VForCausalLM) -> None:
    example = make_example(model, ((1, 1),), seed=4)
    features = VisionFeatures(model, FeatureMemory(10**9), autocast=torch.bfloat16)
    found = features.complete(example)["image_features"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own = model.get_image_features(example["pixel_values"], example["image_sizes"]).last_hidden_state
    assert found.dtype == torch.bfloat16 and torch.equal(found, own)
    assert features.size_of((336, 336)) == found.nbytes


@pytest.mark.parametrize(
    ("features", "counts", "missing"),
    [
        ([5, None, 4], [2, 3, 6, 4], [2]),
        ([None, None], [3, 3], [0, 1]),
        ([None, 6], [3, 6], [0]),
        ([9], [2, 3, 4], []),
    ],
)
def test_which_images_have_no_features(features: list, counts: list[int], missing: list[int]) -> None:
    given = [None if rows is None else torch.zeros(rows, 2) for rows in features]
    assert missing_images(given, counts) == missing


@pytest.mark.parametrize(
    ("features", "counts"),
    [([4, None], [2, 3, 6]), ([5], [2, 3, 6]), ([None, None], [3]), ([5, None], [5]), ([5, 1], [5])],
)
def test_features_of_other_images_are_refused(features: list, counts: list[int]) -> None:
    given = [None if rows is None else torch.zeros(rows, 2) for rows in features]
    with pytest.raises(ValueError, match="do not match: images of"):
        missing_images(given, counts)


KEPT = {
    "all": lambda row, image: True,
    "none": lambda row, image: False,
    "of some rows": lambda row, image: row == 2,
    "of some images of a row": lambda row, image: (row, image) in ((0, 1), (2, 0)),
}


def mixed(model: Phi3VForCausalLM, examples: list[Example], kept: Callable[[int, int], bool]) -> list[Example]:
    """The examples with the features of some images in place of their pixels."""
    features = VisionFeatures(model, FeatureMemory(10**9))
    changed = []
    for row, example in enumerate(examples):
        images = enumerate(images_of(example))
        found = [features.compute(one) if kept(row, image) else None for image, one in images]
        changed.append(use_features(example, found) if found else example)
    return changed


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_batch_of_features_and_pixels_is_the_batch_of_pixels(model: Phi3VForCausalLM, kept: Any) -> None:
    examples = [make_example(model, grids, seed) for seed, grids in enumerate((GRIDS, (), GRIDS[:1], GRIDS[1:]))]
    collate = CollateFeatures(Collator(pad_token_id=0))
    plain, batch = collate(examples), collate(mixed(model, examples, kept))
    wanted = {"all": torch.Tensor, "none": type(None)}.get(next(k for k, v in KEPT.items() if v is kept), list)
    assert isinstance(batch.get("image_features"), wanted) and ("pixel_values" in batch) == (wanted is not torch.Tensor)
    assert torch.equal(batch["image_sizes"], plain["image_sizes"])
    with torch.no_grad():
        expected, found = model(**plain), model(**batch)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_views_of_the_whole_may_be_apart() -> None:
    """Sub crops as bytes, all images one after the other, as what travels to a device."""
    crops, views = torch.arange(4).to(torch.uint8), torch.tensor([0.5, 1.5, 2.5])
    example = {
        "pixel_values": crops.view(4, 1, 1, 1).expand(4, 3, 336, 336),
        "global_views": views.view(3, 1, 1, 1).expand(3, 3, 336, 336),
        "image_sizes": torch.tensor([[336, 336], [336, 672], [336, 336]]),
    }
    found = [
        (one.parts["pixel_values"][:, 0, 0, 0].tolist(), one.parts["global_views"][:, 0, 0, 0].tolist())
        for one in images_of(example)
    ]
    assert found == [([0], [0.5]), ([1, 2], [1.5]), ([3], [2.5])]
    assert len({image_name("w", one) for one in images_of(example)}) == 3
    kept = torch.zeros(313, 8)
    mixed = use_features(example, [None, kept, None])
    assert mixed["pixel_values"][:, 0, 0, 0].tolist() == [0, 3] and mixed["image_features"][1] is kept
    assert mixed["global_views"][:, 0, 0, 0].tolist() == [0.5, 2.5]
    assert set(use_features(example, [kept, kept, kept])) == {"image_features", "image_sizes"}
    assert use_features(example, [None] * 3) is example


def test_generation_goes_on_from_a_mixed_batch(model: Phi3VForCausalLM) -> None:
    examples = [make_example(model, grids, seed) for seed, grids in enumerate((GRIDS[:2], GRIDS[2:]))]
    collate = CollateFeatures(Collator(pad_token_id=0, padding_side="left"))
    plain, batch = collate(examples), collate(mixed(model, examples, KEPT["of some images of a row"]))
    assert isinstance(batch["image_features"], list)
    answers = [
        model.generate(
            **{k: v for k, v in one.items() if k != "labels"}, max_new_tokens=3, num_beams=2, do_sample=False
        )
        for one in (plain, batch)
    ]
    assert torch.equal(*answers)


def test_images_without_features_and_without_pixels_are_refused(model: Phi3VForCausalLM) -> None:
    sizes = torch.tensor([[336, 336]])
    with pytest.raises(ValueError, match=r"leave images \[0\] open, and no pixel_values were given"):
        model.model.fill_features([None], None, sizes)
