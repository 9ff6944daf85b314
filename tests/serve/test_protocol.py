"""What a request may be: malformed JSON of every kind, fields out of their range; and how answers end at stop texts."""

import json

import pytest

from phi3v.serve.faults import IMAGE_PART, LIST, NOT_SERVED, TEXT_PART, WANTED
from phi3v.serve.lanes import StoppedText, sampler
from phi3v.serve.protocol import (
    ChatMessage,
    ChatRequest,
    ImageAddress,
    ImageUrlPart,
    Refusal,
    StreamOptions,
    TextPart,
    parse_request,
)

HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def parts(*content: dict) -> dict:
    """The one message that has these parts."""
    return {"messages": [{"role": "user", "content": [*content]}]}


def parse(body: bytes | dict) -> ChatRequest:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request(content, most_images=16, most_messages=100)


def refusal(body: bytes | dict) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(body)
    error = caught.value
    assert error.status == 400 and error.body["error"]["message"] == str(error) and len(str(error)) < 400
    for inner in ("\n", "pydantic", "constrained", "Input should", "validation", "[str", "<list>", "<text"):
        assert inner not in str(error)
    return error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no valid JSON at character 0"),
        (b"{", "no valid JSON"),
        (b"null", "the body: must be a JSON object"),
        (b"[]", "the body"),
        (b'"text"', "the body"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"model": "\x00"}', "no valid JSON"),
        (b'{"a": NaN}', "no valid JSON: NaN is no number there"),
        (b'{"temperature": Infinity}', "no valid JSON"),
        (b'{"temperature": -Infinity}', "no valid JSON"),
        (b'{"model": "a", "model": "b"}', "names the key 'model' twice"),
        (b'{"\\ud800": 1, "model": "a"}', "half a character"),
        (json.dumps({**HI, "model": "\ud83d"}).encode(), "half a character"),
        (json.dumps({**HI, "stop": ["a\udc00"]}).encode(), "half a character"),
        (b"[" * 10_000 + b"]" * 10_000, "the body"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "the body"),
        (b"[" * 200_000, "the body"),
        (b'{"n": ' + b"1" * 5000 + b"}", "a number in the body has more digits than any value here takes"),
        (b'{"messages": [' + b"0, " * 20_000 + b"0]}", "the body holds more than 20,000 values"),
        (b'{"messages": [' + b"0, " * 9_000 + b"0]}", "model: missing; it must be a text of at most 256 characters"),
        (b"{} {}", "no valid JSON at character 3"),
        (b"\xef\xbb\xbf{}", "no valid JSON"),
    ],
)
def test_malformed_json_is_one_line(body: bytes, says: str) -> None:
    assert says in str(refusal(body))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages: must be a list of one message or more"),
        ({"messages": "Hi"}, "messages: must be a list"),
        ({"messages": [3]}, "messages.0: must be an object with role and content"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0.role: must be system, developer, user or"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: missing; it must be a text of"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: must be a text of at most 20000000"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: must be a text of"),
        ({"messages": [{"role": "user", "content": []}]}, "or a list of one part or more"),
        (parts({"type": "input_audio"}), "messages.0.content.0: must be an object of the type text or image_url"),
        (parts(IMAGE, {"type": ["text"]}), "messages.0.content.1: must be an object of the type text or image_url"),
        (parts({"type": "text", "text": None}), "messages.0.content.0.text: must be a text"),
        (parts({"type": "image_url", "image_url": "x"}), "messages.0.content.0.image_url: must be an object with url"),
        (parts({**IMAGE, "x": 1}), "messages.0.content.0.x: there is no such field here; leave it out"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "the last one must not be the assistant's"),
        ({"messages": [{"role": "system", "content": [IMAGE]}, *HI["messages"]]}, "images belong to the user's turns"),
        ({"messages": [{"role": "user", "content": [IMAGE] * 17}]}, "17 images are more than 16"),
        ({"messages": HI["messages"] * 101}, "101 are more than 100"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "exclude each other"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["a"] * 5}, "stop: must be a text of 1 to 128 characters, or a list of at most 4 of them"),
        ({"stop": ""}, "stop: must be a text of 1 to 128 characters"),
        ({"stop": ["a", ""]}, "stop: must be a text of 1 to 128 characters"),
        ({"seed": 2**63}, "seed"),
        ({"n": 2}, "n: not served here; leave it out, or send 1"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "function"}]}, "tools: not served here; leave it out, or send []"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"chat_template": "{{ x }}"}, "chat_template: there is no such field here; leave it out"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
        ({"generation_config": "{}"}, "generation_config"),
        ({"model": None}, "model: must be a text of at most 256"),
        ({"metadata": {"a": "b" * 1025}}, "metadata: must be an object of texts of at most 1024"),
        ({"x\n\x1b[31m" + "y" * 500: 1}, "x??[31my"),
    ],
)
def test_a_field_out_of_its_range_is_named(change: dict, says: str) -> None:
    assert says in str(refusal({**HI, **change}))


def test_each_field_has_words_for_what_is_right_in_it() -> None:
    """A field that OpenAI has and this server does not takes the value that asks for nothing, which its words name."""
    part = f"messages.#.content.{LIST}.#."
    inner = {"messages.#.": ChatMessage, "stream_options.": StreamOptions}
    inner |= {f"{part}{TEXT_PART}.": TextPart, f"{part}{IMAGE_PART}.": ImageUrlPart}
    inner |= {"": ChatRequest, f"{part}{IMAGE_PART}.image_url.": ImageAddress}
    fields = {start + name for start, model in inner.items() for name in model.model_fields}
    assert fields == {*NOT_SERVED, *WANTED} - {"", "messages.#", part.rstrip(".")} and not {*NOT_SERVED} & {*WANTED}
    for name in ChatRequest.model_fields.keys() & NOT_SERVED:
        for word in NOT_SERVED[name].split(" or "):
            parse({**HI, name: word if word.isalpha() and word not in ("null", "false") else json.loads(word)})
        line = str(refusal({**HI, name: {"x": ["y"]}}))
        assert line == f"{name}: not served here; leave it out, or send {NOT_SERVED[name]}"


def test_what_asks_for_nothing_passes() -> None:
    neutral = {"n": 1, "tools": [], "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me"}
    neutral |= {
        "response_format": {"type": "text"},
        "stop": None,
        "logit_bias": {},
        "store": False,
        "metadata": {"a": "b"},
    }
    neutral |= {"tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "none"}
    neutral |= {"top_logprobs": 0, "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium"}
    neutral |= {"service_tier": "auto", "prompt_cache_key": "x"}
    parse({**HI, **dict.fromkeys([*ChatRequest.model_fields.keys() - {"model", "messages"}])})
    parse({**HI, "messages": [{"role": "system", "content": "Be brief."}]})
    asked = parse({**HI, **neutral, "temperature": 0, "top_p": 1, "seed": -5})
    assert (asked.stops, asked.images, asked.turns) == ([], [], [{"role": "user", "parts": ["Hi"]}])
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "First"}, IMAGE]},
        {"role": "assistant", "content": "Yes", "refusal": None, "annotations": [], "tool_calls": []},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "\U0001f600 <|end|>"}], "name": "x"},
    ]
    asked = parse({**HI, "messages": turns, "stop": "\n"})
    assert asked.stops == ["\n"] and asked.images == ["data:image/png;base64,AAAA"] * 2
    assert asked.turns == [
        {"role": "system", "parts": ["Be brief."]},
        {"role": "user", "parts": ["First", 0]},
        {"role": "assistant", "parts": ["Yes"]},
        {"role": "user", "parts": [1, "\U0001f600 <|end|>"]},
    ]
    paired = json.dumps({**HI, "user": "\U0001f600"}).encode()  # an escaped pair of halves is a whole character
    assert b"\\ud83d\\ude00" in paired and parse(paired).user == "\U0001f600"


@pytest.mark.parametrize(
    ("stops", "pieces", "given"),
    [
        ([], ["a ", "b"], ["a ", "b", ""]),
        (["END"], ["a E", "Nd"], ["a ", "ENd", ""]),
        (["END"], ["a E", "N", "D b", "c"], ["a ", "", "", "", ""]),
        (["END", "N"], ["a E", "N b"], ["a ", "E", ""]),
        (["aab"], ["aaa", "b"], ["a", "", ""]),
        (["x"], ["x"], ["", ""]),
        (["END"], ["a EN"], ["a ", "EN"]),
    ],
)
def test_a_text_ends_before_its_stop(stops: list[str], pieces: list[str], given: list[str]) -> None:
    text, found = StoppedText(stops), []
    for piece in pieces:
        text.take(piece)
        found.append(text.give())
    text.finish()
    assert [*found, text.give()] == given


def test_a_seed_picks_the_same_tokens_and_a_temperature_of_none_the_likeliest() -> None:
    import torch

    logits = torch.tensor([0.0, 1.0, 0.5, -torch.inf])
    assert sampler(0, 1.0, 3) is None and sampler(1e-300, 1.0, 3) is None
    choose, again, other = (sampler(1.0, 1.0, seed) for seed in (7, 7, -8))
    first = [choose(logits) for _ in range(50)]
    assert first == [again(logits) for _ in range(50)] != [other(logits) for _ in range(50)]
    assert set(first) == {0, 1, 2}
    narrow = sampler(1.0, 0.4, None)
    assert {narrow(logits) for _ in range(20)} == {1}
