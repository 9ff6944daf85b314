"""What the line about a row that is left out says: which value is at fault, in words for people."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.data.columns import RowOptions
from phi3v.data.reading import Reading
from phi3v.data.schema import Message, TextPart
from phi3v.data.sources import load_data, load_rows

ASKED = {"role": "user", "content": "What is it?"}
SAID = {"role": "assistant", "content": "A scarf."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    return tmp_path


def jsonl(folder: Path, records: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "rows.jsonl")


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], "image": "a.png"}


def test_the_line_says_which_value_is_at_fault(folder: Path) -> None:
    own = [{"type": "image", "image": ["a.png"]}, {"type": "text", "text": "a"}]
    cases: dict[str, dict[str, Any]] = {
        "image 2 of column 'image' is empty": turns(("human", "<image><image>a"), ("gpt", "b"))
        | {"image": ["a.png", None]},
        "an image part holds a list, which is no path and no image": {
            "messages": [{"role": "user", "content": own}, SAID]
        },
        "column 'image' holds a whole number, which is no path and no image": turns(("human", "a")) | {"image": 5},
        "places for images in its turns: 2, images: 1": turns(("human", "<image><image>a"), ("gpt", "b")),
        "column 'conversations' holds a whole number and no list of turns": {"conversations": 5},
        "a turn is text and no mapping": {"conversations": ["a"]},
        "a turn holds a mapping, no text and no parts": {"conversations": [{"from": "human", "value": {"a": 1}}]},
        "a turn names no speaker: it has neither role nor from": {"conversations": [{"value": "a"}, {"value": "b"}]},
        "a turn is spoken by 'tool': Phi-3-Vision knows no calls of tools and no turn for their results": {
            "messages": [ASKED, {"role": "tool", "content": "5"}, SAID]
        },
    }
    for message, record in cases.items():
        shape = "messages" if "messages" in record else "conversations"
        source, options = jsonl(folder, [record]), RowOptions(format=shape)
        data = load_data(source, options=options, validation_split=None, reading=Reading(max_skipped=1.0))
        assert [problem.message for problem in data.problems] == [message]


def test_what_a_path_has_around_it_or_in_front_is_seen(folder: Path) -> None:
    images = ["a.png\n", " a.png", "b.png", "www.a.example/a.png", "//a.example/a.png", "~/a.png"]
    source = jsonl(folder, [{"image": image, "t": "x"} for image in images])
    _, problems = load_rows(source, options=RowOptions(prompt="?", answer="{t}"), reading=Reading(max_skipped=1.0))
    ends = "; the path begins or ends with white space: take it away"
    assert [problem.message for problem in problems[:4]] == [
        f"image a.png\\n does not exist (looked for {folder}/a.png\\n){ends}",
        f"image  a.png does not exist (looked for {folder}/ a.png){ends}",
        f"image b.png does not exist (looked for {folder}/b.png)",
        f"image www.a.example/a.png does not exist (looked for {folder}/www.a.example/a.png); if it is an address, "
        "write https:// in front of it",
    ]
    outside, home = (problem.message for problem in problems[4:])
    assert outside.startswith("image //a.example/a.png lies outside") and outside.endswith(
        "write https: in front of it"
    )
    assert home.endswith("/~/a.png); ~ is taken as it stands: write the whole path")


def test_the_developer_of_chat_apis_is_a_system_turn(folder: Path) -> None:
    source = jsonl(folder, [{"messages": [{"role": "developer", "content": "Be brief."}, ASKED, SAID]}])
    assert load_rows(source, options=RowOptions())[0][0].messages[0] == Message("system", (TextPart("Be brief."),))
