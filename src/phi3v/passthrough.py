"""Options that a recipe hands to another library: names are checked before, the library's errors cut to one line after.

Recipes pass sections on to peft, bitsandbytes and transformers without restating their fields, so a misspelt option has
to be caught where the library's own list of names is known. Also what the hub's library says of a connection.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile

from phi3v.errors import ConfigError

_CLASS_NAME = re.compile(r"^\w+(Error|Exception): ")


def check_names(
    section: str, given: Iterable[str], known: Iterable[str], near_by: Mapping[str, str] | Iterable[str] = ()
) -> None:
    """Refuses the first name that the library does not have.

    Args:
        section: of the recipe.
        given: names in it.
        known: the library's.
        near_by: names that are offered besides; a mapping has what is meant by each: {"rank": "r"}.


    Example: `check_names("lora", {"lora_alfa": 8}, ["r", "lora_alpha"])` raises
    "lora.lora_alfa is no option: did you mean lora_alpha?".

    Raises:
        ConfigError: in one line, with the nearest valid name where one is near.
    """
    names, meant = list(known), near_by if isinstance(near_by, Mapping) else {name: name for name in near_by}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), [*meant, *names], n=1, cutoff=0.5)
            hint = f": did you mean {meant.get(near[0], near[0])}?" if near else ""
            raise ConfigError(f"{section}.{name} is no option{hint}")


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something; the class name where there is none.

    Headings, which end in a colon, are passed over, and so is the class name in front of what follows them. A list
    right behind the line belongs to it.
    Example: `OSError("no such model\\nTry again later")` -> "no such model"; `ValueError("Validation error for field
    'r':\\n    TypeError: Field 'r' expected int, got str")` -> "Field 'r' expected int, got str";
    `ValueError("they should match, but found\\n- save: epoch\\n- eval: no")` -> "they should match, but found save:
    epoch, eval: no".
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    place = next((number for number, line in enumerate(lines) if not line.endswith(":")), 0)
    listed = [line.removeprefix("- ") for line in takewhile(lambda line: line.startswith("- "), lines[place + 1 :])]
    line = _CLASS_NAME.sub("", lines[place]) if place else lines[0]
    return f"{line} {', '.join(listed)}" if listed and not line.startswith("- ") else line


def expression_fault(text: str) -> str | None:
    """Why a text is no regular expression; None for one: "o_proj(" -> "missing ), unterminated subpattern ..."."""
    try:
        re.compile(text)
    except re.error as error:
        return str(error)
    return None


def connection_fault(error: BaseException) -> str | None:
    """What kept huggingface_hub from asking the hub at all, where that is at the bottom of an error; else None.

    Example: an OSError raised from `OfflineModeIsEnabled("no connection to huggingface.co")` -> that text.
    """
    cause: BaseException | None = error
    while cause is not None and type(cause).__name__ != "OfflineModeIsEnabled":
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else first_line(cause)
