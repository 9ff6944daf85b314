"""Samples and questions: which tokens are trained, that both share one rendering, and what is refused."""

import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.data.encode import EncodedRows, encode, encode_prompt, label_answers
from phi3v.data.encode_seen import encode_seen, file_name
from phi3v.data.lengths import RowLength, row_lengths
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.errors import DataError, ImageError
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=4), build_tokenizer())


def photo(width: int, height: int, colour: str = "red") -> ImageRef:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return ImageRef(f"{width}x{height}.png", data=buffer.getvalue())


def row(*turns: tuple[str, str], images: tuple[ImageRef, ...] = ()) -> Row:
    """A conversation; the images stand in the first user turn."""
    messages, placed = [], False
    for role, text in turns:
        parts: list[Any] = [TextPart(text)]
        if role == "user" and not placed:
            parts, placed = [*(ImagePart(number) for number in range(len(images))), *parts], True
        messages.append(Message(role, tuple(parts)))  # type: ignore[arg-type]
    return Row(tuple(messages), images, {}, "shop.csv", 7)


QUESTION, ANSWER = ("user", "what is this"), ("assistant", "the answer")

ROWS = {
    "text": row(QUESTION, ANSWER),
    "image": row(QUESTION, ANSWER, images=(photo(40, 30),)),
    "two images": row(QUESTION, ANSWER, images=(photo(40, 30), photo(30, 90))),
    "system": row(("system", "in the end"), QUESTION, ANSWER, images=(photo(90, 30),)),
    "turns": row(QUESTION, ANSWER, ("user", "and?"), ("assistant", "no more"), images=(photo(40, 30),)),
    "control words": row(
        ("user", "<|end|>\n<|assistant|>\nyes</s> <|image_1|> <|image|>"),
        ("assistant", "<|end|> <|endoftext|> a <|assistant|>"),
    ),
    "white space": row(("user", " a \n"), ("assistant", "\n b \n")),
    "other scripts": row(("user", "中文 ß"), ("assistant", "é 😀")),
}


def control(processor: Phi3VProcessor, token: str) -> int:
    return processor.tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize(
    ("train_on", "labels"),
    [
        ("last_assistant", "..................... 41 7 8 9 0"),
        ("all_assistant", "......... 31 32 7 ......... 41 7 8 9 0"),
    ],
)
def test_labels_in_small_integers(train_on: Any, labels: str) -> None:
    ids = [1, 5, 8, 9, 21, 7, 8, 9, 6, 31, 32, 7, 8, 9, 5, 22, 7, 8, 9, 5, 6, 41, 7, 8, 9, 0]
    wanted = [-100 if word == "." else int(word) for word in labels.replace(".", ". ").split()]
    assert label_answers(ids, assistant_id=6, end_id=7, train_on=train_on) == wanted


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        ([6, 7, 0], [-100, 7, 0]),
        ([6, 1, 7], [-100, 1, 7]),
        ([5, 7, 6, 1, 7, 0], [-100, -100, -100, 1, 7, 0]),
        ([6, 1, 7, 6, 2, 7, 0], [-100, -100, -100, -100, 2, 7, 0]),
    ],
)
def test_labels_of_short_conversations(ids: list[int], labels: list[int]) -> None:
    assert label_answers(ids, assistant_id=6, end_id=7, train_on="last_assistant") == labels


def test_an_answer_that_is_not_trained_has_no_labels(processor: Phi3VProcessor) -> None:
    whole = ROWS["turns"]
    place = next(place for place, message in enumerate(whole.messages) if message.role == "assistant")
    messages = [replace(one, trained=at != place) for at, one in enumerate(whole.messages)]
    bare = replace(whole, messages=tuple(messages))
    labels = encode(whole, processor, train_on="all_assistant")["labels"].tolist()
    first = next(at for at, label in enumerate(labels) if label != -100)
    stop = labels.index(-100, first)
    found = encode(bare, processor, train_on="all_assistant")["labels"].tolist()
    assert found == [-100] * stop + labels[stop:] != labels and set(found) != {-100}
    lengths = row_lengths([bare, whole], processor, train_on="all_assistant")
    trained = [one.trained for one in lengths if isinstance(one, RowLength)]
    assert trained == [len(each) - each.count(-100) for each in (found, labels)]


@pytest.mark.parametrize("ids", [[], [1, 5, 7, 0], [1, 6, 2, 0], [1, 7, 6, 2]])
def test_ids_without_a_whole_answer_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="assistant"):
        label_answers(ids, assistant_id=6, end_id=7, train_on="last_assistant")


@pytest.mark.parametrize("name", ROWS)
def test_a_sample_up_to_its_answer_is_the_question(name: str, processor: Phi3VProcessor) -> None:
    sample, question = encode(ROWS[name], processor), encode_prompt(ROWS[name], processor)
    length = len(question["input_ids"])
    assert sample["input_ids"][:length].tolist() == question["input_ids"].tolist()
    assert question["input_ids"][-1] == control(processor, "<|assistant|>")
    assert (sample["labels"][:length] == -100).all()
    assert sample["labels"][length:].tolist() == sample["input_ids"][length:].tolist()
    assert set(sample) - set(question) == {"labels"}
    for key in set(question) - {"input_ids", "attention_mask"}:
        assert torch.equal(sample[key], question[key])
    for example in (sample, question):
        assert example["input_ids"].shape == example["attention_mask"].shape and example["attention_mask"].all()


@pytest.mark.parametrize("name", ROWS)
def test_trained_are_the_answer_and_its_end(name: str, processor: Phi3VProcessor) -> None:
    sample = encode(ROWS[name], processor)
    trained = sample["labels"][sample["labels"] != -100].tolist()
    newline = processor.tokenizer("<|end|>\n", add_special_tokens=False)["input_ids"][1:]
    assert len(newline) == 2  # ▁ and <0x0A>
    end = [control(processor, "<|end|>"), *newline, control(processor, "<|endoftext|>")]
    assert trained[-4:] == end and sample["input_ids"][-4:].tolist() == end
    answer = ROWS[name].answer
    assert processor.tokenizer.decode(trained[:-4]).strip() == answer.strip()
    assert processor.image_token_id not in trained


def test_white_space_in_front_of_an_answer_is_not_trained_and_behind_it_is(processor: Phi3VProcessor) -> None:
    plain, before, behind = (
        encode(row(QUESTION, ("assistant", text)), processor)["labels"] for text in ("yes", "\n  yes", "yes \n")
    )
    assert torch.equal(plain, before) and len(behind) > len(plain)


def test_every_turn_of_the_assistant_is_trained_on_request(processor: Phi3VProcessor) -> None:
    sample = encode(ROWS["turns"], processor, train_on="all_assistant")
    trained = sample["labels"][sample["labels"] != -100].tolist()
    first = trained[: trained.index(control(processor, "<|end|>"))]
    assert processor.tokenizer.decode(first).strip() == "the answer"
    last = encode(ROWS["turns"], processor)
    assert torch.equal(sample["input_ids"], last["input_ids"])
    kept = last["labels"] != -100
    assert torch.equal(sample["labels"][kept], last["labels"][kept])
    assert int((sample["labels"] != -100).sum()) == int(kept.sum()) + len(first) + 1


def test_control_ids_are_the_templates_own(processor: Phi3VProcessor) -> None:
    ids = encode(ROWS["control words"], processor)["input_ids"].tolist()
    added = [token for token in ids if token >= control(processor, "<|endoftext|>")]
    names = ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    assert added == [control(processor, name) for name in names] and ids.count(2) == 0


def test_images_come_with_the_crops_they_need(processor: Phi3VProcessor) -> None:
    sample = encode(ROWS["two images"], processor)
    assert sample["image_sizes"].tolist() == [[672, 672], [1008, 336]]
    assert sample["pixel_values"].shape == (2, 5, 3, 336, 336)
    assert (sample["pixel_values"][1, 4] == 0).all()  # three crops and the global view; the fifth place is padding
    spans = sample["input_ids"] == processor.image_token_id
    assert int(spans.sum()) == sum((h * w + 1) * 144 + 1 + (h + 1) * 12 for h, w in ((2, 2), (3, 1)))
    wide = encode(ROWS["system"], processor)
    assert wide["pixel_values"].shape == (1, 4, 3, 336, 336)
    assert "pixel_values" not in encode(ROWS["text"], processor)


def test_a_row_that_is_too_long_is_refused_and_never_cut(processor: Phi3VProcessor) -> None:
    whole = encode(ROWS["image"], processor)["input_ids"]
    assert torch.equal(encode(ROWS["image"], processor, max_length=len(whole))["input_ids"], whole)
    tokens = rf"shop.csv, row 7: {len(whole)} tokens \(757 for images\), and the limit is {len(whole) - 1}: set data"
    with pytest.raises(DataError, match=tokens):
        encode(ROWS["image"], processor, max_length=len(whole) - 1)


def test_what_cannot_be_encoded_names_the_row(processor: Phi3VProcessor) -> None:
    with pytest.raises(DataError, match="shop.csv, row 7: the last turn is no answer"):
        encode(row(QUESTION), processor)
    with pytest.raises(DataError, match="shop.csv, row 7"):
        encode(row(), processor)
    with pytest.raises(ImageError, match="shop.csv, row 7: image a.png does not exist"):
        encode(row(QUESTION, ANSWER, images=(ImageRef("a.png"),)), processor)
    with pytest.raises(ImageError, match="shop.csv, row 7: an image of 3000x1 pixels is too narrow"):
        encode(row(QUESTION, ANSWER, images=(photo(3000, 1),)), processor)
    with pytest.raises(ImageError, match="more than the limit of 100"):
        encode_prompt(ROWS["image"], processor, max_pixels=100)
    orphan = Row(
        (Message("user", (TextPart("a"),)), Message("assistant", (TextPart("b"),))), (photo(2, 2),), {}, "x", 0
    )
    with pytest.raises(DataError, match=r"x, row 0: its messages place the images \[\], but there are 1 images"):
        encode(orphan, processor)


def test_a_question_without_an_answer_is_a_question(processor: Phi3VProcessor) -> None:
    open_end = encode_prompt(row(QUESTION, images=(photo(40, 30),)), processor)
    assert torch.equal(open_end["input_ids"], encode_prompt(ROWS["image"], processor)["input_ids"])


def test_the_real_tokens_end_as_microsoft_trained_them(shared: Any) -> None:
    real = Phi3VProcessor.from_pretrained(shared / "phi3v" / "hub" / "Phi-3-vision-128k-instruct")
    sample = encode(ROWS["turns"], real)
    assert sample["input_ids"][-4:].tolist() == [32007, 29871, 13, 32000]
    assert sample["labels"][sample["labels"] != -100].tolist() == [694, 901, 32007, 29871, 13, 32000]
    assert sample["input_ids"][:5].tolist() == [1, 32010, 29871, 13, real.image_token_id]


def test_a_data_set_opens_images_when_asked_and_keeps_none(processor: Phi3VProcessor) -> None:
    rows = [ROWS["image"], ROWS["text"], row(QUESTION, ANSWER, images=(ImageRef("gone.png"),))]
    data = EncodedRows(rows, processor, max_length=2000)
    assert len(data) == 3 and data[0]["pixel_values"].shape == (1, 5, 3, 336, 336)
    with pytest.raises(ImageError, match="gone.png"):
        data[2]
    again = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(value, again[0][key]) for key, value in data[0].items())
    assert len(pickle.dumps(data)) < 3_000_000  # the tokenizer, not the pixels: five crops alone are 6.8 MB


def test_loader_workers_give_the_same_samples(processor: Phi3VProcessor) -> None:
    data = EncodedRows([ROWS["image"], ROWS["text"]], processor)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)  # type: ignore[arg-type]
    for found, wanted in zip(loader, [data[0], data[1]], strict=True):
        assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("on_too_long", ["skip", "fewer_crops", "cut_text"])
def test_what_was_seen_is_encoded_without_its_pixels(
    processor: Phi3VProcessor, monkeypatch: pytest.MonkeyPatch, on_too_long: Any
) -> None:
    """The same tensors as `encode` gives, whole; no image is opened, and none whose size nobody knows is guessed at."""
    long = row(("user", "what is this " * 1000), ANSWER, images=(photo(90, 30), photo(50, 50)))
    rows = list(ROWS.values()) if on_too_long == "fewer_crops" else [*ROWS.values(), long]
    sized = [replace(one, images=tuple(replace(image, size=_size(image)) for image in one.images)) for one in rows]
    limit = {"skip": None, "fewer_crops": 1200, "cut_text": 2000}[on_too_long]
    whole = EncodedRows(sized, processor, max_length=limit, on_too_long=on_too_long)
    expected = [whole[place] for place in range(len(rows))]
    monkeypatch.setattr("phi3v.data.encode.open_image", lambda *given, **named: pytest.fail("an image was opened"))
    for place, wanted in enumerate(expected):
        found = encode_seen(whole, place)
        assert set(found) == set(wanted) - {"pixel_values"}
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), (place, name)
    lengths = [one["input_ids"].shape[0] for one in expected]
    assert (max(lengths) > 3000) if limit is None else limit - 500 < max(lengths) <= limit
    assert encode_seen(EncodedRows([ROWS["image"]], processor), 0) is None
    assert file_name(sized[1].images[0]) == file_name(photo(40, 30)) != file_name(photo(40, 30, "blue"))


def _size(image: ImageRef) -> tuple[int, int]:
    return Image.open(io.BytesIO(image.data or b"")).size
