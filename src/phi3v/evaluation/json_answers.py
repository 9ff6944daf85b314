"""Answers that are JSON: read strictly, compared value by value at their paths. Strings in, numbers out.

Strict means that the whole text is one JSON value: nothing around it but white space, no NaN or Infinity, no key twice
in an object, no number beyond what a float holds.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NoReturn

from phi3v.evaluation.shares import same_text

Path = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""


def json_leaves(text: str) -> dict[Path, Any] | None:
    """Every value of a JSON text that holds no other one, by its path; None where the text is not strict JSON.

    Example: '{"a": 1, "b": {"c": ["x", {}]}}' -> {("a",): 1, ("b", "c", 0): "x", ("b", "c", 1): {}}; '7' -> {(): 7};
    '{"a": 1, "a": 2}', '[NaN]' and '```json {} ```' -> None.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_repeated_keys)
        return dict(_leaves((), value))
    except (ValueError, RecursionError):
        return None


def json_valid(expected: str, answer: str) -> float:
    """1.0 where the answer is strict JSON, whatever it says: '{"a": 2}' -> 1.0, '{"a": 2' -> 0.0."""
    return float(json_leaves(answer) is not None)


def json_field_accuracy(expected: str, answer: str) -> float:
    """Values that are right at their path, out of all paths of both texts.

    Example: expected '{"a": 1, "b": "x"}': answer '{"b": "x", "a": 1.0}' -> 1.0; '{"a": 1}' -> 1/2;
    '{"a": 1, "b": "x", "c": 0}' -> 2/3; '{"a": 1' -> 0.0. Where the expected text is no JSON the texts must be the
    same.
    """
    wanted, given = json_leaves(expected), json_leaves(answer)
    if wanted is None:
        return float(same_text(expected, answer))
    if given is None:
        return 0.0
    return sum(_right(wanted, given, path) for path in wanted) / len(wanted.keys() | given.keys())


def json_field_scores(expected: str, answer: str) -> dict[str, float]:
    """For every field that is expected the share of its values that are right; a list's elements are one field.

    Example: expected '{"n": 2, "items": [{"p": 1}, {"p": 2}]}', answer '{"n": 2, "items": [{"p": 1}]}' ->
    {"n": 1.0, "items[].p": 0.5}. Where the expected text is no JSON -> {}.
    """
    return leaf_scores(json_leaves(expected) or {}, json_leaves(answer) or {})


def leaf_scores(wanted: dict[Path, Any], given: dict[Path, Any]) -> dict[str, float]:
    """`json_field_scores` of texts that are taken apart, see `json_leaves`."""
    found: dict[str, list[bool]] = {}
    for path in wanted:
        found.setdefault(path_name(path), []).append(_right(wanted, given, path))
    return {name: sum(right) / len(right) for name, right in found.items()}


def most_frequent_leaves(rows: Iterable[dict[Path, Any]]) -> dict[Path, Any]:
    """At every path the value that gets the most of its field, given to all rows; the first one of equals.

    A value counts as what it is worth in `leaf_scores`: half in a row that has two values of the field. So no single
    answer gets more of any field.

    Example: [{("a",): 1}, {("a",): 2}, {("a",): 2.0}] -> {("a",): 2}.
    """
    worth: dict[Path, dict[Any, float]] = {}
    first: dict[tuple[Path, Any], Any] = {}
    for leaves in rows:
        names = Counter(map(path_name, leaves))
        for path, value in leaves.items():
            kind = "number" if type(value) in (int, float) else type(value).__name__
            key = (kind, value.strip() if isinstance(value, str) else None if isinstance(value, dict | list) else value)
            first.setdefault((path, key), value)
            its = worth.setdefault(path, {})
            its[key] = its.get(key, 0.0) + 1 / names[path_name(path)]
    return {path: first[path, max(its, key=lambda key: its[key])] for path, its in worth.items()}


def json_errors(expected: str, answer: str) -> dict[str, float | None]:
    """For every field whose expected values in this row are numbers how far the answer's are off on average.

    Elements that the answer lacks, or has no number for, are left out; None where that leaves none.

    Example: expected '{"n": 2, "items": [{"p": 1}, {"p": 2}], "x": "a"}', answer '{"n": "2", "items": [{"p": 4}]}' ->
    {"n": None, "items[].p": 3.0}.
    """
    given, found = _number_leaves(answer), {}
    for name, numbers in number_fields(expected).items():
        errors = [_distance(value, given[path]) for path, value in numbers.items() if path in given]
        found[name] = sum(errors) / len(errors) if errors else None
    return found


def number_fields(text: str) -> dict[str, dict[Path, Any]]:
    """The fields of a JSON text all of whose values are numbers, each with its values by path.

    Example: '{"n": 2, "items": [{"p": 1}, {"p": 2}], "x": "a"}' -> {"n": {("n",): 2}, "items[].p": {("items", 0, "p"):
    1, ("items", 1, "p"): 2}}.
    """
    leaves, numbers = json_leaves(text) or {}, _number_leaves(text)
    texts = {path_name(path) for path in leaves.keys() - numbers.keys()}
    found: dict[str, dict[Path, Any]] = {}
    for path, value in numbers.items():
        if (name := path_name(path)) not in texts:
            found.setdefault(name, {})[path] = value
    return found


def least_errors(expected: Sequence[str], answers: Sequence[str] | None = None) -> list[dict[str, float]]:
    """`json_errors` of the best single answer: the one that has at each path the median of the expected numbers.

    An answer may leave elements of a list out and be near in the others. So what stands beside `answers` is measured at
    the elements that they have a number for, in a row where they have none at all of them. A number counts as what it
    is worth in the row's mean: half where two of its field are measured.

    Example: expected '{"n": 1}', '{"n": 2}', '{"n": 9}' -> [{"n": 1.0}, {"n": 0.0}, {"n": 7.0}].
    """
    rows = [number_fields(text) for text in expected]
    if answers is not None:
        said = map(_number_leaves, answers)
        rows = [
            {name: {path: its[path] for path in its if path in given} or its for name, its in row.items()}
            for row, given in zip(rows, said, strict=True)
        ]
    seen: dict[Path, list[tuple[Any, float]]] = {}
    for row in rows:
        for its in row.values():
            for path, value in its.items():
                seen.setdefault(path, []).append((value, 1 / len(its)))
    middle = {path: _weighted_median(values) for path, values in seen.items()}
    return [
        {
            name: sum(_distance(value, middle[path]) for path, value in its.items()) / len(its)
            for name, its in one.items()
        }
        for one in rows
    ]


def path_name(path: Path) -> str:
    """A path as people write it, without positions: ("items", 0, "p") -> "items[].p", () -> "value", ("a.b",) ->
    '"a.b"'."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += "[]"
        else:
            text += ("." if text else "") + (json.dumps(step) if not step or set(step) & set('.[]"') else step)
    return text or "value"


def _leaves(path: Path, value: Any) -> Iterable[tuple[Path, Any]]:
    """The values below one value."""
    if isinstance(value, dict | list) and value:
        steps = value.items() if isinstance(value, dict) else enumerate(value)
        for step, inner in steps:
            yield from _leaves((*path, step), inner)
    else:
        yield path, value


def _right(wanted: dict[Path, Any], given: dict[Path, Any], path: Path) -> bool:
    """Whether the value at a path is there and the same; 1 and 1.0 are, 1 and "1", 1 and true are not."""
    if path not in given:
        return False
    one, other = wanted[path], given[path]
    if isinstance(one, str) and isinstance(other, str):
        return same_text(one, other)
    numbers = [type(value) in (int, float) for value in (one, other)]
    if all(numbers):
        return one == other or (abs(one) < 1e300 and abs(other) < 1e300 and math.isclose(one, other, rel_tol=1e-9))
    return type(one) is type(other) and one == other


def _distance(one: float, other: float) -> float:
    """How far two numbers are apart, at most the largest float: whole numbers of JSON have no limit."""
    try:
        return min(abs(float(one) - float(other)), sys.float_info.max)
    except OverflowError:
        return sys.float_info.max


def _number_leaves(text: str) -> dict[Path, Any]:
    """The numbers of a JSON text by their paths; true and false are none."""
    return {path: value for path, value in (json_leaves(text) or {}).items() if type(value) in (int, float)}


def _weighted_median(values: Iterable[tuple[Any, float]]) -> Any:
    """The least number that half of the weight is at or below: no other one has a smaller sum of weighted distances."""
    ordered = sorted(values, key=lambda pair: pair[0])
    sums = list(accumulate(weight for _, weight in ordered))
    return ordered[next(place for place, weight in enumerate(sums) if 2 * weight >= sums[-1] - 1e-9)][0]


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found
