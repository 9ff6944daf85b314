"""Rows that are too long: what is cut, what never is, and that image spans stay whole whatever the limit."""

import random
from io import BytesIO
from itertools import groupby
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.data.encode import EncodedRows, encode, text_tokens
from phi3v.data.fit import Fitted, cut_front, fit, way_out, without_old_exchanges
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.errors import ImageError, TooLongError
from phi3v.image_tokens import crops_within, grid_tokens, most_image_tokens, num_image_tokens
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor


def turn(role: Any, *parts: str | int) -> Message:
    """A message; whole numbers stand for images."""
    return Message(role, tuple(ImagePart(part) if isinstance(part, int) else TextPart(part) for part in parts))


def letters(messages: tuple[Message, ...]) -> int:
    """A counter for small examples: a token a character, and 10 a turn."""
    return sum(10 + len(message.text) for message in messages)


SYSTEM, ANSWER = turn("system", "brief"), turn("assistant", "yes")
LONG = (
    SYSTEM,
    turn("user", "one"),
    turn("assistant", "1"),
    turn("user", 0, "two"),
    turn("assistant", "2"),
    turn("user", "three"),
    turn("assistant", "3"),
    turn("user", "is it so?"),
    ANSWER,
)


def test_the_best_number_of_crops_within_the_limit() -> None:
    """A square image: 2,509 tokens at 16 crops, 1,489 at 9 to 15, 757 at 4 to 8, 313 below."""
    messages = (turn("user", 0, "x" * 80), turn("assistant"))
    for limit, crops, tokens in ((2609, 16, 2509), (2608, 15, 1489), (1589, 15, 1489), (1588, 8, 757), (413, 3, 313)):
        found = fit(messages, [(50, 50)], count=letters, num_crops=16, max_length=limit, on_too_long="fewer_crops")
        assert found == Fitted(messages, crops, 100, tokens)
    with pytest.raises(
        TooLongError, match=r"413 tokens \(313 for images\), and the limit is 412: even at 1 crop an im"
    ):
        fit(messages, [(50, 50)], count=letters, num_crops=16, max_length=412, on_too_long="fewer_crops")
    with pytest.raises(TooLongError, match=r"2609 tokens \(2509 for images\), and the limit is 2608: set data.on_too_"):
        fit(messages, [(50, 50)], count=letters, num_crops=16, max_length=2608)
    assert fit(messages, [(50, 50)], count=letters, num_crops=16, max_length=None).tokens == 2609


def test_a_narrow_image_is_refused_before_and_never_squeezed_to_nothing() -> None:
    messages = (turn("user", 0), ANSWER)
    with pytest.raises(ImageError, match="an image of 1x6000 pixels is too narrow"):
        fit(messages, [(1, 6000)], count=letters, num_crops=4, max_length=None)
    with pytest.raises(TooLongError, match="even at 3 crops an image"):  # at 2 crops 1x1000 would be 672x0
        fit(messages, [(1, 1000)], count=letters, num_crops=16, max_length=300, on_too_long="fewer_crops")


def test_old_exchanges_go_first_and_those_with_images_stay() -> None:
    def within(limit: int) -> tuple[Message, ...]:
        return without_old_exchanges(LONG, lambda messages: letters(messages) <= limit)

    assert within(letters(LONG)) == LONG
    first_gone = (SYSTEM, *LONG[3:])
    assert within(letters(LONG) - 1) == first_gone
    assert within(letters(first_gone)) == first_gone
    shortest = (SYSTEM, *LONG[3:5], *LONG[7:])
    assert within(letters(first_gone) - 1) == shortest == within(0)
    greeting = (turn("assistant", "hi"), *LONG[1:])
    assert without_old_exchanges(greeting, lambda messages: len(messages) < 9) == greeting[1:]


def test_the_front_of_the_users_text_is_cut() -> None:
    messages = (SYSTEM, turn("user", "Look: ", 0, "what is it?"), turn("assistant", "x"), turn("user", "so?"), ANSWER)
    assert cut_front(messages, 0) == messages
    assert cut_front(messages, 11) == (SYSTEM, turn("user", 0, "is it?"), *messages[2:])
    assert cut_front(messages, 19) == (SYSTEM, turn("user", 0), messages[2], turn("user", "?"), ANSWER)


def test_text_is_cut_to_the_limit_at_a_word() -> None:
    messages = (SYSTEM, turn("user", 0, "a long story about " + "words " * 20 + "what is it?"), ANSWER)
    total = letters(messages) + 313

    def cut(limit: int) -> str:
        found = fit(messages, [(9, 9)], count=letters, num_crops=1, max_length=limit, on_too_long="cut_text")
        assert found.tokens <= limit and found.messages[0] == SYSTEM and found.messages[2] == ANSWER
        assert found.messages[1].parts[0] == ImagePart(0) and found.num_crops == 1
        return found.messages[1].text

    assert cut(total) == messages[1].text
    assert cut(total - 1) == "long story about " + "words " * 20 + "what is it?"
    assert cut(total - 3) == "story about " + "words " * 20 + "what is it?"
    shortest = letters((SYSTEM, turn("user", 0, "?"), ANSWER)) + 313
    assert cut(shortest) == "?" and cut(shortest + 9) == "is it?"
    with pytest.raises(TooLongError, match=rf"{shortest} tokens .* limit is {shortest - 1}: even with all text cut"):
        cut(shortest - 1)


@pytest.mark.parametrize(
    ("how", "crops", "limit", "told"),
    [
        (
            "skip",
            4,
            785,
            "set data.on_too_long to fewer_crops or cut_text, lower image.num_crops, shorten the text, or ",
        ),
        ("skip", 4, 400, "set data.on_too_long to fewer_crops, lower image.num_crops, or "),
        ("skip", 4, 340, "lower image.num_crops and shorten the text, or "),
        ("skip", 4, 310, ""),
        ("skip", 1, 340, "set data.on_too_long to cut_text, shorten the text, or "),
        ("skip", 1, 310, ""),
        ("skip", 1, 320, ""),
        (
            "cut_text",
            4,
            760,
            "even with all text cut that may be; set data.on_too_long to fewer_crops, lower image.num_c",
        ),
        ("cut_text", 4, 340, "even with all text cut that may be; lower image.num_crops, or "),
        ("cut_text", 4, 310, "even with all text cut that may be; "),
        ("cut_text", 1, 330, "even with all text cut that may be; "),
        ("fewer_crops", 4, 340, "even at 1 crop an image; shorten the text, or "),
        ("fewer_crops", 4, 310, "even at 1 crop an image; "),
        ("fewer_crops", 1, 340, "even at 1 crop an image; set data.on_too_long to cut_text, shorten the text, or "),
    ],
)
def test_ways_out_are_those_that_would_do(how: Any, crops: int, limit: int, told: str) -> None:
    """A square image and 34 tokens of text, of which 22 must be, and 24 without what may be cut."""
    messages = (turn("user", 0, "what is it?"), ANSWER)

    def error(length: int, how: Any, messages: Any = messages, crops: int = crops) -> str:
        try:
            fit(messages, [(9, 9)], count=letters, num_crops=crops, max_length=length, on_too_long=how)
        except TooLongError as error:
            return str(error)
        return ""

    assert f"the limit is {limit}: {told}" in error(limit, how) and error(limit, how).endswith("raise data.max_length")
    bare = (turn("user", 0, "w"), turn("assistant", "y"))
    for length in range(300, 790):
        if (found := way_out(error(length, how))) and how != "cut_text":
            assert ("fewer_crops" in found) == (how != "fewer_crops" and not error(length, "fewer_crops"))
            assert ("cut_text" in found) == (not error(length, "cut_text"))
            assert ("shorten" in found and "num_crops and" not in found) == (not error(length, how, bare))
        if found:
            assert ("num_crops" in found and "num_crops and" not in found) == (not error(length, how, crops=1))
            assert not ("num_crops and" in found and error(length, how, bare, 1))
            assert found == "raise data.max_length" or found.endswith(", or raise data.max_length")


def test_the_budget_of_an_image() -> None:
    assert [crops_within(tokens) for tokens in (312, 313, 468, 469, 780, 781, 2652, 2653)] == [0, 1, 1, 2, 3, 4, 15, 16]
    dice = random.Random(3)
    sides = [(dice.choice((1, 3, 50, dice.randrange(1, 900))), dice.randrange(1, 900)) for _ in range(4000)]
    for num_crops in (1, 2, 3, 4, 7, 16):
        costs = []
        for width, height in sides:
            try:
                costs.append(num_image_tokens(width, height, num_crops))
            except ImageError:
                continue
        assert max(costs) <= most_image_tokens(num_crops) == num_image_tokens(10, 10 * num_crops, num_crops)


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=4), build_tokenizer())


def photo(width: int, height: int) -> ImageRef:
    buffer = BytesIO()
    Image.new("RGB", (width, height), "green").save(buffer, "PNG")
    return ImageRef("a.png", data=buffer.getvalue())


PHOTOS = (photo(4, 4), photo(9, 3))


def story(dice: random.Random) -> Row:
    """A conversation of one to three exchanges, with images in some of its questions."""
    words = ("the image", "<|end|>", "what is this", "é", "中文", "<|image_1|>", "\n", "answer")
    turns, images = [], 0
    if dice.random() < 0.4:
        turns.append(turn("system", " ".join(dice.choices(words, k=3))))
    for _ in range(dice.randrange(1, 4)):
        parts: list[str | int] = [" ".join(dice.choices(words, k=dice.randrange(1, 30)))]
        if images < 2 and dice.random() < 0.35:
            parts.insert(dice.randrange(2), images)
            images += 1
        turns += [turn("user", *parts), turn("assistant", " ".join(dice.choices(words, k=3)))]
    return Row(tuple(turns), PHOTOS[:images], {}, "set", 5)


@pytest.mark.parametrize("policy", ["skip", "fewer_crops", "cut_text"])
def test_no_limit_ever_cuts_an_image_span(policy: Any, processor: Phi3VProcessor) -> None:
    dice, refused, changed = random.Random(11), 0, 0
    for _ in range(60):
        row = story(dice)
        whole = encode(row, processor)
        spent = [num_image_tokens(*size, 4) for size in ((4, 4), (9, 3))[: len(row.images)]]
        assert text_tokens(row.messages, processor) + sum(spent) == len(whole["input_ids"])
        limit = dice.randrange(40, len(whole["input_ids"]) + 20)
        try:
            sample = encode(row, processor, max_length=limit, on_too_long=policy)
        except TooLongError as error:
            assert error.reason_code == "too_long" and str(error).startswith("set, row 5: ")
            refused += 1
            continue
        ids, labels = sample["input_ids"].tolist(), sample["labels"]
        runs = [len(list(run)) for token, run in groupby(ids) if token == processor.image_token_id]
        sizes = sample.get("image_sizes", torch.zeros(0, 2)).tolist()
        assert len(ids) <= limit and runs == [grid_tokens(height // 336, width // 336) for height, width in sizes]
        assert len(runs) == len(row.images)
        assert torch.equal(labels[labels != -100], whole["labels"][whole["labels"] != -100])
        changed += len(ids) != len(whole["input_ids"])
    assert refused > 5 and (changed > 5) == (policy != "skip")


def test_encoded_rows_fit_by_the_policy(processor: Phi3VProcessor) -> None:
    rows = [Row((turn("user", 0, "what is this " * 9), ANSWER), PHOTOS[:1], {}, "set", 0)]
    length = len(encode(rows[0], processor)["input_ids"])
    assert len(EncodedRows(rows, processor, max_length=length)[0]["input_ids"]) == length
    with pytest.raises(TooLongError, match="set, row 0: "):
        EncodedRows(rows, processor, max_length=length - 1)[0]
    fewer = EncodedRows(rows, processor, max_length=length - 1, on_too_long="fewer_crops")[0]
    assert fewer["image_sizes"].tolist() == [[336, 336]] and len(fewer["input_ids"]) == length - 757 + 313
    cut = EncodedRows(rows, processor, max_length=length - 1, on_too_long="cut_text")[0]
    assert cut["image_sizes"].tolist() == [[672, 672]] and length - 6 <= len(cut["input_ids"]) < length
    assert processor.image_processor.num_crops == 4


def test_the_worked_count_with_the_real_tokenizer(shared: Any) -> None:
    real = Phi3VProcessor.from_pretrained(shared / "phi3v" / "hub" / "Phi-3.5-vision-instruct")
    assert text_tokens((turn("user", 0, "Hi"), turn("assistant", "Ho")), real) == 17
