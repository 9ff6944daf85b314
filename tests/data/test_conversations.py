"""Records that hold conversations: every spelling becomes the same row, what is wrong is a problem with a code."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from phi3v.data.columns import RowOptions
from phi3v.data.schema import ImagePart, ImageRef, Message, RowProblem, TextPart
from phi3v.data.sources import load_data, load_rows, stream_data
from phi3v.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three photos."""
    for name in "abc":
        Image.new("RGB", (8, 6), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def jsonl(folder: Path, records: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def user(*parts: Any) -> Message:
    """A question: numbers are places of images, texts are texts."""
    return Message("user", tuple(ImagePart(part) if isinstance(part, int) else TextPart(part) for part in parts))


def answer(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


def parts(*kinds: Any) -> list[dict[str, Any]]:
    return [{"type": "image"} if kind is None else {"type": "text", "text": kind} for kind in kinds]


ASKED = {"role": "user", "content": "What is it?"}
SAID = {"role": "assistant", "content": "A scarf."}
SAID_IN_PARTS = {"role": "assistant", "content": parts("A scarf.")}
ONE = (user(0, "What is it?"), answer("A scarf."))
TWO_TURNS = (user(0, "What is it?"), answer("A scarf."), user("And ", 1, "?"), answer("A hat."))

GOOD: dict[str, tuple[dict[str, Any], tuple[Message, ...], int]] = {
    "messages, images lead": ({"messages": [ASKED, SAID], "images": ["a.png"]}, ONE, 1),
    "messages, one image": ({"messages": [ASKED, SAID], "image": "a.png"}, ONE, 1),
    "messages, parts": (
        {"messages": [{"role": "user", "content": parts(None, "What is it?")}, SAID_IN_PARTS], "images": ["a.png"]},
        ONE,
        1,
    ),
    "messages, image behind the text": (
        {"messages": [{"role": "user", "content": parts("What is it?", None)}, SAID], "images": ["a.png"]},
        (user("What is it?", 0), answer("A scarf.")),
        1,
    ),
    "messages, image inside its part": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, *parts("What is it?")]}, SAID]},
        ONE,
        1,
    ),
    "messages, text only": ({"messages": [ASKED, SAID], "images": []}, (user("What is it?"), answer("A scarf.")), 0),
    "messages, no image cell": (
        {"messages": [ASKED, SAID], "images": None},
        (user("What is it?"), answer("A scarf.")),
        0,
    ),
    "messages, a system turn": (
        {"messages": [{"role": "system", "content": "Be short."}, ASKED, SAID], "images": ["a.png"]},
        (Message("system", (TextPart("Be short."),)), *ONE),
        1,
    ),
    "messages, a tag is text": (
        {"messages": [{"role": "user", "content": "Is <image> a tag?"}, SAID], "images": []},
        (user("Is <image> a tag?"), answer("A scarf.")),
        0,
    ),
    "prompt and completion": ({"prompt": "What is it?", "completion": "A scarf.", "images": ["a.png"]}, ONE, 1),
    "prompt and completion as messages": ({"prompt": [ASKED], "completion": [SAID], "images": ["a.png"]}, ONE, 1),
    "llava": (
        {
            "id": 1,
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A scarf."},
            ],
        },
        ONE,
        1,
    ),
    "llava, tag at the end": (
        {
            "image": ["a.png"],
            "conversations": [
                {"from": "human", "value": "What is it?\n<image>"},
                {"from": "gpt", "value": "A scarf."},
            ],
        },
        (user("What is it?", 0), answer("A scarf.")),
        1,
    ),
    "llava, two images in two turns": (
        {
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A scarf."},
                {"from": "human", "value": "And <image>?"},
                {"from": "gpt", "value": "A hat."},
            ],
        },
        TWO_TURNS,
        2,
    ),
    "sharegpt, other spellings": (
        {
            "images": ["a.png"],
            "conversations": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "model", "content": "A scarf."},
            ],
        },
        ONE,
        1,
    ),
    "llava, text only": (
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "An <image>."}]},
        (user("What is it?"), answer("An <image>.")),
        0,
    ),
    "llava, an empty system turn": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A scarf."},
            ],
        },
        ONE,
        1,
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_spelling_becomes_the_same_row(name: str, folder: Path) -> None:
    record, messages, images = GOOD[name]
    source = jsonl(folder, [record])
    rows, problems = load_rows(source, options=RowOptions())
    assert problems == []
    assert rows[0].messages == messages
    assert rows[0].images == tuple(ImageRef(f"{name}.png", root=str(folder), confined=True) for name in "abc"[:images])
    assert (rows[0].source, rows[0].index, rows[0].fields) == (source, 0, {})


@pytest.mark.parametrize("name", ["messages, parts", "prompt and completion as messages", "llava", "llava, text only"])
def test_parquet_and_a_json_list_hold_the_same(name: str, folder: Path) -> None:
    record, messages, _ = GOOD[name]
    datasets.Dataset.from_list([record]).to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps([record], indent=1))
    for file in ("rows.parquet", "rows.json"):
        assert load_rows(str(folder / file), options=RowOptions())[0][0].messages == messages


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], "image": "a.png"}


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "two questions": ("turn_order", turns(("human", "<image>a"), ("human", "b"))),
    "no answer": ("turn_order", turns(("human", "<image>a"))),
    "ends with a question": ("turn_order", turns(("human", "<image>a"), ("gpt", "b"), ("human", "c"))),
    "begins with an answer": ("turn_order", turns(("gpt", "b"), ("human", "<image>a"), ("gpt", "b"))),
    "system later": ("turn_order", turns(("human", "<image>a"), ("system", "b"), ("gpt", "c"))),
    "another speaker": ("turn_role", turns(("human", "<image>a"), ("observation", "b"))),
    "no speaker": ("turn_role", turns(("human", "<image>a"), ("gpt", "b")) | {"conversations": [{"value": "a"}]}),
    "too many tags": ("image_tags", turns(("human", "<image><image>a"), ("gpt", "b"))),
    "too few tags": ("image_tags", turns(("human", "<image>a"), ("gpt", "b")) | {"image": ["a.png", "b.png"]}),
    "tags without an image": ("image_tags", turns(("human", "<image>a"), ("gpt", "b")) | {"image": None}),
    "an empty answer": ("empty_answer", turns(("human", "<image>a"), ("gpt", " \n"))),
    "a null answer": ("empty_answer", turns(("human", "<image>a"), ("gpt", None))),
    "an empty question": ("empty_question", turns(("human", "<image>a"), ("gpt", "b"), ("human", ""), ("gpt", "c"))),
    "nothing said": ("missing_value", {"conversations": [], "image": "a.png"}),
    "null": ("missing_value", {"conversations": None, "image": "a.png"}),
    "a text": ("conversation_type", {"conversations": "hello", "image": "a.png"}),
    "a number": ("conversation_type", {"conversations": 5, "image": "a.png"}),
    "turns that are texts": ("conversation_type", {"conversations": ["a", "b"], "image": "a.png"}),
    "a turn of a number": ("conversation_type", turns(("human", 7), ("gpt", "b"))),
    "half a character": ("value_type", turns(("human", "<image>a"), ("gpt", "b\ud83d"))),
    "half a character in a part": ("value_type", turns(("human", parts(None, "\udc00")), ("gpt", "b"))),
    "an unknown part": ("conversation_type", turns(("human", [{"type": "audio"}]), ("gpt", "b"))),
    "an image in an answer": ("image_tags", turns(("human", "a"), ("gpt", parts(None, "b")))),
    "a file that is not there": ("image_path", turns(("human", "<image>a"), ("gpt", "b")) | {"image": "gone.png"}),
    "a file outside": ("image_path", turns(("human", "<image>a"), ("gpt", "b")) | {"image": "../out.png"}),
    "an absolute path": ("image_path", turns(("human", "<image>a"), ("gpt", "b")) | {"image": "/etc/hostname"}),
    "a last answer that is not trained": ("answer_weight", {"conversations": [ASKED, SAID | {"weight": 0}]}),
    "another weight": ("answer_weight", {"conversations": [ASKED, SAID | {"weight": 0.5}]}),
    "a film": ("other_media", turns(("human", "<video>\na"), ("gpt", "b")) | {"video": "a.mp4"}),
    "a sound without its tag": ("other_media", {"conversations": [ASKED, SAID], "audios": ["a.wav"]}),
    "a number as image": ("image_type", turns(("human", "<image>a"), ("gpt", "b")) | {"image": 5}),
}


def test_what_is_wrong_is_a_problem_with_its_code(folder: Path) -> None:
    Image.new("RGB", (8, 6)).save(folder / "out.png")
    (folder / "set").mkdir()
    (folder / "a.png").rename(folder / "set" / "a.png")
    (folder / "b.png").rename(folder / "set" / "b.png")
    fine = turns(("human", "<image>a"), ("gpt", "b"))
    source = jsonl(folder / "set", [fine, *(record for _, record in BAD.values()), fine])
    with pytest.raises(DataError, match=f"{len(BAD)} of {len(BAD) + 2} rows cannot be used") as caught:
        load_rows(source, options=RowOptions())
    assert "\n" not in str(caught.value)
    data = load_data(source, options=RowOptions(), validation_split=None, reading=everything())
    assert {problem.row: problem.reason_code for problem in data.problems} == {
        number: code for number, (code, _) in enumerate(BAD.values(), start=1)
    }
    assert [row.index for row in data.train] == [0, len(BAD) + 1]
    assert data.rows_in == len(data.train) + len(data.problems)


def everything() -> Any:
    from phi3v.data.sources import Reading

    return Reading(max_skipped=1.0)


def test_the_columns_decide_and_the_recipe_wins(folder: Path) -> None:
    both = {"messages": [ASKED, SAID], "prompt": "p", "answer": "a", "image": "a.png"}
    source = jsonl(folder, [both])
    with pytest.raises(DataError, match=r"several formats: say data.format: messages or columns$"):
        load_rows(source, options=RowOptions())
    assert load_rows(source, options=RowOptions(format="columns"))[0][0].answer == "a"
    assert load_rows(source, options=RowOptions(format="messages"))[0][0].answer == "A scarf."
    assert load_rows(source, options=RowOptions(prompt="What is it?", answer="{answer}"))[0][0].answer == "a"
    with pytest.raises(
        DataError, match=r"conversations needs the column 'conversations', .* its columns are text, messages_"
    ):
        load_rows(
            jsonl(folder, [{"text": "a"} | {"messages_": 1}], "c.jsonl"), options=RowOptions(format="conversations")
        )
    with pytest.raises(DataError, match="messages reads whole conversations: take data.prompt and data.answer out"):
        load_rows(source, options=RowOptions(format="messages", answer="{shop}"))
    with pytest.raises(DataError, match="data.images names the column 'photo'"):
        load_rows(source, options=RowOptions(format="messages", images="photo"))


def test_a_tag_that_may_be_text_is_not_guessed(folder: Path) -> None:
    tagged = {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, SAID], "images": ["a.png"]}
    source = jsonl(folder, [tagged])
    with pytest.raises(DataError, match=r"its text holds <image> as often .* data.format: conversations .* messages"):
        load_rows(source, options=RowOptions())
    assert load_rows(source, options=RowOptions(format="conversations"))[0][0].messages == ONE
    literal = load_rows(source, options=RowOptions(format="messages"))[0][0]
    assert literal.messages == (user(0, "<image>\nWhat is it?"), answer("A scarf."))


def test_one_question_about_the_tag_is_one_problem_of_the_set_and_of_a_stream(folder: Path) -> None:
    asked = [ASKED] * 7 + [{"role": "user", "content": "What does the HTML tag <image> do?"}] + [ASKED] * 32
    source = jsonl(folder, [{"messages": [question, SAID], "images": ["a.png"]} for question in asked])
    data = load_data(source, options=RowOptions(), validation_split=None)
    assert [(problem.row, problem.reason_code) for problem in data.problems] == [(7, "unclear_tags")]
    told: list[RowProblem] = []
    rows = stream_data(source, options=RowOptions()).train.rows(told.append, shuffled=False)
    numbers = [next(rows).index for _ in range(39)]
    assert numbers == [row.index for row in data.train] == [*range(7), *range(8, 40)]
    assert told == list(data.problems)


def test_an_empty_image_column_does_not_hide_the_filled_one(folder: Path) -> None:
    columns: list[dict[str, Any]] = [
        {"image": None, "images": ["a.png"]},
        {"image": "b.png", "images": []},
        {"image": "", "images": "c.png"},
        {"image": None, "images": None},
        {"image": None, "images": 5},
    ]
    records = [{"messages": [ASKED, SAID]} | images for images in columns]
    data = load_data(jsonl(folder, records), options=RowOptions(), validation_split=None, reading=everything())
    assert [[image.path for image in row.images] for row in data.train] == [["a.png"], ["b.png"], ["c.png"], []]
    assert [(one.row, one.message.split(" is ")[0].split(" holds ")[0]) for one in data.problems] == [
        (4, "column 'images'")
    ]
    named = load_rows(jsonl(folder, records[:2]), options=RowOptions(images="images"))[0]
    assert [len(row.images) for row in named] == [1, 0]  # the column that the recipe names is the only one
    datasets.Dataset.from_list(records[:1]).to_parquet(folder / "rows.parquet")
    assert len(load_rows(str(folder / "rows.parquet"), options=RowOptions())[0][0].images) == 1


def pictured(*names: str | None) -> list[dict[str, Any]]:
    """A question with image parts, some of which name their image, and its answer."""
    shown = [{"type": "image"} | ({"image": name} if name is not None else {}) for name in names]
    return [{"role": "user", "content": [*shown, *parts("What is it?")]}, SAID]


def test_an_image_that_a_part_names_is_the_one_that_is_shown(folder: Path) -> None:
    records: list[dict[str, Any]] = [
        {"messages": pictured("b.png", None), "images": ["a.png"]},  # the column fills the other part
        {"messages": pictured(None, "b.png"), "images": ["a.png", "b.png"]},  # the column lists all
        {"messages": pictured("b.png"), "images": ["a.png"]},
        {"messages": pictured("b.png", "c.png"), "images": ["c.png", "b.png"]},
        {"messages": pictured("b.png", None), "images": ["a.png", "b.png"]},
        {"messages": pictured("./b.png"), "images": ["b.png"]},  # one image, spelled in two ways
        {"messages": [{"role": "user", "content": [{"type": "image", "image": ["b.png"]}]}, SAID], "images": ["b.png"]},
    ]
    source = jsonl(folder, records)
    data = load_data(source, options=RowOptions(), validation_split=None, reading=everything())
    found = [[image.path for image in row.images] for row in data.train]
    assert found == [["b.png", "a.png"], ["a.png", "b.png"], ["b.png"]]
    listed = data.problems[-1]
    assert (listed.row, listed.message) == (6, "an image part holds a list, which is no path and no image")
    line = "its content parts name other images than the column 'images' holds"
    assert [(one.row, one.reason_code, one.message) for one in data.problems[:-1]] == [
        (number, "image_tags", line) for number in (2, 3, 4)
    ]
    texts = jsonl(folder, [{"messages": pictured("b.png")}, {"messages": [ASKED, SAID]}], "texts.jsonl")
    data = load_data(texts, options=RowOptions(images=None), validation_split=None, reading=everything())
    assert [(row.index, row.images) for row in data.train] == [(1, ())]
    assert [(one.row, one.reason_code) for one in data.problems] == [(0, "image_tags")]


def test_answers_of_weight_0_are_known_and_a_film_beside_an_image_is_passed_over(folder: Path) -> None:
    turn = [ASKED, SAID | {"weight": 0}, ASKED, SAID | {"weight": 1}]
    source = jsonl(folder, [{"messages": turn, "image": "a.png", "video": "a.mp4", "audio": None}])
    row = load_rows(source, options=RowOptions())[0][0]
    assert row.messages == (ONE[0], replace(ONE[1], trained=False), user("What is it?"), ONE[1])


def test_a_system_template_speaks_where_the_record_does_not(folder: Path) -> None:
    own = {"messages": [{"role": "system", "content": "Mine."}, ASKED, SAID], "shop": "Tom's"}
    source = jsonl(folder, [{"messages": [ASKED, SAID], "shop": "Tom's"}, own])
    rows, _ = load_rows(source, options=RowOptions(system="You sell for {shop}."))
    assert [row.messages[0].text for row in rows] == ["You sell for Tom's.", "Mine."]


def test_columns_of_mixed_types_are_read_in_conversations(folder: Path) -> None:
    """LLaVA's own mixture: ids are numbers and texts, images are texts, lists and missing."""
    spoken = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    tagged = [{"from": "human", "value": "<image><image>Hi"}, {"from": "gpt", "value": "Hello"}]
    records = [
        {"id": 1, "conversations": spoken},
        {"id": "2", "image": ["a.png", "b.png"], "conversations": tagged},
        {"id": 3.5, "image": "c.png", "conversations": spoken},
    ]
    (folder / "mix.json").write_text(json.dumps(records, ensure_ascii=False))
    rows, problems = load_rows(str(folder / "mix.json"), options=RowOptions())
    assert ([len(row.images) for row in rows], problems) == ([0, 2, 1], [])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '[{"conversations": []}, {"conversations"', "line 1 is not JSON"),
        ("a.json", '[{"conversations": []},\n {"conversations": [}]', "line 2 is not JSON"),
        ("a.json", '[{"conversations": []}, 5]', "record 1 is a number: write a list of objects"),
        ("a.json", '[{"conversations": []}', "is not JSON"),
        ("a.jsonl", '{"conversations": []}\n\n{"conv', "line 3 is not JSON"),
        ("a.jsonl", '{"conversations": []}\n[1]\n', "line 2 holds a list: write one JSON object a line"),
        ("a.json", '{\n"data": [{"conversations": []}]\n}', "it holds a mapping: write a list of objects"),
    ],
)
def test_broken_files_are_one_line_with_its_number(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name} cannot be read: .*{reason}") as caught:
        load_rows(str(tmp_path / name), options=RowOptions(format="conversations"))
    assert "\n" not in str(caught.value)


def test_records_are_found_in_files_with_other_characters(folder: Path) -> None:
    texts = ["Grüße 🎉", "“ä”\u2028", "a\\n"]
    records = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text + "!"}]} for text in texts
    ]
    (folder / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records, ensure_ascii=False, indent=2).encode())
    (folder / "c.json").write_bytes(b" \n" * 4096 + (folder / "a.json").read_bytes()[3:] + b"\r\n\t ")
    (folder / "b.jsonl").write_bytes("\r\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode())
    for file in ("a.json", "b.jsonl", "c.json"):
        rows, _ = load_rows(str(folder / file), options=RowOptions())
        assert [row.answer for row in rows] == [text + "!" for text in texts]
