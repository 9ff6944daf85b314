"""What is wrong with a request, in one line of plain words: where, and what is right there, the limit included.

In comes what pydantic found, out comes a line. pydantic's own words name its inner types ("constrained-str") and no
limit, so each field has its words here. Of a field that is a text or a list, `TAGS` say which one a request holds.
"""

from collections.abc import Sequence
from typing import Any

TEXT, LIST, TEXT_PART, IMAGE_PART = "<text>", "<list>", "<text part>", "<image part>"
TAGS = (TEXT, LIST, TEXT_PART, IMAGE_PART)
"""In the place of a fault, what of several forms a value has; none of them is shown."""

_SHORT = "a text of at most 256 characters"
_TOKENS = "a whole number from 1 to 2147483648"
_SWITCH = "true or false"
_URL = 'an object with url: {"url": "data:image/png;base64,..."}'

WANTED = {
    "": "a JSON object with model and messages",
    "model": f"{_SHORT}, one of the names that GET /v1/models tells",
    "messages": "a list of one message or more",
    "messages.#": "an object with role and content",
    "messages.#.role": "system, developer, user or assistant",
    "messages.#.content": "a text of at most 20000000 characters, or a list of one part or more",
    f"messages.#.content.{LIST}.#": "an object of the type text or image_url",
    f"messages.#.content.{LIST}.#.{TEXT_PART}.type": "text or image_url",
    f"messages.#.content.{LIST}.#.{TEXT_PART}.text": "a text of at most 20000000 characters",
    f"messages.#.content.{LIST}.#.{IMAGE_PART}.type": "text or image_url",
    f"messages.#.content.{LIST}.#.{IMAGE_PART}.image_url": _URL,
    f"messages.#.content.{LIST}.#.{IMAGE_PART}.image_url.url": "a text of at most 20000000 characters",
    f"messages.#.content.{LIST}.#.{IMAGE_PART}.image_url.detail": "auto, low or high",
    "messages.#.name": _SHORT,
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0, at most 1",
    "stop": "a text of 1 to 128 characters, or a list of at most 4 of them",
    "seed": "a whole number from -9223372036854775808 to 9223372036854775807",
    "stream": _SWITCH,
    "stream_options": "an object with include_usage",
    "stream_options.include_usage": _SWITCH,
    "stream_options.include_obfuscation": _SWITCH,
    "parallel_tool_calls": _SWITCH,
    "user": _SHORT,
    "safety_identifier": _SHORT,
    "metadata": "an object of texts of at most 1024 characters, their names of at most 256",
    "prompt_cache_key": _SHORT,
    "prompt_cache_retention": _SHORT,
}
"""What is right at a place; "#" stands for a number in a list."""

NOT_SERVED = {
    "n": "1",
    "store": "false",
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "logit_bias": "{}",
    "logprobs": "false",
    "top_logprobs": "0",
    "tools": "[]",
    "tool_choice": "none or auto",
    "functions": "[]",
    "function_call": "none or auto",
    "response_format": '{"type": "text"}',
    "modalities": '["text"]',
    "audio": "null",
    "prediction": "null",
    "web_search_options": "null",
    "reasoning_effort": "none",
    "verbosity": "medium",
    "service_tier": "auto or default",
    "prompt_cache_options": "null",
    "moderation": "null",
    "messages.#.refusal": "null",
    "messages.#.tool_calls": "[]",
    "messages.#.function_call": "null",
    "messages.#.audio": "null",
    "messages.#.annotations": "[]",
}
"""Fields of OpenAI's that may ask for nothing only, and how they do."""


def in_words(kind: str, found_at: Sequence[str | int]) -> str:
    """Where a fault is and what is right there; nothing of the request is in it but names.

    Args:
        kind: pydantic's word for it: "missing", "extra_forbidden", "too_long", ...
        found_at: its place, `TAGS` included.

    Example: "too_long" and ("stop", "<list>") -> "stop: must be a text of 1 to 128 characters, or a list of at most 4
    of them"; "too_long" and ("tools",) -> "tools: not served here; leave it out, or send []".
    """
    place = list(found_at)
    if kind == "extra_forbidden":
        return f"{_shown(place)}: there is no such field here; leave it out"
    while (key := _key(place)) not in WANTED and key not in NOT_SERVED:  # a fault inside of what has words as a whole
        place.pop()
    if key in NOT_SERVED:
        return f"{_shown(place)}: not served here; leave it out, or send {NOT_SERVED[key]}"
    must = "missing; it must be" if kind == "missing" and len(place) == len(found_at) else "must be"
    return f"{_shown(place)}: {must} {WANTED[key]}"


def plain(text: str) -> str:
    """A piece of somebody's text as part of a line: at most 80 printable characters."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:80])


def _key(place: list[Any]) -> str:
    """["messages", 3, "role"] -> "messages.#.role"."""
    return ".".join("#" if isinstance(part, int) else part for part in place)


def _shown(place: list[Any]) -> str:
    """["messages", 0, "content", "<list>", 1] -> "messages.0.content.1"; a last one may be of the request's own."""
    return ".".join(plain(str(part)) for part in place if part not in TAGS or part is place[-1]) or "the body"
