"""YAML as recipes use it: text in, plain Python values out, and back.

The reader follows YAML 1.2 where YAML 1.1 surprises people: `1e-4` is a number; `yes`, `no`, `on`, `off`, dates and
`1:30` are text; a key that is written twice is an error. Values are only text, numbers, true/false, null, lists and
mappings with text keys. Knows nothing of what the keys mean; every error is a `ConfigError` that names place and line.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from phi3v.errors import ConfigError

_NUMBERS = {
    "tag:yaml.org,2002:int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
}
_WORDS = {
    "tag:yaml.org,2002:bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "tag:yaml.org,2002:null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
}
_BRACES = re.compile(r"(?:^|[:-]\s+)\{[^{}:]*\}\s*[^\s}\]#]")
"""A text such as {title} {price}, of which YAML takes the beginning for a mapping."""
_QUOTED = re.compile(r""" "(?:[^"\\]|\\.)*" | '[^']*' """, re.VERBOSE)


def _resolvers(table: dict[str, tuple[re.Pattern[str], list[str]]]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's form of a tag table: first character of a plain scalar -> the (tag, pattern) pairs to try."""
    by_first: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (pattern, firsts) in table.items():
        for first in firsts:
            by_first.setdefault(first, []).append((tag, pattern))
    return by_first


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """A whole number in YAML 1.2's notation: a leading 0 means nothing, 0o10 and 0x10 do."""
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


class _Reader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars and without repeated or non-text keys."""

    yaml_implicit_resolvers = _resolvers(_NUMBERS | _WORDS)
    yaml_constructors = {**yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:int": _construct_int}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are texts that stand once each."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not text; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key {key!r} stands twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node; aliases (`*name`) are refused, because a value that holds itself would never end."""
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not supported; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    """SafeDumper that also quotes what only `_Reader` would take for a number, and writes no aliases."""

    yaml_implicit_resolvers = {
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _resolvers(_NUMBERS).get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_resolvers(_NUMBERS)}
    }

    def ignore_aliases(self, data: Any) -> bool:
        """A value that is used twice is written twice, so that the file reads plainly."""
        return True


def read_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: the YAML text.
        where: the place to name in an error, a file for instance.
    Example: read_yaml("rate: 1e-4\\non: yes", "a.yaml") -> {"rate": 0.0001, "on": "yes"}.
    Raises: ConfigError in one line, with the line number where YAML knows it.
    """
    try:
        return yaml.load(text, Loader=_Reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        at_fault = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        problem = error.problem or error.context or ""
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}{_which_quotes(problem, at_fault)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _which_quotes(problem: str, line: str) -> str:
    """The way out where text in a line lacks quotes, "" where nothing tells.

    Example: of the line "a: {b: What is it?, c: 1}", where PyYAML ends a text at the ?, "; text with a ? inside { } or
    [ ] needs quotes around it". What has quotes already, "Price: {price}, {unit}" for instance, is not at fault.
    """
    if problem.endswith("but got '?'"):
        return "; text with a ? inside { } or [ ] needs quotes around it"
    return "; text that begins with { needs quotes around it" if _BRACES.search(_QUOTED.sub("''", line)) else ""


def write_yaml(value: Any) -> str:
    """The YAML text of a plain value, keys in their order; `read_yaml` gives the same value back.

    Example: write_yaml({"rate": 0.0001, "name": "1e-4"}) -> "rate: 0.0001\\nname: '1e-4'\\n".
    """
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=False)


def apply_override(values: Mapping[str, Any], override: str, shorthands: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `values` with one override, "section.key=value", applied.

    Args:
        values: nested mappings.
        override: the value is YAML.
        shorthands: sections that may be written as one value -> the key that it stands for.
    Example: {"model": "a/b"}, "model.dtype=float32", {"model": "name"} -> {"model": {"name": "a/b", "dtype":
        "float32"}}.
    Raises: ConfigError when it is not key=value, its value is not YAML, or its key goes through a plain value.
    """
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, training.seed=1 for instance")
    result = dict(values)
    inner = result
    for depth, part in enumerate(path[:-1]):
        below = inner.get(part)
        if depth == 0 and isinstance(below, str) and part in shorthands:
            below = {shorthands[part]: below}
        if below is not None and not isinstance(below, Mapping):
            raise ConfigError(
                f"override {override!r}: {'.'.join(path[: depth + 1])} is {below!r}, which has no keys below it"
            )
        inner[part] = dict(below or {})
        inner = inner[part]
    inner[path[-1]] = read_yaml(text, f"override {override!r}")
    return result
