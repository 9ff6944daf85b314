"""OpenAI's chat completions as far as they are served: from a request's bytes to a checked `ChatRequest`, and back.

In come bytes that anybody may have sent; out comes a request in which every value is within its range, or a `Refusal`
with status, code and one line. What is not served (tools, several choices, log probabilities, ...) is refused where a
request asks for it, and let pass where it asks for nothing. Knows no model, no tokens and no network.
"""

import json
import re
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from phi3v.data.json_text import RepeatedKeyError, unrepeated
from phi3v.serve.faults import IMAGE_PART, LIST, TEXT, TEXT_PART, in_words, plain

_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
MOST_VALUES = 20_000
"""Values in a body: a thousand turns with an image each have some 8,000."""
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
Text = Annotated[str, Field(max_length=20_000_000)]
Short = Annotated[str, Field(max_length=256)]


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        retry_after: seconds after which another try may help; None where none does.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        """Keep what is said."""
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class _Strict(BaseModel):
    """Names that do not exist and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageAddress(_Strict):
    """A data URL, or an https address of a host that the server may ask; `detail` has no effect."""

    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlPart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageAddress


class TextPart(_Strict):
    """A text."""

    type: Literal["text"]
    text: Text


def _kind_of_part(value: Any) -> str | None:
    """Of a part that somebody sent the form that it is checked against; None for what is of no form."""
    kind = value.get("type") if isinstance(value, dict) else None
    return {"text": TEXT_PART, "image_url": IMAGE_PART}.get(kind) if isinstance(kind, str) else None


def _text_or_list(value: Any) -> str:
    """Whether a list is checked, or a text: a fault is one of the form that was sent."""
    return LIST if isinstance(value, list) else TEXT


Part = Annotated[
    Annotated[TextPart, Tag(TEXT_PART)] | Annotated[ImageUrlPart, Tag(IMAGE_PART)], Discriminator(_kind_of_part)
]
Parts = Annotated[list[Part], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=128)]
Stops = Annotated[list[Stop], Field(max_length=4)]


class ChatMessage(_Strict):
    """One turn; images stand in the user's turns only, and `developer` is another name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[Text, Tag(TEXT)] | Annotated[Parts, Tag(LIST)], Discriminator(_text_or_list)]
    name: Short | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PlainText(_Strict):
    """The one form of answers."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """The body of a request for a chat completion; greedy unless `temperature` or `top_p` say otherwise."""

    model: Short
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[Annotated[Stop, Tag(TEXT)] | Annotated[Stops, Tag(LIST)], Discriminator(_text_or_list)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    user: Short | None = None
    safety_identifier: Short | None = None
    metadata: dict[Short, Annotated[str, Field(max_length=1024)]] | None = None
    store: Literal[False] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: PlainText | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Short | None = None
    prompt_cache_retention: Short | None = None
    prompt_cache_options: None = None
    moderation: None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer: "a" -> ["a"], None -> []."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def images(self) -> list[str]:
        """The addresses of all images, in their order."""
        parts = [part for turn in self.messages if not isinstance(turn.content, str) for part in turn.content]
        return [part.image_url.url for part in parts if isinstance(part, ImageUrlPart)]

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The turns for the worker: a part is a text, or the number of an image.

        Example: a question of the user about one photo -> [{"role": "user", "parts": [0, "What is it?"]}].
        """
        found, images = [], 0
        for turn in self.messages:
            parts: list[str | int] = []
            for part in [turn.content] if isinstance(turn.content, str) else turn.content:
                if isinstance(part, ImageUrlPart):
                    parts.append(images)
                    images += 1
                else:
                    parts.append(part if isinstance(part, str) else part.text)
            found.append({"role": "system" if turn.role == "developer" else turn.role, "parts": parts})
        return found


def parse_request(body: bytes, *, most_images: int, most_messages: int) -> ChatRequest:
    """The request that a body holds.

    Example: b'{"model": "shop", "messages": [{"role": "user", "content": "Hi"}]}'.
    Raises: Refusal with status 400.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=unrepeated)
    except RepeatedKeyError as error:
        raise _bad("invalid_json", f"the body is no valid JSON: {plain(str(error))}") from error
    except RecursionError as error:
        raise _bad("invalid_json", "the body is nested too deep") from error
    except UnicodeDecodeError as error:
        raise _bad("invalid_json", f"the body is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise _bad("invalid_json", f"the body is no valid JSON at character {error.pos}") from error
    except ValueError as error:  # Python's limit: digits take time with the square of their count
        raise _bad("invalid_request", "a number in the body has more digits than any value here takes") from error
    if _has_more_than(MOST_VALUES, value):
        raise _bad("invalid_request", f"the body holds more than {MOST_VALUES:,} values")
    if _ESCAPED_HALF.search(body) and _has_half(value):
        raise _bad("invalid_json", "a text holds half a character (a lone surrogate)")
    try:
        asked = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _bad("invalid_request", _first_fault(error)) from error
    except RecursionError as error:
        raise _bad("invalid_json", "the body is nested too deep") from error
    _check(asked, most_images, most_messages)
    return asked


def _has_more_than(most: int, value: Any) -> bool:
    """Whether a JSON value holds more values than so many, itself not counted; looks no further than that.

    A fault of each costs pydantic 500 bytes and the time of a thousand values that are right, whoever reads them.
    Example: 3 and {"a": [1, 2]} -> False; 2 and the same -> True.
    """
    left, waiting = most, [value]
    while waiting:
        one = waiting.pop()
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        left -= len(inner)
        if left < 0:
            return True
        waiting.extend(inner)
    return False


def _check(asked: ChatRequest, most_images: int, most_messages: int) -> None:
    """What holds for a request as a whole. Raises: Refusal."""
    if len(asked.messages) > most_messages:
        raise _bad("invalid_request", f"messages: {len(asked.messages)} are more than {most_messages}")
    if asked.messages[-1].role == "assistant":
        raise _bad("invalid_request", "messages: the last one must not be the assistant's")
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise _bad("invalid_request", "max_tokens and max_completion_tokens exclude each other")
    for number, turn in enumerate(asked.messages):
        with_image = not isinstance(turn.content, str) and any(isinstance(part, ImageUrlPart) for part in turn.content)
        if with_image and turn.role != "user":
            raise _bad("invalid_request", f"messages.{number}: images belong to the user's turns")
    if len(asked.images) > most_images:
        raise _bad("too_many_images", f"{len(asked.images)} images are more than {most_images}")


def _bad(code: str, message: str) -> Refusal:
    return Refusal(400, code, message)


def _no_number(name: str) -> None:
    """NaN, Infinity and -Infinity are no JSON."""
    raise _bad("invalid_json", f"the body is no valid JSON: {name} is no number there")


def _has_half(value: Any) -> bool:
    """Whether a text anywhere in a parsed body holds half a character."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if _HALF_CHARACTER.search(one):
                return True
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return False


def _first_fault(error: ValidationError) -> str:
    """Where the first fault is and what is right there: "temperature: must be a number from 0 to 2"."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return in_words(fault["type"], fault["loc"])


def completion(name: str, model: str, text: str, done: dict[str, Any]) -> dict[str, Any]:
    """A whole answer in OpenAI's form.

    Args:
        name: of the answer.
        model: that answered.
        text: of the answer.
        done: the worker's last word: reason, prompt_tokens, completion_tokens.
    """
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": done["reason"],
    }
    return {**_head(name, model, "chat.completion"), "choices": [choice], "usage": usage(done)}


def chunk(name: str, model: str, delta: dict[str, str] | None, reason: str | None = None) -> dict[str, Any]:
    """A piece of an answer; without a delta and a reason it has no choices, for the usage behind the last one."""
    choice = {"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": reason}
    choices = [choice] if delta is not None or reason is not None else []
    return {**_head(name, model, "chat.completion.chunk"), "choices": choices}


def usage(done: dict[str, Any]) -> dict[str, int]:
    """Tokens of prompt and answer: 700 and 12 -> total_tokens 712. What ends an answer is one of its tokens."""
    prompt, answer = done["prompt_tokens"], done["completion_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _head(name: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}
