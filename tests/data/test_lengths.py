"""Lengths from headers and text alone are those of the real samples, exactly."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.data.encode import encode
from phi3v.data.lengths import RowLength, row_lengths, token_ids
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, RowProblem, TextPart, TrainOn
from phi3v.errors import DataError
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor

TEXTS = [
    "what is this",
    " a \n",
    "<|end|>\n<|assistant|>\nyes</s> <|image_1|> <|image|>",
    "中文 ß é 😀",
    "",
    "the\n\nend",
]
SIZES = [(1, 1), (1, 7), (336, 336), (337, 335), (90, 31), (33, 200), (64, 64), (250, 3)]


def processor_of(crops: int) -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=crops), build_tokenizer())


def photo(width: int, height: int, kind: str = "PNG", turned: bool = False) -> ImageRef:
    buffer = io.BytesIO()
    picture = Image.new("RGB", (width, height), "red")
    exif = picture.getexif()
    if turned:
        exif[0x0112] = 6
    picture.save(buffer, kind, exif=exif)
    return ImageRef(f"{width}x{height}", data=buffer.getvalue())


def chat(turns: list[tuple[str, list[str | None]]], images: tuple[ImageRef, ...] = (), index: int = 0) -> Row:
    """A conversation; None in a turn is the place of the next image."""
    number, messages = 0, []
    for role, parts in turns:
        made: list[TextPart | ImagePart] = []
        for part in parts:
            made.append(ImagePart(number) if part is None else TextPart(part))
            number += part is None
        messages.append(Message(role, tuple(made)))  # type: ignore[arg-type]
    return Row(tuple(messages), images, {}, "shop.csv", index)


def random_row(seed: int) -> Row:
    """A row of one to three exchanges, with a system turn now and then, and up to four images anywhere."""
    dice = random.Random(seed)
    turns: list[tuple[str, list[str | None]]] = []
    images: list[ImageRef] = []
    if dice.random() < 0.3:
        turns.append(("system", [dice.choice(TEXTS)]))
    for _ in range(dice.choice([1, 1, 2, 3])):
        parts: list[str | None] = [dice.choice(TEXTS) for _ in range(dice.choice([1, 1, 2]))]
        for _ in range(dice.choice([0, 1, 1, 2])):
            images.append(photo(*dice.choice(SIZES), dice.choice(["PNG", "JPEG"]), turned=dice.random() < 0.2))
            parts.insert(dice.randrange(len(parts) + 1), None)
        turns += [("user", parts), ("assistant", [dice.choice(TEXTS) + " the answer"])]
    return chat(turns, tuple(images), seed)


def measured(row: Row, processor: Any, train_on: TrainOn) -> tuple[int, int, int]:
    """Image, text and trained tokens of the sample that `encode` makes."""
    sample = encode(row, processor, train_on=train_on)
    images = int((sample["input_ids"] == processor.image_token_id).sum())
    return images, len(sample["input_ids"]) - images, int((sample["labels"] != -100).sum())


@pytest.mark.parametrize(("crops", "train_on"), [(4, "last_assistant"), (4, "all_assistant"), (1, "all_assistant")])
def test_lengths_are_those_of_the_samples(crops: int, train_on: TrainOn) -> None:
    processor = processor_of(crops)
    rows = [random_row(seed) for seed in range(60)]
    found = list(row_lengths(iter(rows), processor, train_on=train_on))
    for row, length in zip(rows, found, strict=True):
        assert isinstance(length, RowLength), length
        assert (length.image, length.text, length.trained) == measured(row, processor, train_on)
        assert length.total == length.image + length.text


def test_lengths_of_more_rows_than_a_batch() -> None:
    processor = processor_of(1)
    rows = [chat([("user", ["what"]), ("assistant", ["the " * (index % 7)])], index=index) for index in range(600)]
    lengths = list(row_lengths(rows, processor))
    wanted = [measured(row, processor, "last_assistant") for row in rows[:7]]
    assert [(length.image, length.text, length.trained) for length in lengths] == [wanted[i % 7] for i in range(600)]


def test_a_picture_in_an_answer_counts_as_its_labels_do() -> None:
    processor = processor_of(4)
    row = chat([("user", ["draw"]), ("assistant", ["the answer", None])], (photo(40, 40),))
    (length,) = row_lengths([row], processor)
    assert isinstance(length, RowLength) and length.image == 757 and length.trained > 757
    assert (length.image, length.text, length.trained) == measured(row, processor, "last_assistant")


def test_upright_sizes_are_kept() -> None:
    row = chat(
        [("user", [None, None, "what"]), ("assistant", ["a"])], (photo(90, 30, "JPEG", turned=True), photo(5, 6))
    )
    (length,) = row_lengths([row], processor_of(4))
    assert isinstance(length, RowLength) and length.sizes == ((30, 90), (5, 6))


def test_what_encode_refuses_is_a_problem_and_the_others_go_on() -> None:
    processor = processor_of(4)
    turns: list[tuple[str, list[str | None]]] = [("user", [None, "what"]), ("assistant", ["a"])]
    rows = [
        chat(turns, (photo(3000, 1),), 0),
        chat(turns[:1], (photo(4, 4),), 1),
        chat(turns, (ImageRef("x", data=b"no image"),), 2),
        chat(turns, (), 3),
        chat(turns, (photo(4, 4),), 4),
        chat(turns, (photo(400, 400),), 5),
    ]
    found = list(row_lengths(rows, processor, max_pixels=4000))
    codes = [one.reason_code if isinstance(one, RowProblem) else one.total for one in found]
    sample = encode(rows[4], processor)["input_ids"]
    wanted = ["image_narrow", "no_answer", "image_unreadable", "image_places", len(sample), "image_unreadable"]
    assert codes == wanted
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, RowProblem):
            with pytest.raises(DataError) as refused:
                encode(row, processor, max_pixels=4000)
            assert str(refused.value) == str(one)


def test_lengths_do_not_depend_on_what_the_tokenizer_did_before() -> None:
    processor = processor_of(4)
    row = random_row(3)
    (before,) = row_lengths([row], processor)
    processor.tokenizer(["a b c", "a"], padding="max_length", max_length=7, truncation=True)
    assert list(row_lengths([row], processor)) == [before]
    assert len(processor.tokenizer(["a b c d e f g h"], max_length=5, truncation=True)["input_ids"][0]) == 5


def test_the_real_tokenizer_gives_the_same(shared: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(shared / "phi3v" / "hub" / "Phi-3.5-vision-instruct")
    rows = [random_row(seed) for seed in range(100, 112)]
    for row, length in zip(rows, row_lengths(rows, processor), strict=True):
        assert isinstance(length, RowLength)
        assert (length.image, length.text, length.trained) == measured(row, processor, "last_assistant")
    photo_row = chat([("user", [None, "What?"]), ("assistant", ["Hi"])], (photo(64, 64),))
    assert token_ids([photo_row], processor)[0][:6] == [1, 32010, 29871, 13, 32044, 1]
