"""The tiny model: its shape, its files, and that it answers from the picture; the parts of its pretraining."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import phi3v
from phi3v import demo
from phi3v.demo import pretrain
from phi3v.demo.scenes import scene

HELD_OUT = 77


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    phi3v.register()
    folder = demo.tiny_model_path()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def answer(tiny: tuple[Any, Any], image: Image.Image, question: str) -> str:
    model, processor = tiny
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=40)  # stops by the folder's own settings
    assert int(ids[0, -1]) in (2, pretrain.ENDOFTEXT, pretrain.END)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def questions(wanted: tuple[str, ...], count: int) -> list[tuple[Image.Image, str, str]]:
    found, index = [], 0
    while len(found) < count:
        made = scene(HELD_OUT, index)
        found += [(made.image, question, right) for question, right in made.turns if question in wanted][:1]
        index += 1
    return found


def test_its_files_are_those_of_microsofts_folders_and_small() -> None:
    folder = demo.tiny_model_path()
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "phi3_v"
    assert config["rope_scaling"]["type"] == "su"
    assert config["vision_config"]["image_size"] == 336


def test_its_widths_suit_every_kernel(tiny: tuple[Any, Any]) -> None:
    config = tiny[0].config
    assert config.hidden_size % 64 == 0
    assert config.vision_config.hidden_size % 64 == 0
    assert (config.hidden_size // config.num_attention_heads) % 16 == 0
    assert config.image_token_id == len(tiny[1].tokenizer) - 1


def test_both_auto_classes_load_every_weight() -> None:
    phi3v.register()
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        _, loading = auto.from_pretrained(demo.tiny_model_path(), output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]


def test_it_reads_numbers_and_colours_of_scenes_it_never_saw(tiny: tuple[Any, Any]) -> None:
    wanted = ("number?", "Read the number.", "colour?", "surface?")
    asked = questions(wanted, 16)
    right = [answer(tiny, image, question) == expected for image, question, expected in asked]
    assert sum(right) >= 14
    blank = Image.new("RGB", (336, 336), "white")
    blind = [answer(tiny, blank, question) == expected for _, question, expected in asked]
    assert sum(blind) <= 6


def test_its_score_on_held_out_scenes_is_near_the_stated_band(tiny: tuple[Any, Any]) -> None:
    low, high = pretrain.EXPECTED_SCORE
    scores = pretrain.score(*tiny, count=96)
    assert low - 0.04 <= scores["all"] <= high + 0.04
    assert scores["background?"] >= 0.9


def test_it_takes_more_crops_and_other_shapes(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    image = scene(HELD_OUT, 0).image.resize((500, 300))
    pixels = processor.image_processor([image], num_crops=4, return_tensors="pt")
    features = model.get_image_features(pixels["pixel_values"], pixels["image_sizes"]).last_hidden_state
    assert features.shape == (int(pixels["num_img_tokens"][0]), model.config.hidden_size)
    assert bool(torch.isfinite(features).all())


def test_the_short_way_to_picture_features_gives_the_same(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    images = [scene(HELD_OUT, index).image for index in range(3)]
    batch = next(pretrain.batches(processor, HELD_OUT, 3, 3))
    pixels = processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(pixels["pixel_values"], pixels["image_sizes"]).last_hidden_state
        torch.testing.assert_close(pretrain.picture_features(model, batch["views"]), expected, rtol=1e-4, atol=1e-4)
        last_part = expected.view(3, pretrain.IMAGE_TOKENS, -1)[:, -pretrain.ONE_VIEW_TOKENS :].flatten(0, 1)
        once = pretrain.picture_features(model, batch["views"], pretrain.ONE_VIEW_TOKENS)
        torch.testing.assert_close(once, last_part, rtol=1e-4, atol=1e-4)


def test_the_first_scenes_show_the_picture_once(tiny: tuple[Any, Any]) -> None:
    rows = pretrain.Scenes(tiny[1].tokenizer, 0, 3, one_view=2)
    assert [rows[index][0].count(pretrain.IMAGE) for index in range(3)] == [157, 157, 313]


def test_pretraining_sees_the_ids_that_chats_are_asked_with(tiny: tuple[Any, Any]) -> None:
    processor = tiny[1]
    ids, owners = pretrain.encode_turns(processor.tokenizer, [("digit?", "7")])
    content = [{"type": "image", "image": scene(0, 0).image}, {"type": "text", "text": "digit?"}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    asked = asked[0] if isinstance(asked[0], list) else asked
    assert ids[: len(asked)] == list(asked)
    trained = [token for token, owner in zip(ids, owners, strict=True) if owner == 0]
    names = ["▁", "7", "<|end|>", "▁", "<0x0A>", "<|endoftext|>"]
    assert processor.tokenizer.convert_ids_to_tokens(trained) == names


def test_only_answers_are_trained_on(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1].tokenizer
    ids, owners = pretrain.encode_turns(tokenizer, [("shape?", "star"), ("colour?", "red")])
    for turn, text in ((0, "star<|end|>"), (1, "red<|end|> \n<|endoftext|>")):
        assert tokenizer.decode([t for t, o in zip(ids, owners, strict=True) if o == turn]).replace(
            " ", ""
        ) == text.replace(" ", "")


def test_pretraining_starts_from_the_same_weights_and_moves_them(tmp_path: Path) -> None:
    first, second = pretrain.new_model(3), pretrain.new_model(3)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    losses: list[float] = []
    options = pretrain.Options(pages=4, echoes=2, scenes=6, batch=2, warmup_steps=1, seed=3)
    counts: list[tuple[int, int]] = []

    def log(step: int, steps: int, loss: float) -> None:
        counts.append((step, steps))
        losses.append(loss)

    trained = pretrain.pretrain(options, pretrain.new_processor(tmp_path), log)
    assert counts == [(step, 2 + 2 + 3) for step in range(1, 8)]  # pages, echoes, scenes
    assert losses[1] < losses[0] and losses[3] < losses[2] and losses[6] < losses[4]
    unread = [
        n for n, p in trained.named_parameters() if torch.equal(p, first.state_dict()[n]) and "k_proj.bias" not in n
    ]
    assert unread and all("encoder.layers.3." in name or "post_layernorm" in name for name in unread)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    options = pretrain.Options(warmup_steps=100, decay_share=0.5)
    factors = [pretrain.rate_factor(step, 1000, options) for step in (0, 99, 500, 750)]
    assert factors == pytest.approx([0.01, 1.0, 1.0, 0.5])
