"""Multiple choice: which option an answer names, by its letter or by its text. Strings in, letters and numbers out.

The options are read from the question where it lists them. Only what is plainly a choice counts: the A of `A dog` is an
article, and an answer that names two options names none, also where the second one follows by "or", "and", a comma or a
slash, or by its own label.
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
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\w*\{)?\s*\(?([A-Z])\)?\s*[.:]?\s*\}")
_BOLD = re.compile(r"\*\*\(?([A-Z])\)?[.:]?\*\*(?!\s+[a-z])")
_JOINED = re.compile(
    r"[).:]?\s*(?:(?:,\s*)?\b(?:or|and)\b|[/&]|,(?=\s*\(?[A-Z](?![\w'])(?!\s+(?!or\b|and\b)[a-z])))"
    r"\s*(?:option\s+)?\(?(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+[a-z]))"
)
_LABELLED = re.compile(r"(?:\b(?:or|and)\b|[,;/&\n]|\.\s)\s*\(?([A-Z])(?:[).:](?=\s|$)|(?=\s*$))")
_AT_END = re.compile(
    r"(?:\b(?:is|be|was|so|thus|hence|therefore|say|choose|pick|select|with|for)\s|'s\s|[:=,.])\s*([A-Z])[.!]?$"
)
_STANDING = re.compile(r"(?<![\w'])(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:or|and|nor|but|is|was)\b)[a-z]))")


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
    and "I see a dog there" -> "B"; "A dog" -> "B", by its text; "A or B", "Answer: B or A", "B. a dog or A. a cat",
    "a bird" -> None. Without options letters alone count; with them also one at the end, where no other one stands:
    "I think it is B" -> "B". What is in \\boxed{} goes before all else.
    """
    text = answer.strip().strip("*_`\"'").strip()
    bare = text.replace("*", "")
    if boxed := set(_BOXED.findall(answer)):
        letters = boxed
    elif match := _ALONE.fullmatch(text) or _FIRST.match(text):
        letters = {_letter(match).upper(), *_BRACKETED.findall(text), *_others(text, match)}
    else:
        said = [match for match in _SAID.finditer(bare) if match[1].isupper()]
        letters = {letter for match in said for letter in (match[1], *_others(bare, match))}
        letters = letters or {*_BRACKETED.findall(bare), *_BOLD.findall(answer)}
    if options:
        letters &= options.keys()
        letters = letters or _by_text(text, options) or _at_end(bare, options)
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


def _others(text: str, named: re.Match[str]) -> list[str]:
    """The letters that an answer names beside the one that was found: those joined to it, and those with a label.

    Example: beside the B of "B or C, I think" and of "B. a dog or C. a bird" ["C"]; of "B. vitamin C. Yes" [].
    """
    found, at = [], named.end()
    while joined := _JOINED.match(text, at):
        found.append(_letter(joined))
        at = joined.end()
    return found + _LABELLED.findall(text, named.end())


def _at_end(text: str, options: dict[str, str]) -> set[str]:
    """The letter of an option at the end of a sentence such as "I think it is B.", where no other one stands in it."""
    match = _AT_END.search(text)
    standing = {_letter(one) for one in _STANDING.finditer(text)} & options.keys()
    return standing if match is not None and standing == {match[1]} else set()


def _letter(match: re.Match[str]) -> str:
    """What the one group holds that took part."""
    return next(filter(None, match.groups()))


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
