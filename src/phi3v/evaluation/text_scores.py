"""Texts that are nearly right: likeness by characters and by words, from 0 to 1. Strings in, numbers out.

`anls`, `rouge_l` and `chrf` are computed by rapidfuzz, rouge-score and sacrebleu (the extra `metrics`), which are
imported when they are first needed: rouge-score takes seconds.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from difflib import SequenceMatcher

from phi3v.errors import MissingPackageError, install

PACKAGES = {"anls": "rapidfuzz", "rouge_l": "rouge_score", "chrf": "sacrebleu"}
"""Metric -> the package that computes it."""

ANLS_THRESHOLD = 0.5  # of the distance, as DocVQA's evaluation sets it


def missing_package(metric: str) -> str | None:
    """The package that a metric lacks here, None where it can be computed."""
    package = PACKAGES.get(metric)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def require_package(metric: str) -> None:
    """Raises: MissingPackageError when the package of a metric is not installed."""
    if (package := missing_package(metric)) is not None:
        raise MissingPackageError(
            f"the metric {metric} needs {package.replace('_', '-')}, which is not installed: {install('metrics')}"
        )


def text_similarity(expected: str, answer: str) -> float:
    """Likeness of two texts from 0 to 1: `difflib.SequenceMatcher.ratio`, without its junk heuristic.

    Example: "abcd" and "bcde" share the block "bcd": 2 * 3 / 8 = 0.75. Two empty texts are alike: 1.0.
    """
    return SequenceMatcher(None, expected.strip(), answer.strip(), autojunk=False).ratio()


def anls(expected: str, answer: str) -> float:
    """Normalised Levenshtein similarity, as DocVQA has it for one row: case does not count, 0 below one half.

    Example: "scarf", "Scarfs" -> 1 - 1/6; "scarf", "cap" -> 0.0, since 4 of 5 characters differ. Two empty texts: 1.0.
    """
    require_package("anls")
    from rapidfuzz.distance import Levenshtein

    distance = Levenshtein.normalized_distance(_one_line(expected), _one_line(answer))
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def rouge_l(expected: str, answer: str) -> float:
    """ROUGE-L: F measure of the longest common subsequence of words, by rouge-score, without stemming.

    Example: "a red wool scarf", "a wool scarf" share 3 words in order: precision 3/3, recall 3/4, F 6/7. Two texts
    without a word are alike where they are the same.
    """
    require_package("rouge_l")
    from rouge_score.rouge_scorer import RougeScorer

    if not _Words().tokenize(expected + answer):
        return float(expected.strip() == answer.strip())
    return RougeScorer(["rougeL"], tokenizer=_Words()).score(expected, answer)["rougeL"].fmeasure


def chrf(expected: str, answer: str) -> float:
    """chrF2 of a row, by sacrebleu, as a share: F measure of runs of 1 to 6 characters, white space aside.

    Example: "abc", "abd": 2 of 3 runs of one, 1 of 2 of two, 0 of 1 of three agree: precision and recall (2/3 + 1/2 +
    0) / 3 = 0.389, and so is their F. Two empty texts: 1.0.
    """
    require_package("chrf")
    from sacrebleu.metrics.chrf import CHRF

    if not expected.strip() and not answer.strip():
        return 1.0
    return CHRF().sentence_score(answer, [expected]).score / 100


class _Words:
    """Words for rouge-score: runs of letters, digits and marks of any script, in lower case.

    Its own tokenizer knows a to z and 0 to 9 alone, and gives the same words for texts of these.
    """

    def tokenize(self, text: str) -> list[str]:
        """ "A red-ish Écharpe!" -> ["a", "red", "ish", "écharpe"]."""
        kept = (letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in text.lower())
        return "".join(kept).split()


def _one_line(text: str) -> str:
    """Lower case, one blank for each stretch of white space."""
    return " ".join(text.lower().split())
