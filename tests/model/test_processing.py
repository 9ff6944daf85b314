"""Prompts with tags: token ids of the original, batches it could not do, and what is refused."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from golden_inputs import draw_image, expand_runs
from PIL import Image
from tiny_tokenizer import build_tokenizer
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from phi3v.errors import DataError
from phi3v.model.chat_phi3_v import IMAGE_TAG
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.image_tags_phi3_v import match_images
from phi3v.model.processing_phi3_v import Phi3VProcessor, mask_tokens
from phi3v.model.register import register

HUB = ("Phi-3-vision-128k-instruct", "Phi-3.5-vision-instruct")
PROBES = ("a </s>b", "x  two\n\n<|end|> \n<|user|>\nüñ 中 \t", "<|assistant|>\n  hi", "<s> <unk>", " lead", "trail ")


@pytest.fixture
def processor():
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=1), build_tokenizer())


@pytest.fixture(scope="module")
def photos():
    noise = np.random.default_rng(1).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture(scope="module")
def prompts(golden):
    return json.loads((golden / "prompts.json").read_text())


@pytest.fixture(scope="module", params=HUB)
def hub(request, shared):
    return shared / "phi3v" / "hub" / request.param


def piece_by_piece(tokenizer, image_token_id: int, text: str, tokens: int) -> list[int]:
    """Ids as the original made them: every piece between tags tokenised by itself, with a `<s>` of its own."""
    ids = []
    for index, piece in enumerate(IMAGE_TAG.sub("\0", text).split("\0")):
        ids += [image_token_id] * tokens * (index > 0) + tokenizer(piece)["input_ids"]
    return ids


class TestIds:
    def test_every_recorded_prompt_of_the_original(self, hub, prompts):
        processor = Phi3VProcessor.from_pretrained(hub, num_crops=prompts["num_crops"])
        image = Image.new("RGB", (prompts["image"]["width"], prompts["image"]["height"]))
        for case in prompts["with_images"]:
            out = processor(text=case["text"], images=[image] * case["images"], return_tensors="pt")
            expected = [
                processor.image_token_id if token < 0 else token for token in expand_runs(case["input_ids_rle"])
            ]
            assert out["input_ids"].tolist() == [expected], case["text"]
            assert out["attention_mask"].tolist() == [[1] * len(expected)]
        for case in prompts["errors"]:
            with pytest.raises(DataError):
                processor(text=case["text"], images=[image] * case["images"])
        for case in prompts["text_only"]:
            if isinstance(case["text"], str) and IMAGE_TAG.search(case["text"]):
                with pytest.raises(
                    DataError, match="without an image"
                ):  # the original made plain characters of the tag
                    processor(text=case["text"])
                continue
            out = processor(text=case["text"], padding=True)
            assert (out["input_ids"], out["attention_mask"]) == (case["input_ids"], case["attention_mask"])

    def test_every_recorded_chat_of_the_original(self, hub, golden):
        specs = {spec["name"]: spec for spec in json.loads((golden / "processor.json").read_text())["images"]}
        processor = Phi3VProcessor.from_pretrained(hub)
        for case in json.loads((golden / "e2e_prompts.json").read_text()):
            images = [draw_image(specs[name]) for name in case["images"]]
            prompt = processor.tokenizer.apply_chat_template(  # as the original does: tags stand in strings
                case["messages"], tokenize=False, add_generation_prompt=True
            )
            assert prompt == case["prompt"]
            out = processor(text=prompt, images=images, num_crops=case["num_crops"], return_tensors="pt")
            expected = [
                processor.image_token_id if token < 0 else token for token in expand_runs(case["input_ids_rle"])
            ]
            assert out["input_ids"].tolist() == [expected] and len(expected) == case["length"]
            assert out["image_sizes"].tolist() == case["image_sizes"] if images else "image_sizes" not in out

    def test_prompts_in_microsofts_style_are_rendered_by_the_tokenizer(self, hub, photos):
        """As the model's own page does it: tags in strings, the tokenizer's template, then the processor."""
        real = Phi3VProcessor.from_pretrained(hub)
        assert real.tokenizer.chat_template != real.chat_template
        conversation = [{"role": "user", "content": "<|image_2|>\n<|image_1|>\nWhat?"}]
        prompt = real.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert prompt == "<|user|>\n<|image_2|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n"
        swapped = real(prompt, photos[:2], return_tensors="pt")
        expected = real.image_processor([photos[1], photos[0]], return_tensors="pt")
        assert torch.equal(swapped["pixel_values"], expected["pixel_values"])
        guarded = real.apply_chat_template(conversation, add_generation_prompt=True)
        with pytest.raises(DataError, match="no tag <.image_1.> .*an image in a chat is a part of the content"):
            real(guarded, photos[:2])

    def test_tags_in_any_place_equal_piece_by_piece(self, processor, photos):
        plain = build_tokenizer()
        random = np.random.default_rng(0)
        pieces = [
            "",
            " ",
            "\n",
            "what is",
            "<|user|>\n",
            "<|end|>\n",
            "é中ü",
            "</s> x",
            "<|assistant|>\n",
            "  ",
            "<|image|",
        ]
        for _ in range(200):
            tags = int(random.integers(0, 4))
            text = "".join(random.choice(pieces, 3))
            for number in range(1, tags + 1):
                text += f"<|image_{number}|>" + "".join(random.choice(pieces, 2))
            out = processor(text=text, images=photos[:tags] or None)
            assert out["input_ids"] == [piece_by_piece(plain, processor.image_token_id, text, 313)], text

    def test_the_output_is_what_forward_takes(self, processor, photos):
        out = processor(text="<|image_1|> hi", images=photos[0], return_tensors="pt")
        assert set(out) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
        assert set(processor.model_input_names) == set(out)
        assert set(processor(text="hi", return_tensors="pt")) == {"input_ids", "attention_mask"}
        assert set(processor(images=photos, return_tensors="pt")) == {"pixel_values", "image_sizes"}
        assert (out["pixel_values"].dtype, out["image_sizes"].dtype) == (torch.float32, torch.int64)

    def test_microsofts_argument_order(self, processor, photos):
        ours = processor(text="<|image_1|> hi", images=photos[:1], return_tensors="pt")
        theirs = processor("<|image_1|> hi", photos[:1], return_tensors="pt")
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestImages:
    def test_images_come_out_in_the_order_of_their_tags(self, processor, photos):
        single = [processor.image_processor(photo)["pixel_values"][0] for photo in photos]
        for text, order in [("<|image_2|> a <|image_1|>", [1, 0]), ("<|image_1|><|image_1|>", [0, 0])]:
            out = processor(text=text, images=photos[: max(order) + 1])
            np.testing.assert_array_equal(out["pixel_values"], np.stack([single[index] for index in order]))

    def test_prompts_share_out_a_flat_list(self):
        texts = ["<|image_2|> then <|image_1|>", "none", "<|image_1|>"]
        assert match_images(texts, ["a", "b", "c"]) == ["b", "a", "c"]
        assert match_images(texts, [["a", "b"], [], ["c"]]) == ["b", "a", "c"]
        assert match_images(texts, [("a", "b"), None, "c"]) == ["b", "a", "c"]
        assert match_images(["none", "none"], []) == match_images(["none"], None) == []

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_a_mixed_batch_holds_the_rows_of_single_calls(self, processor, photos, padding_side):
        texts = ["<|image_2|>\n<|image_1|>\nwhat?", "no image here", "", "the <|image_1|> end"]
        images = [photos[:2], [], None, [photos[2]]]
        batch = processor(text=texts, images=images, padding=True, padding_side=padding_side, return_tensors="pt")
        pixels, sizes = [], []
        for row, (text, own) in enumerate(zip(texts, images, strict=True)):
            single = processor(text=text, images=own or None, return_tensors="pt")
            kept = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][kept].tolist() == single["input_ids"][0].tolist()
            assert (batch["input_ids"][row][~kept] == processor.tokenizer.pad_token_id).all()
            assert kept.tolist() == sorted(kept.tolist(), reverse=padding_side == "right")
            pixels += list(single.get("pixel_values", []))
            sizes += list(single.get("image_sizes", []))
        assert torch.equal(batch["pixel_values"], torch.stack(pixels)) and torch.equal(
            batch["image_sizes"], torch.stack(sizes)
        )

    @pytest.mark.parametrize(
        ("text", "images", "message"),
        [
            ("no tag", 1, r"prompt 0 has no tag <\|image_1\|> for its image: 1 image is given"),
            ("<|image_1|>", 0, r"prompt 0 holds <\|image_1\|> without an image: 0 images are given"),
            ("<|image_1|> <|image_3|>", 2, r"prompt 0 holds <\|image_3\|> without an image: 2 images"),
            ("<|image_1|> <|image_3|>", 3, r"prompt 0 has no tag <\|image_2\|> for its image: 3 images"),
            ("<|image_0|>", 1, r"prompt 0 holds <\|image_0\|>: image tags count from 1"),
            ("<|image_99999999999999999999|>", 1, r"holds <\|image_99999999999999999999\|> without an image"),
            ("<|image_" + "9" * 5000 + "|>", 1, r"holds <\|image_9{40}\.\.\.\|> without an image"),
            ("<|image|> hi", 1, r"prompt 0 holds <\|image\|>: write <\|image_1\|>"),
            (["<|image_1|>", "hi", "<|image_1|>"], 3, "3 prompts have tags for 2 images, 3 images are given"),
            (["a", "b"], [[], [], []], "images has 3 lists for 2 prompts"),
            (["<|image_1|>", "b"], [[], ["x"]], r"prompt 0 holds <\|image_1\|> without an image"),
            (["a", 3], 0, "text must be a prompt or a list of prompts"),
            ([["a", "pair"]], 0, "text must be a prompt or a list of prompts"),
        ],
    )
    def test_tags_and_images_that_do_not_fit_are_refused_in_one_line(self, processor, photos, text, images, message):
        given = photos[:images] if isinstance(images, int) else images
        with pytest.raises(DataError, match=message) as caught:
            processor(text=text, images=given or None)
        assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)

    def test_other_inputs_are_refused(self, processor, photos):
        for inputs in ({}, {"text": "hi", "videos": [photos]}, {"text": "hi", "audio": [0.0]}):
            with pytest.raises(DataError):
                processor(**inputs)
        with pytest.raises(ValueError, match="no token"):
            Phi3VProcessor(Phi3VImageProcessor(), build_tokenizer(), image_token="<|picture|>")

    def test_truncation_through_an_image_is_an_error(self, processor, photos):
        with pytest.raises(ValueError, match="[Mm]ismatch"):
            processor(text="<|image_1|> what", images=photos[0], truncation=True, max_length=100)

    def test_the_callers_inputs_are_not_changed(self, processor, photos):
        texts, images = ["<|image_1|> a", "b"], [[photos[0]], []]
        before = photos[0].tobytes()
        processor(text=texts, images=images, padding=True, return_tensors="pt")
        assert texts == ["<|image_1|> a", "b"] and images == [[photos[0]], []] and photos[0].tobytes() == before


class TestSettings:
    def test_num_crops_for_one_call_or_for_all(self, processor, photos):
        text = "<|image_1|>"
        assert len(processor(text=text, images=photos[0])["input_ids"][0]) == 313 + 2
        assert len(processor(text=text, images=photos[0], num_crops=4)["input_ids"][0]) == 757 + 2
        assert processor(text=text, images=photos[0], num_crops=6, pad_crops=False)["pixel_values"].shape[1] == 7
        processor.image_processor.num_crops = 4
        assert len(processor(text=text, images=photos[0])["input_ids"][0]) == 757 + 2
        assert processor.calc_num_image_tokens_from_image_size(60, 40) == 757
        assert processor.calc_num_image_tokens(photos) == [757] * 3
        assert processor._get_num_multimodal_tokens([(40, 60)]).num_image_tokens == [757]
        assert processor._get_num_multimodal_tokens([(40, 60)]).num_image_patches == [5]

    def test_token_types_mark_the_image(self, processor, photos):
        out = processor(text="a <|image_1|> b", images=photos[0], return_mm_token_type_ids=True)
        types = np.array(out["mm_token_type_ids"][0])
        assert (types == (np.array(out["input_ids"][0]) == processor.image_token_id)).all() and types.sum() == 313

    def test_names_of_tokens(self, processor):
        names = processor.tokenizer.convert_ids_to_tokens(processor.stop_token_ids)
        assert sorted(names) == sorted(["</s>", "<|endoftext|>", "<|end|>"])
        assert processor.image_token == "<|image|>"
        assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image|>")
        assert (
            processor.img_tokens[:2] == ["<|image_1|>", "<|image_2|>"]
            and processor.img_tokens[-1] == "<|image_1000000|>"
        )

    def test_decoding(self, processor, photos):
        out = processor(text=["<|user|>\n<|image_1|>\nwhat is this<|end|>"], images=photos[0], return_tensors="pt")
        decoded = processor.batch_decode(out["input_ids"], skip_special_tokens=True)
        assert decoded == processor.post_process_image_text_to_text(out["input_ids"])
        assert (
            decoded[0].strip()
            == processor.decode(out["input_ids"][0], skip_special_tokens=True).strip()
            == "what is this"
        )

    def test_assistant_mask_arithmetic(self):
        assert mask_tokens([(0, 0), (0, 3), (3, 5), (5, 6)], [(3, 5)], []) == [0, 0, 1, 0]
        # A tag of 2 characters at 1..3 became 5 characters; the span 4..6 moved to 7..9.
        replaced = [{"span": (1, 3), "new_span": (1, 6)}]
        assert mask_tokens([(0, 1), (1, 6), (6, 7), (7, 9), (0, 0)], [(4, 6)], replaced) == [0, 0, 0, 1, 0]


class TestFiles:
    def test_the_hub_folders_load_with_the_right_tokenizer(self, hub, tmp_path):
        """Also without `config.json`, where transformers would follow `tokenizer_config.json` to the wrong class."""
        register()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
            (tmp_path / name).write_bytes((hub / name).read_bytes())
        reference = PreTrainedTokenizerFast.from_pretrained(hub)
        loaded = [Phi3VProcessor.from_pretrained(hub), Phi3VProcessor.from_pretrained(tmp_path)]
        loaded += [AutoProcessor.from_pretrained(hub), AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)]
        for processor in loaded:
            assert type(processor) is Phi3VProcessor and (processor.image_token_id, len(processor.tokenizer)) == (
                32044,
                32045,
            )
            assert processor.stop_token_ids == [2, 32000, 32007]
            assert [processor.tokenizer(text).input_ids for text in PROBES] == [
                reference(text).input_ids for text in PROBES
            ]
        assert processor.tokenizer("<|user|>\nWhat").input_ids == [1, 32010, 29871, 13, 5618]

    def test_what_is_saved_loads_right_everywhere(self, hub, tmp_path):
        register()
        processor = Phi3VProcessor.from_pretrained(hub, num_crops=9)
        processor.save_pretrained(tmp_path)
        expected = [processor.tokenizer(text).input_ids for text in PROBES]
        for load in (Phi3VProcessor, AutoProcessor):
            again = load.from_pretrained(tmp_path)
            assert type(again) is Phi3VProcessor and again.image_processor.num_crops == 9
            assert again.chat_template == processor.chat_template
            assert [again.tokenizer(text).input_ids for text in PROBES] == expected
        for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
            assert [tokenizer(text).input_ids for text in PROBES] == expected
        PreTrainedTokenizerFast.from_pretrained(hub).save_pretrained(tmp_path / "plain")
        assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "plain" / "tokenizer.json").read_bytes()
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert (saved["num_crops"], saved["num_img_tokens"]) == (9, 144)
        tokenizer_class = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        assert tokenizer_class == "PreTrainedTokenizerFast"  # known to transformers 4 and 5, and right in both
        files = " ".join(path.read_text() for path in tmp_path.glob("*.json") if path.name != "tokenizer.json")
        assert "auto_map" not in files and "Llama" not in files

    def test_a_processor_travels_to_other_processes(self, processor, photos):
        for copied in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
            conversation = [{"role": "user", "content": "a </s> b"}]
            ids = [kind.apply_chat_template(conversation, tokenize=True) for kind in (processor, copied)]
            assert ids[0] == ids[1]

    def test_a_small_processor_survives_saving(self, processor, photos, tmp_path):
        register()
        processor.image_processor.num_crops = 3
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        first, second = (kind(text="<|image_1|> </s> hi", images=photos[0]) for kind in (processor, again))
        assert first["input_ids"] == second["input_ids"] and type(again) is Phi3VProcessor
        np.testing.assert_array_equal(first["pixel_values"], second["pixel_values"])
        assert AutoProcessor.from_pretrained(tmp_path, num_crops=5).image_processor.num_crops == 5
        for settings in ({"backend": "pil"}, {"backend": "pil", "num_crops": 5}):
            pil = AutoProcessor.from_pretrained(tmp_path, **settings).image_processor
            assert pil.backend == "pil" and pil.num_crops == settings.get("num_crops", 3)


def test_one_message_is_no_conversation_and_an_image_is_not_continued(processor, photos):
    message = {"role": "user", "content": [{"type": "image", "image": photos[0]}]}
    with pytest.raises(DataError, match="one message was given: put it into a list"):
        processor.apply_chat_template(message)
    with pytest.raises(DataError, match="goes on with text, and the last message ends with an image"):
        processor.apply_chat_template([message], continue_final_message=True)
