"""Multiple choice: which option an answer names, by its letter or by its text. Strings in, letters and numbers out.

The options are read from the question where it lists them. Only what is plainly a choice counts: the A of `A dog` is an
article, and an answer that names two options names none.
"""

from __future__ import annotations

import re

_LISTED = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_INLINE = re.compile(r"\(([A-Z])\)\s*(\S.*?)\s*(?=[,;]?\s*(?:or\s+)?\([A-Z]\)|$)", re.DOTALL)
_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_FIRST = re.compile(r"\(([A-Z])\)(?!\w)|([A-Z])[).:](?=\s)")
_SAID = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([B-HJ-Z](?![\w'])|[AI](?![\w'])(?!\s+[a-z]))", re.IGNORECASE
)
_BRACKETED = re.compile(r"\(([A-Z])\)")


def listed_options(question: str) -> dict[str, str]:
    """The options that a question lists, on lines of their own or in brackets in one line; {} where it lists none.

    Example: "Which?\\nA. a cat\\nB. a dog" -> {"A": "a cat", "B": "a dog"}; "Is it (A) red or (B) blue?" ->
    {"A": "red", "B": "blue?"}. Letters have to go on from A.
    """
    for pattern in (_LISTED, _INLINE):
        found = pattern.findall(question)
        if len(found) > 1 and "".join(letter for letter, _ in found) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(found)]:
            return dict(found)
    return {}


def named_option(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer names; None where it names none, or several.

    Example: with options A a cat, B a dog: "B", "(b)", "B. a dog", "**B**", "The answer is B.", "It is (B)", "a dog"
    and "I see a dog there" -> "B"; "A dog" -> "B", by its text; "A or B", "a bird" -> None. Without options letters
    alone count.
    """
    text = answer.strip().strip("*_`\"'").strip()
    if match := _ALONE.fullmatch(text) or _FIRST.match(text):
        letters = {next(filter(None, match.groups())).upper(), *_BRACKETED.findall(text)}
    else:
        bare = text.replace("*", "")
        letters = {letter for letter in _SAID.findall(bare) if letter.isupper()} or set(_BRACKETED.findall(bare))
    if options:
        letters &= options.keys()
        letters = letters or _by_text(text, options)
    return letters.pop() if len(letters) == 1 else None


def multiple_choice(expected: str, answer: str, question: str = "") -> float:
    """1.0 where the answer names the expected option, else 0.0.

    Example: expected "B", answer "The answer is (B)." -> 1.0; expected "B", answer "a dog", question "Which? (A) cat
    (B) dog" -> 1.0; expected "B", answer "A" -> 0.0. An expected text that names no option must be the answer, case
    aside.
    """
    options = listed_options(question)
    wanted = named_option(expected, options)
    if wanted is None:
        return float(_plain(expected) == _plain(answer))
    return float(named_option(answer, options) == wanted)


def _by_text(answer: str, options: dict[str, str]) -> set[str]:
    """The options whose text is the answer, or else stands in it as whole words; of "dog" and "hot dog" the longer."""
    said, texts = _plain(answer), {letter: _plain(text) for letter, text in options.items()}
    same = {letter for letter, text in texts.items() if text == said}
    if same:
        return same
    held = {letter for letter, text in texts.items() if text and _stands_in(text, said)}
    return {one for one in held if not any(one != other and _stands_in(texts[one], texts[other]) for other in held)}


def _stands_in(text: str, whole: str) -> bool:
    """Whether a text stands in another one as whole words."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", whole) is not None


def _plain(text: str) -> str:
    """A text without case, outer white space and the mark at its end: " A dog. " -> "a dog"."""
    return text.strip().rstrip(".,;:!?").strip().casefold()
