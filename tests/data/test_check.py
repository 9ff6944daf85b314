"""What is said of a data set: facts of rows, duplicates, spreads, prices, and a way out for every reason."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.cli_data_screen import duplicate_lines
from phi3v.data.advice import ADVICE, advice
from phi3v.data.check import count_images, crop_prices, listed, rows_beyond, spread
from phi3v.data.duplicates import find_duplicates
from phi3v.data.fit import OnTooLong, fit
from phi3v.data.lengths import row_lengths
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, RowProblem, TextPart
from phi3v.data.survey import RowFacts, SurveyOptions, survey, too_long_problem
from phi3v.errors import TooLongError
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor

SOURCE = Path(__file__).resolve().parents[2] / "src" / "phi3v"


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=4), build_tokenizer())


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def row(index: int, *images: ImageRef, question: str = "what is this", answer: str = "the answer") -> Row:
    parts = (*(ImagePart(number) for number in range(len(images))), TextPart(question))
    return Row((Message("user", parts), Message("assistant", (TextPart(answer),))), images, {}, "shop.csv", index)


def look(rows: list[Row], processor: Any, **options: Any) -> list[RowFacts | RowProblem]:
    return list(survey(rows, processor, SurveyOptions(**options)))


def facts_of(rows: list[Row], processor: Any = None, **options: Any) -> list[RowFacts]:
    found = look(rows, processor, **options)
    assert all(isinstance(one, RowFacts) for one in found), found
    return [one for one in found if isinstance(one, RowFacts)]


def test_a_survey_has_the_lengths_of_planning_and_names_what_does_not_decode(processor: Phi3VProcessor) -> None:
    whole = picture(1)
    hole = whole[:200] + bytes(40) + whole[240:]  # header and end are sound, the pixels between are not
    rows = [row(index, ImageRef(data=picture(index))) for index in range(150)]
    rows[70] = row(70, ImageRef("hole.png", data=hole))
    found = look(rows, processor)
    lengths = list(row_lengths(rows, processor))
    for number, (one, length) in enumerate(zip(found, lengths, strict=True)):
        if number == 70:
            assert isinstance(one, RowProblem)
            assert (one.row, one.source, one.reason_code) == (70, "shop.csv", "image_unreadable")
            assert one.message.startswith("image hole.png does not decode: ")
        else:
            assert isinstance(one, RowFacts) and one.length == length and one.sizes == ((40, 30),)
    assert isinstance(look(rows[70:71], processor, decode=False)[0], RowFacts)  # headers alone do not show it


def test_a_row_beyond_the_limit_has_facts_and_is_a_problem_unless_it_can_be_made_to_fit(
    processor: Phi3VProcessor,
) -> None:
    rows = [row(0), row(1, ImageRef(data=picture(1))), row(2, question="what " * 900)]
    facts = facts_of(rows, processor, max_length=700)
    lengths = [fact.length.total for fact in facts if fact.length is not None]
    problems = [too_long_problem(fact) for fact in facts]
    assert problems[0] is None and [problem.row for problem in problems if problem] == [1, 2]
    assert problems[1] is not None and problems[1].reason_code == "too_long"
    assert problems[1].message.startswith(f"{lengths[1]} tokens (757 for images), and the limit is 700: ")
    assert rows_beyond(facts, 700) == 2 and rows_beyond(facts, None) == 0
    for way, left_out in (("fewer_crops", [2]), ("cut_text", [1])):
        again = facts_of(rows, processor, max_length=700, on_too_long=way)
        assert [fact.row for fact in again if fact.too_long] == left_out, way
        assert [fact.length for fact in again] == [fact.length for fact in facts]


def test_images_that_are_still_to_be_downloaded_are_passed_over(processor: Phi3VProcessor, tmp_path: Path) -> None:
    address = "https://shop.example/a.jpg"
    waiting = row(0, ImageRef(None, None, str(tmp_path), True, address))
    (tmp_path / "here").write_bytes(picture(2))
    cached = row(1, ImageRef(str(tmp_path / "here"), None, str(tmp_path), True, "https://shop.example/b.jpg"))
    facts = facts_of([waiting, cached, row(2, ImageRef(data=picture(3)))], processor)
    assert facts[0].length is None and facts[0].sizes == () and len(facts[0].images) == 1
    assert facts[1].length is not None and [len(fact.web) for fact in facts] == [1, 1, 0]
    assert count_images(facts) == 3


def test_without_a_processor_sizes_are_known_and_tokens_are_not() -> None:
    (fact,) = facts_of([row(0, ImageRef(data=picture(1)))])
    assert fact.length is None and fact.sizes == ((40, 30),)
    prices = crop_prices([fact], num_crops=None)
    assert [(price.num_crops, price.total, price.longest_row) for price in prices] == [
        (16, 1921, None),
        (4, 757, None),
        (1, 313, None),
        (5, 757, None),
    ]


def test_the_same_picture_is_found_under_another_name_and_in_another_file_format() -> None:
    one, other = ImageRef("a.png", data=picture(1)), ImageRef("b.bmp", data=picture(1, "BMP"))
    third = ImageRef("c.png", data=picture(2))
    train = [row(0, one), row(1, third), row(2, other), row(3, one, question="another")]
    validation = [row(10, other), row(11, third, question="new"), row(12, ImageRef(data=picture(4)))]
    found = find_duplicates(facts_of(train), facts_of(validation))
    assert (found.rows_in_train, found.images_in_train) == (1, 2)
    assert (found.rows_in_both, found.images_in_both) == (1, 2)
    assert ("row", [("shop.csv", 0), ("shop.csv", 10)]) in found.examples
    assert ("row", [("shop.csv", 0), ("shop.csv", 2)]) in found.examples
    assert ("image", [("shop.csv", 1), ("shop.csv", 11)]) in found.examples
    quick = find_duplicates(facts_of(train, decode=False), facts_of(validation, decode=False))
    assert (quick.rows_in_train, quick.images_in_train) == (0, 1)  # the bytes of a BMP are others


def test_texts_without_images_are_compared_too() -> None:
    rows = [row(0), row(1), row(2, answer="no")]
    found = find_duplicates(facts_of(rows), facts_of([row(5)]))
    assert (found.rows_in_train, found.images_in_train, found.rows_in_both, found.images_in_both) == (1, 0, 1, 0)


def test_validation_rows_that_repeat_each_other_are_counted_and_said() -> None:
    picture_of = ImageRef(data=picture(1))
    validation = [row(0), row(1, picture_of), row(2), row(3, picture_of), row(4), row(5, picture_of, answer="no")]
    found = find_duplicates(facts_of([row(9, answer="other")]), facts_of(validation))
    assert (found.rows_in_validation, found.rows_in_train, found.rows_in_both, found.images_in_both) == (3, 0, 0, 0)
    assert found.examples == [("row", [("shop.csv", index) for index in group]) for group in ((0, 2, 4), (1, 3))]
    report: Any = SimpleNamespace(duplicates=found)
    assert list(duplicate_lines(report)) == [
        "3 held-out rows repeat another",
        "  the same row: shop.csv row 0, shop.csv row 2, shop.csv row 4",
        "  the same row: shop.csv row 1, shop.csv row 3",
    ]


def test_spreads_in_round_steps() -> None:
    found = spread([10, 20, 20, 1000])
    assert found is not None
    assert (found.least, found.median, found.p95, found.most, found.total) == (10, 20, 1000, 1000, 1050)
    assert found.bars == [(0, 199, 3), (200, 399, 0), (400, 599, 0), (600, 799, 0), (800, 999, 0), (1000, 1199, 1)]
    assert spread([]) is None
    same = spread([7, 7])
    assert same is not None and same.bars == [(7, 7, 2)]
    for values in ([0, 1], list(range(100)), [3, 131072], [41, 50]):
        many = spread(values)
        assert many is not None and len(many.bars) <= 8 and sum(rows for _, _, rows in many.bars) == len(values)


def test_prices_are_what_the_counts_say(processor: Phi3VProcessor) -> None:
    rows = [row(0, ImageRef(data=picture(1, size=(64, 64)))), row(1)]
    facts = facts_of(rows, processor)
    text = [fact.length.text for fact in facts if fact.length is not None]
    prices = crop_prices(facts, num_crops=4, context=2000)
    assert [(p.num_crops, p.max_tokens, p.square, p.chosen) for p in prices] == [
        (16, None, 2509, False),
        (4, None, 757, True),
        (1, None, 313, False),
        (5, 1000, 757, False),
    ]
    assert prices[0].longest_row == 2509 + text[0] and prices[0].beyond_context == 1 and prices[0].mean == 2509
    assert prices[1].beyond_context == 0
    for crops, budget, told in ((11, 2000, 2000), (9, 2000, None)):  # 9 crops are another number's, not the budget's
        own = crop_prices(facts, num_crops=crops, max_tokens=budget, context=2000)[0]
        assert (own.num_crops, own.max_tokens, own.square, own.chosen) == (crops, told, 1489, True)
    assert crop_prices(facts_of([row(0)]), num_crops=4) == []


def test_every_reason_has_its_own_way_out_and_the_documents_say_the_same() -> None:
    raised: set[str] = set()
    for path in (SOURCE / "errors.py", *(SOURCE / "data").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        raised |= set(re.findall(r'reason_code(?: =|",) "(\w+)"', text))
        for call in re.findall(r"(?:UnusableRecord|RowProblem)\((.{0,90})", text, re.DOTALL):
            raised |= set(re.findall(r'"([a-z]+_[a-z_]+)"', call))
        if path.name in ("download.py", "guarded_network.py", "address_guard.py"):
            raised |= set(re.findall(r'"(url_[a-z_]+)"', text))
    document = (SOURCE.parents[1] / "docs" / "data.md").read_text(encoding="utf-8").replace("`", "")
    told = ways_out(document, "reason")
    assert sorted(raised) == sorted(told)
    assert {code: advice(code) for code in told} == told == ADVICE
    assert advice("of_another_version") not in ADVICE.values()
    assert (
        advice("url_private", "image http://169.254.169.254/a: it is link-local; mend the address")
        == "mend the address"
    )
    printed = re.search(r"\n rows  reason +what to do\n((?: \d+ .*\n)+)", document)
    assert printed is not None
    lines = [line.split(maxsplit=2)[1:] for line in printed[1].splitlines()]
    assert len(lines) == 4 and dict(lines) == {code: ADVICE[code] for code, _ in lines}


def ways_out(document: str, first: str) -> dict[str, str]:
    """First and last cell of each row of the tables that have so named a first column and say what to do.

    Example: "| url_dns, url_gone (for good) | not there | mend it |" -> {"url_dns": "mend it", "url_gone": "mend it"}.
    """
    tables = re.findall(rf"^\| {re.escape(first)} \|.*what to do.*\n\|[-|]+\n((?:\|.*\n)+)", document, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in "".join(tables).splitlines()]
    return {code: row[-1] for row in rows for code in row[0].removesuffix(" (for good)").split(", ")}


def test_what_to_do_about_a_row_that_is_too_long_is_what_its_message_says() -> None:
    document = (SOURCE.parents[1] / "docs" / "data.md").read_text(encoding="utf-8").replace("`", "")
    messages = row(0, ImageRef("a.png")).messages  # 42 tokens with the counter below, of which cut_text can take 11
    told: dict[str, str] = {}
    cases: tuple[tuple[OnTooLong, int, int], ...] = (("skip", 4, 790), ("fewer_crops", 1, 350), ("cut_text", 4, 760))
    for how, crops, limit in cases:
        with pytest.raises(TooLongError) as caught:
            fit(messages, [(9, 9)], count=letters, num_crops=crops, max_length=limit, on_too_long=how)
        told[how] = listed([RowProblem(0, "too_long", str(caught.value), "shop.csv")])[0]["fix"]
        assert str(caught.value).endswith(told[how]) and how not in told[how]
    assert told == ways_out(document, "data.on_too_long") and told["skip"] == advice("too_long")
    assert listed([RowProblem(0, "url_gone", "gone", "shop.csv")])[0]["fix"] == "drop the row"


def letters(messages: tuple[Message, ...]) -> int:
    """A token a character, and 10 a turn."""
    return sum(10 + len(message.text) for message in messages)
