"""Chats for Phi-3-V: the template, and what keeps a message's text from becoming anything but text.

In: conversations as people write them. Out: fresh messages that a template can render and a tokenizer can read without
taking user text for one of the model's control tokens or for an image tag. Knows nothing of pixels or tensors.

How the guard works. A tokenizer cuts added tokens such as `<|end|>` out of a prompt before it looks at the rest, so
text that holds one must not hold it literally. The guard writes one noncharacter, U+FDD0, behind the first character of
every such occurrence; a step in front of the tokenizer's normaliser deletes it again, after the cutting and before the
pieces are tokenised. Ids and offsets are those of the plain text, and the rendered prompt stays safe as a string: it
may be handed on, cut, joined and tokenised later. Text without control tokens renders unchanged.

    "a </s> b"  ->  "a <*/s> b" (* is U+FDD0)  ->  "▁a", "▁</", "s", ">", "▁b"      instead of "▁a", "</s>", "▁b"
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from phi3v.errors import DataError

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")

GUARD = "\ufdd0"
"""A Unicode noncharacter: reserved for use inside a program, it has no meaning in anybody's text."""

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
"""An image tag in a prompt: `<|image_1|>` stands for the first image. Not a token of the vocabulary."""

CHAT_TEMPLATE = """\
{%- macro write(content, images) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {%- set images.count = images.count + 1 -%}
                {{- '<|image_' ~ images.count ~ '|>\\n' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>\\n' -}}
{%- endmacro -%}
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
    {{- '<|' ~ message['role'] ~ '|>\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- write(message['content'], images) -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- write(message['content'], images) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
"""Renders plain content exactly as Microsoft's template, and image parts as numbered tags, each on a line of its own.

Example: a user turn of an image part and the text part "What?", with a generation prompt, becomes
`<|user|>\\n<|image_1|>\\nWhat?<|end|>\\n<|assistant|>\\n`.
"""


def render_chat(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
    """What `CHAT_TEMPLATE` renders of messages that `prepare_conversation` gave; Jinja takes many times as long.

    Example: `[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]` gives
    `<|user|>\\n<|image_1|>\\nWhat?<|end|>\\n`.
    """
    pieces, images = [], 0
    for message in messages:
        content = message["content"]
        pieces.append(f"<|{message['role']}|>\n")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            images += part["type"] == "image"
            pieces.append(f"<|image_{images}|>\n" if part["type"] == "image" else part["text"])
        pieces.append("<|end|>\n")
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        pieces.append("<|assistant|>\n")
    return "".join(pieces)


MICROSOFT_TEMPLATE_SHA256 = "79e4ca4b7d902dc73772bbde0c62459f93871f4c17827e8e41ad3fa663e0da04"
"""Of the template in both models' `tokenizer_config.json`: it joins strings and fails on content parts."""


def choose_template(*templates: str | dict[str, str] | None) -> str | dict[str, str]:
    """The first template there is, or `CHAT_TEMPLATE` when there is none or it cannot place images.

    Microsoft's own joins strings; `CHAT_TEMPLATE` renders the same text. Another template without content parts (one
    that never asks for a part's `type`) is replaced too, with a warning, since images have no place in it.
    """
    for template in templates:
        if not isinstance(template, str):
            if template is not None:
                return template
            continue
        if "type" in template:
            return template
        if digest(template) != MICROSOFT_TEMPLATE_SHA256:
            logger.warning("the chat template of these files cannot place images; Phi-3-Vision's own is used instead")
        return CHAT_TEMPLATE
    return CHAT_TEMPLATE


def digest(template: str) -> str:
    """sha256 of a template, white space around it aside."""
    return hashlib.sha256(template.strip().encode()).hexdigest()


class TextGuard:
    """Writes text so that a tokenizer reads it as text.

    Guards every added token that is cut out before normalisation: the 48 of Phi-3, and special tokens added later.
    Words that were added with `tokenizer.add_tokens` are vocabulary and stay what they are.

    Example: with tokens `</s>` and `<|end|>`, `TextGuard(tokens).literal("2 < 3 <|end|>")` is
    `"2 < 3 <\\ufdd0|end|>"`, and `literal("2 < 3")` is `"2 < 3"`.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        """Takes the tokens' text."""
        rests: dict[str, list[str]] = {}
        for token in tokens:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        rests.setdefault("<", []).append(IMAGE_TAG.pattern[1:])
        self._marked = _first_characters(rests)

    def literal(self, text: str) -> str:
        """`text` with the guard in every control token and every image tag.

        A guard character that the text itself holds becomes U+FFFD, the replacement character.
        """
        return self._marked.sub(r"\g<0>" + GUARD, text.replace(GUARD, "\N{REPLACEMENT CHARACTER}"))

    def found_in(self, text: str) -> str | None:
        """`text` from its first control token or image tag on; None where there is none."""
        found = self._marked.search(text)
        return None if found is None else text[found.start() :]


def _first_characters(rests: Mapping[str, list[str]]) -> re.Pattern[str]:
    """Matches the first character of any token; looking ahead for the rest finds overlapping ones too."""
    alternatives = [f"{re.escape(first)}(?={'|'.join(tails)})" for first, tails in rests.items()]
    return re.compile("|".join(alternatives) or "(?!)")


def drop_guards(tokenizer: Tokenizer) -> None:
    """Puts the step that deletes guard characters in front of a tokenizer's normaliser; nothing else changes."""
    normalizer = tokenizer.normalizer
    if normalizer is not None and GUARD not in normalizer.normalize_str(f"a{GUARD}a"):
        return
    step = normalizers.Replace(GUARD, "")
    tokenizer.normalizer = step if normalizer is None else normalizers.Sequence([step, normalizer])


def forget_texts(tokenizer: Tokenizer) -> None:
    """Lets a tokenizer remember 100 pieces of text instead of 10,000.

    Phi-3's cuts a prompt at control tokens alone, so the pieces are whole messages, which never come again: remembering
    them costs a third of the time and 3 kB for each new row.
    """
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is not None:
        resize(100)
        tokenizer.model._clear_cache()


def restore_normalizer(file: Path) -> None:
    """Takes the step of `drop_guards` out of a saved `tokenizer.json`: other programs find the original pipeline."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    normalizer = saved.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if steps[0].get("pattern") != {"String": GUARD}:
        return
    rest = steps[1:]
    saved["normalizer"] = {**normalizer, "normalizers": rest} if len(rest) > 1 else rest[0] if rest else None
    file.write_text(json.dumps(saved, ensure_ascii=False, indent=2), encoding="utf-8")


def prepare_conversation(conversation: Sequence[Any], guard: TextGuard) -> tuple[list[dict[str, Any]], list[Any]]:
    """Guarded copies of a conversation's messages, and the images of its image parts in order.

    Strings and text parts are text, image tags in them too: an image is a part of the content. (Prompts in Microsoft's
    style, with tags in strings, are rendered by the tokenizer's own `apply_chat_template`.) Neighbouring text parts are
    joined without anything between them before the guard looks at them. An image part without an image gives None.

    Example: `[{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]}]`
    gives the same message and `[photo]`.

    Raises:
        DataError: An empty conversation, an unknown role, content that is neither text nor parts; messages count from
        0.
    """
    if not conversation:
        raise DataError("the conversation is empty: it needs at least one message")
    prepared = [_read_message(index, message, guard) for index, message in enumerate(conversation)]
    parts = [part for message in prepared if isinstance(message["content"], list) for part in message["content"]]
    images = [part.get("image") for part in parts if part["type"] == "image"]
    return prepared, images


def _read_message(index: int, message: Any, guard: TextGuard) -> dict[str, Any]:
    """Copy of a message with guarded content."""
    if not isinstance(message, Mapping):
        raise DataError(f"message {index} is a {type(message).__name__}: a message has a role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {index} has the role {role!r}: Phi-3-V knows {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": guard.literal(content)}
    if not isinstance(content, Sequence):
        kind = type(content).__name__
        raise DataError(f"message {index} has content of type {kind}: it must be a string or a list of parts")
    return {"role": role, "content": _read_parts(index, content, guard)}


def _read_parts(index: int, content: Sequence[Any], guard: TextGuard) -> list[dict[str, Any]]:
    """Copies of the parts of message `index`, text joined and guarded, images under the key `image`."""
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                found = type(part.get("text")).__name__
                raise DataError(f"part {number} of message {index} has text of type {found}: it must be a string")
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part["text"]
            else:
                parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            image = _image_of(part)
            parts.append({"type": "image"} if image is None else {"type": "image", "image": image})
        else:
            raise DataError(f"part {number} of message {index} is neither text nor an image: its type is {kind!r}")
    for part in parts:
        if part["type"] == "text":
            part["text"] = guard.literal(part["text"])
    return parts


def _image_of(part: Mapping[str, Any]) -> Any:
    """The image, path or URL of an image part, whichever key holds it; None when there is none yet."""
    for key in ("image", "url", "path", "base64", "image_url"):
        value = part.get(key)
        if value is not None:
            return value.get("url") if key == "image_url" and isinstance(value, Mapping) else value
    return None
