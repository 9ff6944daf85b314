"""Checks: what leaked is found and named, answers that need no image fail, what is forgotten and what is misshapen."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from phi3v.data.alike import difference_hash, find_alike, is_grey, same_up_close, take_prints
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.demo.catalogue import photo, products
from phi3v.evaluation.answers import Answers
from phi3v.evaluation.check_answers import check_forgetting, check_images
from phi3v.evaluation.check_constant import check_constant
from phi3v.evaluation.check_form import check_form, scripts
from phi3v.evaluation.check_overlap import check_overlap
from phi3v.evaluation.compared import few_rows
from phi3v.evaluation.constant import ConstantAnswer, best_constant
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.headline import cautions
from phi3v.evaluation.kinds import choose_scoring
from phi3v.evaluation.row_scores import Column, score_rows
from phi3v.evaluation.shares import majority_answer

TEMPLATE = AnswerTemplate("It is {name}.")
NO_CONTROL = {"rows": 9, "primary": "exact_match", "metrics": {"exact_match": {}}}


def make_row(index: int, answer: str, image: Path | None, source: str = "made.csv", question: str = "What?") -> Row:
    images = (ImageRef(str(image)),) if image else ()
    parts = (*(ImagePart(place) for place in range(len(images))), TextPart(question))
    return Row((Message("user", parts), Message("assistant", (TextPart(answer),))), images, {}, source, index)


def said(texts: list[str], losses: list[float] | None = None, ended: list[bool] | None = None) -> Answers:
    return Answers(texts, losses or [1.0] * len(texts), [1] * len(texts), ended=list(ended or [True] * len(texts)))


def scoring_for(expected: list[str], template: AnswerTemplate = TEMPLATE):
    return choose_scoring(expected, ["What?"] * len(expected), template)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """40 photos of training and 12 of the evaluation; the last 3 of the latter are in training as other files."""
    folder = tmp_path_factory.mktemp("shop")
    train, test = [], []
    for part, count, rows in (("train", 40, train), ("test", 12, test)):
        for number, product in enumerate(products(part, count)):
            place = folder / f"{part}{number}.png"
            photo(product).save(place, compress_level=1)
            rows.append(make_row(number, f"It is {product.title}, {product.full_price}.", place, f"{part}.csv"))
    for number, (row, ending, size, options) in enumerate(
        ((test[9], "jpg", 336, {"quality": 50}), (test[10], "webp", 168, {}), (test[11], "png", 504, {}))
    ):
        place = folder / f"copy{number}.{ending}"
        Image.open(row.images[0].path).resize((size, size)).save(place, **options)
        answer = "It is something else." if number == 2 else row.answer.upper()
        train.append(make_row(40 + number, answer, place, "train.csv"))
    return train, test


def test_hash_of_slopes_and_of_nothing():
    slope = Image.fromarray(np.tile(np.arange(0, 252, 7, dtype=np.uint8), (32, 1)))
    assert difference_hash(slope) == 2**64 - 1
    assert difference_hash(slope.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert difference_hash(Image.new("RGB", (50, 40), "red")) == 0


def test_copies_are_found_and_other_products_are_not(shop):
    train, test = shop
    known, asked = take_prints(train), take_prints([*test, make_row(12, "x", Path("nowhere.png"))])
    assert known.places == [[(place, 0)] for place in range(43)] and asked.unread == 1
    assert [(pair.asked, pair.known) for pair in find_alike(known, asked, train, test)] == [(9, 40), (10, 41), (11, 42)]
    hashes = np.bitwise_count(asked.hashes[:9, None] ^ known.hashes[None])
    assert (hashes <= 8).sum() > 9, "the hash alone takes products for each other; pixels have to decide"


def test_black_and_white_copies_are_found_and_other_products_are_not(shop, tmp_path):
    """Copies of the first 9 photos of the evaluation, in black and white, are known; asked are all 12 in colour."""
    known = []
    for number, row in enumerate(shop[1][:9]):
        grey = Image.open(row.images[0].path).convert("L")
        size, options = ((168, 168), {"quality": 50}) if number % 2 else (grey.size, {"quality": 90})
        grey.resize(size).save(tmp_path / f"{number}.jpg", **options)
        known.append(make_row(number, "x", tmp_path / f"{number}.jpg"))
    prints, asked = take_prints(known), take_prints(shop[1])
    assert is_grey(prints.small).all() and not is_grey(asked.small).all()
    for one, other, rows in ((prints, asked, (known, shop[1])), (asked, prints, (shop[1], known))):
        assert [(pair.asked, pair.known) for pair in find_alike(one, other, *rows)] == [(n, n) for n in range(9)]


def test_the_same_form_filled_in_otherwise_is_another_picture(tmp_path):
    page = Image.new("L", (900, 900), 255)
    pages = []
    for number, ink in enumerate((0, 0, 255)):
        page.paste(ink, (400, 400, 440, 420))  # one of many fields
        page.save(tmp_path / f"{number}.png")
        pages.append(ImageRef(str(tmp_path / f"{number}.png")))
    assert same_up_close(pages[0], pages[1]) and not same_up_close(pages[0], pages[2])
    assert not same_up_close(pages[0], ImageRef("nowhere.png"))


def test_a_leaked_split_is_caught(shop):
    train, test = shop
    right = Column("exact_match", None, np.array([0.0] * 8 + [1.0] * 4))
    found = check_overlap(train, test, right, Column("exact_match", None, np.zeros(12))).to_dict()
    assert found["verdict"] == "fail"
    assert found["line"] == (
        "2 of 12 rows (16.7 %) are in the training data as well; the score of the other 10 is 20.0 % "
        "(5.7 % to 51.0 %), of all 33.3 %; the pictures of 1 of the other 10 are in the training data too, with other "
        "texts; 43 training images looked at (cropped, mirrored or brighter copies are not found)"
    )
    some = check_overlap(train, test, right, None, most_images=42).line
    assert "; 42 training images looked at, those of 1 row were not (cropped" in some
    assert (found["leaked"], found["seen_images"], found["same_texts"], found["looked_at"]) == (2, 3, 2, 43)
    assert found["seen_not_leaked"] == 1
    pairs = [(pair["row"], pair["train_row"], pair["shares"]) for pair in found["pairs"]]
    assert pairs == [(9, 40, "image and text"), (10, 41, "image and text"), (11, 42, "image")]
    assert found["pairs"][0]["train_images"][0].endswith("copy0.jpg")
    without = found["without"]
    assert without["tuned"]["value"] == 0.2 and without["tuned"]["rows"] == 10 and without["won"] == 2


def test_overlap_of_texts_and_a_clean_split(shop):
    train, test = shop
    right = Column("exact_match", None, np.ones(12))
    clean = check_overlap(train[:40], test, right, None).to_dict()
    assert (clean["verdict"], clean["leaked"], clean["seen_images"], clean["without"]) == ("pass", 0, 0, None)
    seen = check_overlap([train[42]], test, right, None)
    assert seen.verdict == "warn" and "the pictures of 1 of 12 rows" in seen.line
    some = check_overlap(train, test, right, None, most_images=10)
    assert (some.figures["looked_at"], some.figures["not_looked_at"]) == (10, 33)
    same_answers = [make_row(0, test[0].answer, train[0].images[0].path)]
    told = check_overlap(same_answers, test, right, None)
    assert told.verdict == "pass" and told.figures["same_texts"] == 1, "the same answer to another picture is no leak"
    assert (
        "(cropped, mirrored or brighter copies are not found)" in told.line and "are in training too" not in told.line
    )
    others = [make_row(number, row.answer, train[number].images[0].path) for number, row in enumerate(test)]
    copies = check_overlap(others, test, right, None)  # as cropped copies would come: texts alike, pictures not
    assert (copies.verdict, copies.figures["same_rare_texts"], copies.figures["seen_images"]) == ("warn", 12, 0)
    assert "question and answer of 12 of 12 rows stand in just one row of training each" in copies.line
    part = check_overlap([*others[:7], make_row(7, test[11].answer, test[11].images[0].path)], test, right, None)
    assert part.verdict == "fail" and part.figures["leaked"] == 1
    assert "; question and answer of 7 of the other 11 rows stand in just one row of training each" in part.line
    assert part.line.endswith("8 training images looked at (cropped, mirrored or brighter copies are not found)")
    less = check_overlap([*others[:5], make_row(5, test[11].answer, test[11].images[0].path)], test, right, None)
    assert less.figures["same_rare_texts_not_found"] == 5 and "in just one row" not in less.line, "5 of 11 are usual"
    usual = check_overlap([*others, *others], test, right, None)
    assert usual.verdict == "pass" and "question and answer of 12 of 12 rows are in training too" in usual.line
    texts = [make_row(number, f"answer {number}", None) for number in range(4)]
    leaked = check_overlap(texts[:2], texts, Column("exact_match", None, np.ones(4)), None)
    assert leaked.verdict == "fail" and leaked.figures["leaked"] == 2


def test_rows_of_a_picture_with_many_questions_are_all_compared(shop):
    """Nine rows of training have the picture: the leaked one is the last, in any file that has its pixels."""
    test = shop[1]
    Image.open(test[0].images[0].path).save(copy := Path(test[0].images[0].path).with_name("copy.bmp"))
    asked = [make_row(0, "a cap", test[0].images[0].path, question="What is it?")]
    others = [make_row(n, f"answer {n}", test[0].images[0].path, question=f"Number {n}?") for n in range(8)]
    leaked = [*others, make_row(8, "A cap", copy, question="What is it?")]
    assert take_prints(leaked).places == [[(n, 0) for n in range(9)]]
    right = Column("exact_match", None, np.ones(1))
    found = check_overlap(leaked, asked, right, None)
    assert (found.verdict, found.figures["leaked"], found.figures["looked_at"]) == ("fail", 1, 9)
    assert found.figures["pairs"][0]["train_row"] == 8 and found.figures["pairs"][0]["shares"] == "image and text"
    clean = check_overlap(others, asked, right, None)
    assert clean.verdict == "warn" and "with other texts;" in clean.line


@pytest.mark.parametrize(
    ("known", "asked", "verdict", "leaked"),
    [
        ((0, 1), (0, 2), "pass", 0),  # a reference that rows share is not the row
        ((0, 1), (0, 1), "fail", 1),
        ((1, 0), (0, 1), "fail", 1),
        ((0, 1), (0,), "warn", 0),
        ((0,), (0, 1), "pass", 0),
        ((0, 0), (0, 0), "fail", 1),
    ],
)
def test_a_row_of_several_pictures_leaks_with_all_of_them(shop, known, asked, verdict, leaked):
    def row(places: tuple[int, ...]) -> Row:
        images = tuple(shop[0][place].images[0] for place in places)
        parts = (*(ImagePart(place) for place in range(len(images))), TextPart("Is it the same?"))
        return Row((Message("user", parts), Message("assistant", (TextPart("No."),))), images, {}, "made.csv", 0)

    found = check_overlap([row(known)], [row(asked)], Column("exact_match", None, np.ones(1)), None)
    assert (found.verdict, found.figures["leaked"]) == (verdict, leaked)
    assert verdict != "warn" or "with other texts or beside other pictures;" in found.line


def test_a_model_that_ignores_its_images_is_caught():
    names = ["red", "blue", "green", "white"]
    expected = [f"It is {names[number % 4]}." for number in range(40)]
    rows = [make_row(number, text, Path(f"{number}.png")) for number, text in enumerate(expected)]
    scoring = scoring_for(expected)
    blind = said(["It is red."] * 40, [3.0] * 40)
    looking = check_images(scoring, rows, said(expected, [0.1] * 40), blind).to_dict()
    assert looking["verdict"] == "pass" and looking["p"] < 1e-6
    assert (looking["with_images"]["value"], looking["with_grey_images"]["value"]) == (1.0, 0.25)
    assert looking["constant"] == 0.25 and looking["same_answers"]["value"] == 0.25 and looking["loss"]["p"] < 0.001
    assert looking["line"] == (
        "exact match 100 % (91.2 % to 100 %) with the images, 25.0 % (12.5 % to 40.0 %) with grey ones in their place, "
        "25.0 % by the best single answer (p < 0.001, 40 rows)"
    )
    same = [make_row(number, text, Path(f"{number // 10}.png")) for number, text in enumerate(expected)]
    few = check_images(scoring, same, said(expected), blind)
    assert few.verdict == "skipped" and few.line.startswith("40 rows with images about 4 photos are too few")
    for answers in (["It is red."] * 40, expected):  # a constant answer, and one that the question gives away
        ignoring = check_images(scoring, rows, said(answers), said(answers))
        assert ignoring.verdict == "fail" and "nothing shows that answers depend on the images" in ignoring.line
    template = AnswerTemplate("{name} for {price}")
    priced = [f"a {number} for {100 + number % 4}" for number in range(40)]
    shown = [make_row(number, text, Path(f"{number}.png")) for number, text in enumerate(priced)]
    part = check_images(
        scoring_for(priced, template),
        shown,
        said([f"it for {100 + n % 4}" for n in range(40)]),
        said(["it for 100"] * 40),
    )
    assert part.verdict == "pass", "no whole answer is right, and the prices come from the images"
    assert part.line.endswith("whole answers show nothing, but field “price” falls from 100 % to 25.0 %")
    mostly = [*expected[:30], *["It is pink."] * 10]
    assert check_images(scoring, rows, said(expected), said(mostly)).verdict == "warn"
    assert check_images(scoring, rows[:5], said(expected[:5]), said(mostly[:5])).verdict == "skipped"


def test_a_model_tuned_on_shuffled_answers_is_caught():
    """Its answers have the right form and belong to other pictures, with the image or without."""
    expected = [f"It is product {number}." for number in range(40)]
    rows = [make_row(number, text, Path(f"{number}.png")) for number, text in enumerate(expected)]
    dealt = [Random(seed).sample(expected, 40) for seed in (1, 2)]
    scoring = scoring_for(expected)
    assert check_images(scoring, rows, said(dealt[0]), said(dealt[1])).verdict == "fail"
    assert check_form(scoring, expected, ["What?"] * 40, said(dealt[0])).verdict == "pass"


def test_a_model_that_knows_no_more_than_what_is_frequent_is_caught():
    """Tuned on shuffled answers it says the likeliest: far more than its base, and no more than one answer to all."""
    single = ConstantAnswer("It is red.", "most frequent", 2)
    expected = [f"It is {'red' if number % 3 else 'blue'}." for number in range(60)]
    asked, scoring = ["What?"] * 60, scoring_for(expected)

    def found(answers, groups=None, fields=()):
        scores = score_rows(scoring, expected, answers, asked, groups=groups)
        return check_constant(scoring, expected, asked, scores["exact_match"], single, fields)

    dealt = found(Random(3).sample(expected, 60))
    assert dealt.verdict == "fail" and dealt.figures["difference"]["value"] < 0
    same = found(["It is red."] * 60)
    assert same.verdict == "fail" and same.figures["p"] == 1.0
    assert "66.7 % by always answering “It is red.” (0 points" in same.line
    assert "knows more than one answer to everything" in same.line
    some = found(["It is red."] * 60, fields=["field “price” (90.0 % beside 10.0 %)"])
    assert some.verdict == "warn" and some.line.endswith("to everything is field “price” (90.0 % beside 10.0 %)")
    some = ["It is red."] * 54 + expected[54:]  # two rows more are chance
    assert found(some).verdict == "fail" and found(some).figures["won"] == 2
    knows = found(expected)
    assert (knows.verdict, knows.figures["won"], knows.figures["lost"]) == ("pass", 20, 0)
    assert found(expected, np.arange(60) // 15).line == "4 photos are too few: 6 at least can tell"
    assert found(expected, np.arange(60) // 10).verdict == "pass", "6 photos, all of which gain"


def odd_placeholder(kind: str) -> tuple[list[str], str]:
    """60 expected answers, the most frequent of which is an odd one; and one answer that fits the others far better."""
    items = [f"{('red', 'blue', 'green')[n % 3]} scarf number {n}" for n in range(56)]
    if kind == "json":
        made = [f'{{"kind": "scarf", "size": {n}, "unit": "EUR"}}' for n in range(52)]
        return [*made, *['{"note": "unreadable"}'] * 8], '{"kind": "scarf", "size": 70, "unit": "EUR"}'
    if kind == "number":
        return [*["990"] * 4, *[f"{100 + n}" for n in range(56)]], "131"
    return [*["n/a"] * 4, *items], "red scarf number 77"


@pytest.mark.parametrize("kind", ["short", "json", "number"])
def test_one_answer_to_everything_never_passes(kind):
    """The control is the best single answer, not the most frequent one: beside that any of these would look clever."""
    expected, same = odd_placeholder(kind)
    asked, scoring = ["What?"] * 60, scoring_for(expected, AnswerTemplate("{answer}"))
    assert scoring.kind == kind
    tuned = score_rows(scoring, expected, [same] * 60, asked)[scoring.metrics[0]]
    most = ConstantAnswer(majority_answer(expected), "most frequent", 1)
    assert check_constant(scoring, expected, asked, tuned, most).verdict == "pass", "what the most frequent one lets by"
    single = best_constant(scoring, expected, asked)
    assert single.origin in ("expected", "fields") and single.tried > 40
    assert check_constant(scoring, expected, asked, tuned, single).verdict == "fail"
    own = best_constant(scoring, expected, asked, [same] * 60)
    found = check_constant(scoring, expected, asked, tuned, own)
    assert found.verdict == "fail" and found.figures["difference"]["value"] <= 0, "the model's own answer was tried"
    knows = score_rows(scoring, expected, expected, asked)[scoring.metrics[0]]
    assert check_constant(scoring, expected, asked, knows, own).verdict == "pass"


@pytest.mark.parametrize(
    ("before", "after", "verdict", "words"),
    [
        (40, 39, "pass", "exact match 97.5 % on 40 kept rows (another task), 100 % before the tuning (-2.5 points"),
        (20, 40, "pass", "+50.0 points"),
        (40, 20, "fail", "-50.0 points"),
    ],
)
def test_what_was_forgotten_is_told(before, after, verdict, words):
    expected = [f"It is product {number}." for number in range(40)]
    rows = [make_row(number, text, Path(f"{number}.png")) for number, text in enumerate(expected)]
    answers = [said([*expected[:right], *["no"] * (40 - right)]) for right in (before, after)]
    found = check_forgetting(scoring_for(expected), rows, *answers)
    assert found.verdict == verdict and words in found.line
    assert found.figures["before"]["value"] == before / 40 and found.figures["after"]["low"] is not None
    alone = check_forgetting(scoring_for(expected), rows, None, answers[1])
    assert alone.verdict == "skipped" and alone.figures["after"]["value"] == after / 40


@pytest.mark.parametrize(
    ("rows", "before", "after", "verdict", "words"),
    [
        (5, 5, 0, "skipped", "5 rows are too few, 6 at least can tell; some 6 such rows would show a loss as large"),
        (5, 5, 5, "skipped", "5 rows are too few, 6 at least can tell"),
        (6, 6, 0, "fail", "p = 0.031)"),
        (7, 2, 0, "warn", "p = 0.5): too few to tell; some 25 such rows would show a loss as large"),
        (7, 2, 2, "skipped", "too few to tell, the loss of all that the base gets would not show"),
        (7, 0, 3, "skipped", "too few to tell, the loss of all that the base gets would not show"),
        (7, 7, 7, "pass", "p = 1)"),
        (24, 24, 24, "pass", "p = 1)"),
        (24, 24, 20, "warn", "p = 0.12): too few to tell; some 45 such rows would show a loss as large"),
        (24, 24, 18, "fail", "p = 0.031)"),
    ],
)
def test_few_prompts_do_not_say_that_nothing_was_forgotten(rows, before, after, verdict, words):
    expected = [f"It is product {number}." for number in range(rows)]
    kept = [make_row(number, text, Path(f"{number}.png")) for number, text in enumerate(expected)]
    answers = [said([*expected[:right], *["no"] * (rows - right)]) for right in (before, after)]
    found = check_forgetting(scoring_for(expected), kept, *answers)
    assert (found.verdict, found.line.endswith(words)) == (verdict, True), found.line
    beside = cautions({"checks": {"forgetting": found.to_dict()}, **NO_CONTROL})
    told = {"fail": "Forgotten"}.get(verdict, "Perhaps forgotten" if "such rows" in words else None)
    assert [one[0] for one in beside] == [told] * (told is not None)
    photos = [make_row(number, text, Path(f"{number // 5}.png")) for number, text in enumerate(expected)]
    of_photos = check_forgetting(scoring_for(expected), photos, *answers)
    assert of_photos.verdict == "skipped" and " too few, 6 at least can tell" in of_photos.line


@pytest.mark.parametrize(
    ("expected", "answers", "name", "share"),
    [  # of 4 answers 3 are needed: 1 is 4.6 % to 69.9 %, 2 are 15 % to 85 %, 3 are 30.1 % to 95.4 %
        ("It is red.", ["It is red.", "It is blue.", "red", "It is"], "formless", 0.5),
        ('{"a": 1}', ['{"a": 2}', "{}", "a: 1", '```{"a": 1}```'], "formless", 0.5),
        ("470", ["12", "about 12", "1,200", "none"], "formless", 0.5),
        ("470", ["470.", "about 12", "$1,200.", "none"], "formless", 0.5),
        ("B", ["A", "(B)", "The answer is C.", "I do not know"], "formless", 0.25),
        ("It is red.", ["It is red.", "", " ", "It is blue."], "empty", 0.5),
        ("It is red.", ["It is red.", "It is красный.", "It is 红.", "It is 12."], "other_script", 0.5),
        ("It is red.", ["It is red.<|end|>", "It is <unk>.", "It is <0xE3>.", "It is a < b."], "control", 0.75),
    ],
)
def test_form_of_answers(expected, answers, name, share):
    found = check_form(scoring_for([expected] * 4), [expected] * 4, ["What?"] * 4, said(answers), said([expected] * 4))
    assert found.figures["tuned"][name]["value"] == share and found.figures["base"][name]["value"] == 0.0
    assert found.verdict == ("fail" if share == 0.75 else "warn") and "of 4 answers" in found.line
    ends = {0.25: "25.0 % (4.6 % to 69.9 %)", 0.5: "50.0 % (15.0 % to 85.0 %)", 0.75: "75.0 % (30.1 % to 95.4 %)"}
    assert ends[share] in found.line and "(beside it 0 % (0 % to 49.0 %))" in found.line
    assert "8 times as long as expected (beside it 1 times)" in found.line or expected != "B"


def test_form_of_length_and_end():
    expected = ["It is red."] * 50
    scoring = scoring_for(expected)
    fine = check_form(scoring, expected, expected, said(expected))
    assert fine.verdict == "pass" and "100 % (92.9 % to 100 %) in the form that is expected" in fine.line
    cut = check_form(scoring, expected, expected, said(expected, ended=[False] * 2 + [True] * 48))
    assert cut.verdict == "warn" and "4.0 % (1.1 % to 13.5 %) are cut off at evaluation.max_new_tokens" in cut.line
    late = said(expected, ended=[False] * 16 + [True] * 34)
    assert check_form(scoring, expected, expected, late).verdict == "fail"
    together = check_form(scoring, expected, expected, late, groups=np.arange(50) // 5)
    assert together.verdict == "warn", "of 10 photos 3 and a fifth of one are cut off: 8 % to 60 % or so"
    long = check_form(scoring, expected, expected, said(["It is red and of a very long kind indeed."] * 50))
    assert long.verdict == "warn" and "4.1 times as long as expected" in long.line
    unknown = Answers(expected, [1.0] * 50, [1] * 50, ended=[None] * 50)
    assert check_form(scoring, expected, expected, unknown).figures["tuned"]["cut_off"] is None
    assert check_form(scoring, [], [], said([])).verdict == "skipped"


def test_small_things():
    assert few_rows([0, 1, 2, 3, 4, 5], 3) == [0, 3, 5] and few_rows([], 3) == [] and few_rows([7], 3) == [7]
    third = [place % 3 for place in few_rows(range(300), 100)]  # of three questions about each photo
    assert min(third.count(one) for one in range(3)) > 20
    assert scripts("Schal шарф 12") == {"LATIN", "CYRILLIC"} and scripts("12, ½") == set()
    assert scripts("5 \N{MICRO SIGN}m nº \N{FULLWIDTH LATIN CAPITAL LETTER A} 3 k\N{OHM SIGN} lʼeau") == {"LATIN"}
    assert scripts("5 \N{GREEK SMALL LETTER MU}m") == {"LATIN"} and scripts("μήλο") == {"GREEK"}
