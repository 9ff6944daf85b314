"""What pydantic found wrong with a recipe, said in one line for the person who wrote it.

In come a ValidationError and the model class; out comes one line: the dotted key, what was given, what is allowed, and
for an unknown key the nearest valid one. Knows pydantic's error types and nothing of any single section.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (key: value lines)",
    "model_type": "a mapping (key: value lines)",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
}
_REFUSED = {
    "model.device_map": "one process that spreads a model over GPUs computes on one of them at a time; take it out and "
    "start one for each GPU, torchrun --nproc-per-node=N -m phi3v train, with training.fsdp=true where "
    "no GPU holds the model",
}
"""Keys that other programs have, and why there is none of them here."""
_BESIDE_A_MAPPING = {"lora": ", or null for none", "quantization": ", null for none, or auto"}
_MOST = 3
"""So many mistakes are spelled out; the others are counted."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for all mistakes of a recipe, the first three in full.

    Example: "unknown key data.trian; did you mean data.train?".
    """
    mistakes = error.errors(include_url=False)
    lines = [_explain_one(dict(mistake), model) for mistake in mistakes[:_MOST]]
    if len(mistakes) > _MOST:
        lines.append(f"and {len(mistakes) - _MOST} more")
    return "; ".join(lines)


def _explain_one(mistake: dict[str, Any], model: type[BaseModel]) -> str:
    """One mistake as half a line."""
    key = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith("("))  # (tags of unions)
    kind, given, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}: {_REFUSED[key]}" if key in _REFUSED else _unknown(key, model)
    if kind == "missing":
        return f"{key} is missing; add it to the recipe"
    if kind == "value_error":
        text = str(context.get("error", mistake["msg"]))
        return text if not key or text.startswith(f"{key}.") else f"{key}: {text}"
    if kind == "literal_error":
        allowed = context["expected"]
    elif kind == "greater_than":
        allowed = f"a number above {context['gt']:g}"
    elif kind == "greater_than_equal":
        allowed = f"a number from {context['ge']:g} on"
    elif kind == "less_than_equal":
        allowed = f"a number up to {context['le']:g}"
    else:
        allowed = _ALLOWED.get(kind, mistake["msg"])
    if key in ("model", "data") and "model" in kind:
        allowed = f"a name or {allowed}"
    if kind == "dict_type" and key in _BESIDE_A_MAPPING:
        allowed += _BESIDE_A_MAPPING[key]
    hint = _default_of(mistake["loc"], model) if given is None else ""
    if kind == "string_type" and isinstance(given, dict):
        hint = "; text that begins with { needs quotes around it"
    elif kind == "string_type" and isinstance(given, int | float):
        hint = "; put it in quotes"
    return f"{key}: given {_short(given)}, allowed is {allowed}{hint}"


def _default_of(path: Sequence[str | int], model: type[BaseModel]) -> str:
    """What a key is where it is left out: "; leave it out for its default, 3"; "" where it has none."""
    inner: type[BaseModel] | None = model
    for place, step in enumerate(path):
        field = None if inner is None else inner.model_fields.get(str(step))
        if field is None:
            return ""
        if place == len(path) - 1 and isinstance(field.default, bool | int | float | str):
            return f"; leave it out for its default, {_short(field.default)}"
        inner = _model_in(field.annotation)
    return ""


def _short(value: Any) -> str:
    """A value as a recipe would hold it, at most 60 characters."""
    words = {None: "null (nothing)", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(key: str, model: type[BaseModel]) -> str:
    """An unknown key with the nearest valid one, or with all its valid neighbours.

    Where none is very near, the same name in another section comes first: `data.num_crops` -> `image.num_crops`.
    Example: `data.image` -> `data.images`, a letter away, though there is a section `image`.
    """
    known = sorted(_keys(model), key=lambda candidate: candidate.count("."))
    section, _, name = re.sub(r"\.\d+", "", key).rpartition(".")
    neighbours = {
        candidate.rpartition(".")[2]: candidate for candidate in known if candidate.rpartition(".")[0] == section
    }
    if near := get_close_matches(name, neighbours, n=1, cutoff=0.85):
        return f"unknown key {key}; did you mean {neighbours[near[0]]}?"
    namesakes = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    if namesakes:
        return f"unknown key {key}; did you mean {namesakes[0]}?"
    near = get_close_matches(name, neighbours, n=1)
    if near:
        return f"unknown key {key}; did you mean {neighbours[near[0]]}?"
    return f"unknown key {key}; valid are {', '.join(neighbours)}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a model and of the models inside it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model class in an annotation: X, X | None, list[X] or Annotated[X, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)
    return None
