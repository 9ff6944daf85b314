"""One turn of a conversation as people spell it: who speaks, its texts and the places of its images.

In come turns as files hold them, {role, content} or {from, value}, content text or parts; out come plain values, or
`UnusableRecord` with the reason `conversation_type`, `turn_role`, `value_type` or `answer_weight`. What turns make
together is the business of `conversations`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from phi3v.data.schema import Role, UnusableRecord
from phi3v.data.templates import kind_of, whole_text

IMAGE_TAG = "<image>"

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}

_TOOLS = ("tool", "function", "function_call", "observation", "ipython")
"""Speakers of turns that hold calls of tools and their results."""


def spoken_turn(turn: Any, *, tagged: bool) -> tuple[Role, list[str | None]]:
    """Who speaks, and texts and image places (None) in their order; with `tagged` a user's `<image>` is a place.

    Example: {"from": "human", "value": "<image>\\nWhat?"} -> ("user", [None, "What?"]).
    """
    if not isinstance(turn, Mapping):
        raise UnusableRecord("conversation_type", f"a turn is {kind_of(turn)} and no mapping")
    spelled = turn.get("from") if turn.get("role") is None else turn["role"]
    role = _ROLES.get(spelled.strip().lower()) if isinstance(spelled, str) else None
    if role is None:
        raise UnusableRecord("turn_role", _told_of_speaker(spelled))
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, str):
        _check_text(content)
        return role, _at_tags(content) if tagged and role == "user" else [content]
    if content is None:
        return role, []
    if not isinstance(content, list):
        raise UnusableRecord("conversation_type", f"a turn holds {kind_of(content)}, no text and no parts")
    return role, [_part(part) for part in content]


def is_trained(turn: Mapping[str, Any]) -> bool:
    """Whether an answer may be trained: {"role": "assistant", "weight": 0, ...}, as OpenAI has it, may not."""
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise UnusableRecord("answer_weight", f"an answer has the weight {str(weight)[:40]!r}, and not 0 or 1")
    return weight != 0


def part_cells(turn: Any) -> Iterator[Any]:
    """The image cells in a turn's parts: {"type": "image", "image": "a.jpg"} -> "a.jpg"; chat APIs' image_url too."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    for part in content if isinstance(content, list) else []:
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            cells = [part.get(name) for name in ("image", "path", "url", "image_url")]
            cell = next((cell for cell in cells if not is_empty(cell)), None)
            yield cell["url"] if isinstance(cell, Mapping) and "url" in cell else cell


def is_empty(value: Any) -> bool:
    """Whether an image cell holds nothing: None, "", [] and {"bytes": None, "path": None}."""
    return value is None or value in ("", []) or (isinstance(value, Mapping) and not any(value.values()))


def _told_of_speaker(spelled: Any) -> str:
    """Why nobody is known by this name: "tool" -> "a turn is spoken by 'tool': ...", None -> "a turn names ..."."""
    if spelled is None:
        return "a turn names no speaker: it has neither role nor from"
    told = f"a turn is spoken by {str(spelled)[:40]!r}"
    if isinstance(spelled, str) and spelled.strip().lower() in _TOOLS:
        return f"{told}: Phi-3-Vision knows no calls of tools and no turn for their results"
    return f"{told}, and not by {', '.join(_ROLES)}"


def _part(part: Any) -> str | None:
    """A content part: its text, or None for an image.

    Example: {"type": "text", "text": "What?"} -> "What?"; {"type": "image"} -> None.
    """
    if isinstance(part, str):
        return _check_text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _check_text(part["text"])
    if kind in ("image", "image_url"):
        return None
    raise UnusableRecord("conversation_type", "a content part is neither {type: text, text: ...} nor {type: image}")


def _check_text(text: str) -> str:
    """The text itself. Raises: UnusableRecord for text that no tokenizer reads."""
    try:
        return whole_text(text)
    except TypeError as error:
        raise UnusableRecord("value_type", f"a turn {error}") from error


def _at_tags(text: str) -> list[str | None]:
    """A text cut at its `<image>` tags, each with the line break that sets it off.

    Example: "<image>\\nWhat?" -> [None, "What?"]; "This <image> or\\n<image>" -> ["This ", None, " or", None].
    """
    pieces: list[str | None] = []
    texts = text.split(IMAGE_TAG)
    for number, piece in enumerate(texts):
        if number:
            pieces.append(None)
            piece = piece.removeprefix("\n")
        if number == len(texts) - 2 and texts[-1] == "":
            piece = piece.removesuffix("\n")  # the template sets a picture off itself
        if piece:
            pieces.append(piece)
    return pieces
