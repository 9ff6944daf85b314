"""A batch equals its rows run alone, whatever mixes in it; work is spent on real crops and wanted logits only."""

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, PAD, batch_of, image_tokens, prompt, without
from torch.testing import assert_close

TOLERANCE = 1e-4
SIDES = ("left", "right")
MIXES = {
    "none_one_two_images": [([17],), ([4, 9], [(1, 1)]), ([2, 5, 21], [(1, 2), (1, 1)])],
    "grids_of_all_shapes": [([3, 6], [(2, 1)]), ([1, 7], [(1, 1)]), ([5, 4], [(2, 2)])],
    "images_side_by_side": [([6, 1, 12], [(1, 1), (1, 2)]), ([30],), ([2, 1, 1, 5], [(1, 1), (1, 1), (2, 1)])],
}


@pytest.fixture(scope="module", params=["negative ids", "image_token_id"])
def model(request):
    return tiny_model(image_token_id=None if request.param == "negative ids" else IMAGE)


def rows_of(model, mix: str) -> list[dict]:
    return [prompt(seed, *row, image_id=model.config.image_token_id) for seed, row in enumerate(MIXES[mix])]


def frozen_copy(batch: dict) -> dict:
    return {key: value.clone() for key, value in batch.items()}


def assert_untouched(batch: dict, before: dict) -> None:
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in before)


@pytest.mark.parametrize("mix", MIXES)
def test_forward_loss_and_gradients(model, mix):
    assert_batches_are_their_rows(model, rows_of(model, mix))


@pytest.mark.parametrize("few", [False, True], ids=["all logits", "trained logits"])
def test_labels_that_are_all_ids_of_a_row(few):
    """The first token of a row is predicted from nothing, whether padding stands before it or not."""
    model = tiny_model(image_token_id=IMAGE)
    rows = [prompt(0, [17], image_id=IMAGE), prompt(1, [4, 9], [(1, 1)], image_id=IMAGE)]
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == IMAGE, -100)
    assert_batches_are_their_rows(model, rows, trained_logits_only=few)
    with torch.no_grad():
        loss = sum(model(**row, num_items_in_batch=60).loss for row in rows)
        for side in SIDES:
            together = model(**batch_of(rows, side), num_items_in_batch=60, trained_logits_only=few)
            assert_close(together.loss, loss, rtol=0, atol=TOLERANCE)


def assert_batches_are_their_rows(model, rows: list[dict], **options) -> None:
    """Logits (where all are asked for), loss and gradients of both batches are those of their rows alone."""
    model.zero_grad()
    tokens = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    loss, logits = 0.0, []
    for row, count in zip(rows, tokens, strict=True):
        alone = model(**row)
        logits.append(alone.logits[0].detach())
        share = alone.loss * count / sum(tokens)
        share.backward()
        loss += share.item()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    for side in SIDES:
        batch = batch_of(rows, side)
        before = frozen_copy(batch)
        model.zero_grad()
        together = model(**batch, **options)
        together.loss.backward()
        assert_untouched(batch, before)
        if not options.get("trained_logits_only"):
            for number, alone in enumerate(logits):
                real = batch["attention_mask"][number].bool()
                assert_close(together.logits[number][real], alone, rtol=0, atol=TOLERANCE)
        assert together.loss.item() == pytest.approx(loss, abs=1e-5)
        for key, value in model.named_parameters():
            expected = gradients[key]
            assert (value.grad is None) == (expected is None), key
            if expected is not None:
                # The keys' biases of the tower have no gradient but rounding noise: the floor covers them.
                limit = TOLERANCE * max(float(expected.abs().max()), 1e-3)
                assert_close(value.grad, expected, rtol=0, atol=limit, msg=lambda text, at=(side, key): f"{at}: {text}")


@pytest.mark.parametrize("mix", MIXES)
def test_generate_keeps_the_callers_order(model, mix):
    rows = rows_of(model, mix)
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    answers = [model.generate(**without(row, "labels"), **options) for row in rows]
    for side in SIDES:
        batch = without(batch_of(rows, side), "labels")
        before = frozen_copy(batch)
        together = model.generate(**batch, **options)
        assert_untouched(batch, before)
        width = batch["input_ids"].shape[1]
        for number, (row, alone) in enumerate(zip(rows, answers, strict=True)):
            length = row["input_ids"].shape[1]
            assert torch.equal(together.sequences[number, width:], alone.sequences[0, length:])
            assert torch.equal(together.sequences[number, width - length : width], row["input_ids"][0]), (
                "prompts end up left-padded"
            )
            for step_together, step_alone in zip(together.scores, alone.scores, strict=True):
                assert_close(step_together[number], step_alone[0], rtol=0, atol=TOLERANCE)


def test_rows_that_end_early_are_padded_and_the_others_go_on():
    model = tiny_model()
    rows = [prompt(seed, [10 + seed]) for seed in range(3)]
    free = [
        model.generate(**without(row, "labels"), max_new_tokens=8, do_sample=False)[0, -8:].tolist() for row in rows
    ]
    stop = free[0][2]
    together = model.generate(
        **without(batch_of(rows, "right"), "labels"), max_new_tokens=8, do_sample=False, eos_token_id=stop
    )
    for number, tokens in enumerate(together[:, 12:].tolist()):
        expected = free[number][: free[number].index(stop) + 1] if stop in free[number] else free[number]
        assert tokens == (expected + [PAD] * 8)[: len(tokens)]


def test_padding_slots_and_padding_tokens_have_no_influence():
    model = tiny_model()
    batch = batch_of([prompt(0, [4, 9], [(1, 1)]), prompt(1, [2, 5], [(2, 2)])])
    noisy = frozen_copy(batch)
    noisy["pixel_values"][0, 2:] = float("nan")
    noisy["input_ids"][noisy["attention_mask"] == 0] = 77
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        clean, dirty = model(**batch).logits, model(**noisy).logits
    assert torch.equal(clean[real], dirty[real])


@pytest.mark.parametrize("carrier", ["negative ids", "image_token_id"])
def test_both_carriers_give_the_same(carrier):
    plain, carried = tiny_model(image_token_id=None), tiny_model(image_token_id=IMAGE)
    negative = prompt(3, [4, 2, 9], [(1, 1), (1, 2)])
    own = prompt(3, [4, 2, 9], [(1, 1), (1, 2)], image_id=IMAGE)
    ids = (negative if carrier == "negative ids" else own)["input_ids"]
    with torch.no_grad():
        expected = plain(**negative).logits
        assert torch.equal(carried(**{**own, "input_ids": ids}).logits, expected)


def test_image_sizes_may_be_a_list_and_pixels_of_any_float_type():
    model, one = tiny_model(), prompt(4, [3, 5], [(1, 2)])
    with torch.no_grad():
        expected = model(**one).logits
        assert torch.equal(model(**{**one, "image_sizes": one["image_sizes"].tolist()}).logits, expected)
        assert torch.equal(model(**{**one, "pixel_values": one["pixel_values"].double()}).logits, expected)


def test_features_computed_once_stand_for_the_pixels():
    model, one = tiny_model(), prompt(4, [3, 2, 5], [(1, 2), (1, 1)])
    features = model.get_image_features(one["pixel_values"], one["image_sizes"])
    assert [len(piece) for piece in features.pooler_output] == [image_tokens((1, 2)), image_tokens((1, 1))]
    again = {**without(one, "pixel_values", "labels"), "image_features": features.last_hidden_state}
    with torch.no_grad():
        assert torch.equal(model(**again).logits, model(**without(one, "labels")).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**again, **options), model.generate(**without(one, "labels"), **options))


def test_sequences_packed_into_one_row_choose_their_own_rope():
    """Positions that restart at 0 begin another sequence: one beyond the limit does not change one within it."""
    model = tiny_model("tiny_phi3v_long")
    short, long = prompt(5, [20]), prompt(6, [90])
    packed = torch.cat([short["input_ids"], long["input_ids"]], dim=1)
    positions = torch.cat([torch.arange(20), torch.arange(90)])[None]
    with torch.no_grad():
        logits = model(packed, position_ids=positions, use_cache=False).logits
        assert_close(logits[:, :20], model(short["input_ids"]).logits, rtol=0, atol=TOLERANCE)
        assert_close(logits[:, 20:], model(long["input_ids"]).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("pixel_values"), "the model would answer blindly"),
        (lambda one: one.pop("image_sizes"), "without image_sizes"),
        (lambda one: one.update(image_sizes=torch.tensor([[336, 672]])), "grid of 1x2 crops"),
        (lambda one: one.update(image_sizes=torch.tensor([[336, 336]] * 2)), "one image per row of image_sizes"),
        (lambda one: one.update(input_ids=one["input_ids"][:, 9:]), "Image features and image tokens do not match"),
        (lambda one: one.update(input_ids=one["input_ids"] * 0 + 5), "Image features and image tokens do not match"),
    ],
)
@pytest.mark.parametrize("carrier", [None, IMAGE])
def test_what_does_not_fit_is_refused_in_one_line(change, message, carrier):
    one = without(prompt(7, [4, 5], [(1, 1)], image_id=carrier), "labels", "attention_mask")
    change(one)
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model(image_token_id=carrier)(**one)
    assert "\n" not in str(caught.value)


# ---- what is not computed ----


class Calls:
    """Counts the calls of modules and keeps the shapes of their first argument."""

    def __init__(self, **modules):
        self.shapes: dict[str, list] = {name: [] for name in modules}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda module, args, output, name=name: self.shapes[name].append(args[0].shape)
            )


def test_only_real_crops_go_through_the_tower_and_never_its_last_layer():
    model = tiny_model()
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    layers = {f"layer{number}": layer for number, layer in enumerate(tower.encoder.layers)}
    calls = Calls(post=tower.post_layernorm, embeddings=tower.embeddings, **layers)
    batch = batch_of([prompt(0, [4, 9], [(1, 1)]), prompt(1, [2, 5, 3], [(2, 2), (1, 2)]), prompt(2, [9])])
    assert batch["pixel_values"].shape[:2] == (3, 5)
    model(**batch).loss.backward()
    real_crops = 2 + 5 + 3
    assert [shape[0] for shape in calls.shapes["embeddings"]] == [real_crops]
    assert (
        [shape[0] for shape in calls.shapes["layer0"]] == [shape[0] for shape in calls.shapes["layer1"]] == [real_crops]
    )
    assert calls.shapes["layer2"] == calls.shapes["post"] == []
    assert all(value.grad is None for value in tower.encoder.layers[-1].parameters())


def test_decoding_does_not_look_at_the_images_again():
    model = tiny_model()
    calls = Calls(tower=model.model.vision_embed_tokens)
    model.generate(**without(prompt(0, [4, 9], [(1, 1)]), "labels"), max_new_tokens=5, do_sample=False)
    assert len(calls.shapes["tower"]) == 1


def test_text_alone_does_not_touch_the_vision_part():
    model = tiny_model()
    calls = Calls(tower=model.model.vision_embed_tokens)
    model(**prompt(0, [9])).loss.backward()
    assert calls.shapes["tower"] == []
    assert all(value.grad is None for value in model.model.vision_embed_tokens.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_records_nothing_for_autograd(frozen):
    model = tiny_model().train()
    vision = model.model.vision_embed_tokens
    vision.img_processor.requires_grad_(not frozen)
    seen = []
    vision.img_processor.register_forward_hook(lambda module, args, output: seen.append(output))
    vision.img_processor.vision_model.encoder.layers[0].register_forward_hook(lambda m, a, output: seen.append(output))
    model(**prompt(0, [4, 9], [(1, 1)])).loss.backward()
    assert len(seen) == 2
    assert all((output.grad_fn is None) == frozen for output in seen)
    assert vision.img_projection[0].weight.grad.abs().max() > 0 and vision.sub_GN.grad.abs().max() > 0
    assert (vision.img_processor.vision_model.embeddings.class_embedding.grad is None) == frozen


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_trained_logits_only_equal_the_full_path(num_items):
    model = tiny_model()
    batch = batch_of([prompt(0, [4, 9], [(1, 1)]), prompt(1, [12])], "right")
    results = {}
    calls = Calls(head=model.lm_head)
    for at_labels in (False, True):
        model.zero_grad()
        output = model(**batch, trained_logits_only=at_labels, num_items_in_batch=num_items)
        output.loss.backward()
        results[at_labels] = (
            output,
            {key: value.grad for key, value in model.named_parameters() if value.grad is not None},
        )
    (full, full_gradients), (few, few_gradients) = results[False], results[True]
    trained = batch["labels"][:, 1:] != -100
    assert few.logits.shape == (int(trained.sum()), 512) and 0 < trained.sum() < trained.numel()
    assert calls.shapes["head"][1][0] == int(trained.sum()), "the head looks at trained positions only"
    assert_close(few.logits, full.logits[:, :-1][trained], rtol=0, atol=1e-5)
    assert_close(few.loss, full.loss, rtol=0, atol=1e-5)
    assert full_gradients.keys() == few_gradients.keys()
    for key, value in full_gradients.items():
        assert_close(few_gradients[key], value, rtol=0, atol=2e-5 * max(float(value.abs().max()), 1e-3))


def test_trained_logits_only_without_labels_or_without_trained_tokens():
    model, one = tiny_model(), prompt(0, [12])
    with pytest.raises(ValueError, match="trained_logits_only needs labels"):
        model(**without(one, "labels"), trained_logits_only=True)
    output = model(**{**one, "labels": torch.full_like(one["labels"], -100)}, trained_logits_only=True)
    output.loss.backward()
    assert output.loss.item() == 0 and output.logits.shape == (0, 512)


def test_logits_to_keep():
    model, one = tiny_model(), without(prompt(0, [4, 9], [(1, 1)]), "labels")
    calls = Calls(head=model.lm_head)
    with torch.no_grad():
        full = model(**one).logits
        last = model(**one, logits_to_keep=3).logits
        chosen = model(**one, logits_to_keep=torch.tensor([0, 5, 320])).logits
    assert full.shape[1] == one["input_ids"].shape[1], "all logits unless asked otherwise"
    assert [shape[1] for shape in calls.shapes["head"]] == [full.shape[1], 3, 3]
    assert_close(last, full[:, -3:], rtol=0, atol=1e-5)
    assert_close(chosen, full[:, [0, 5, 320]], rtol=0, atol=1e-5)
