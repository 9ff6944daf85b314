"""Which words of an answer are not those that were expected: two texts in, their pieces with a mark each out."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

MOST_WORDS = 1000  # of a text; marking longer ones would take seconds a row
Piece = tuple[str, bool]
"""A piece of a text, and whether it differs."""
_WORDS = re.compile(
    r"\s+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]"
)


def mark_words(expected: str, answer: str) -> tuple[list[Piece], list[Piece]]:
    """The pieces of both texts; marked are words of the expected one that the answer lacks, and words of the answer
    that were not expected.

    Words are runs of letters and digits, each sign by itself, and each character of scripts without spaces. Joined, the
    pieces are the texts again. Texts of more than 1,000 words are not marked.
    Example: "Product: Scarf, Price: 470", "Product: Cap, Price: 470" -> [("Product: ", False), ("Scarf", True),
    (", Price: 470", False)], [("Product: ", False), ("Cap", True), (", Price: 470", False)].
    """
    ones, others = _WORDS.findall(expected), _WORDS.findall(answer)
    if ones == others or max(len(ones), len(others)) > MOST_WORDS:
        return [(expected, False)], [(answer, False)]
    left: list[Piece] = []
    right: list[Piece] = []
    for kind, i, j, k, m in SequenceMatcher(None, ones, others, autojunk=False).get_opcodes():
        left += [("".join(ones[i:j]), kind != "equal")] if j > i else []
        right += [("".join(others[k:m]), kind != "equal")] if m > k else []
    return left, right
