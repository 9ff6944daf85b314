"""The sets of a recipe's `data.train`, each with what holds for it: its own values, else the section's.

In come one name, or mappings as a recipe holds them; out come `SetChoice`s and their weights. Opens nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi3v.data.columns import RowOptions
from phi3v.errors import DataError


@dataclass(frozen=True)
class SetChoice:
    """One set of `train`: a source and what holds for it."""

    source: str
    options: RowOptions
    weight: float | None
    revision: str | None
    subset: str | None

    @classmethod
    def of(
        cls, choice: Mapping[str, Any], options: RowOptions, revision: str | None, subset: str | None
    ) -> "SetChoice":
        """A mapping of a recipe with the section's values where it has none of its own.

        A set whose format is a shape of conversations does not take the section's templates, which are for the sets
        beside it; null takes none of them either. Example: {"source": "a.json", "format": "conversations"} beside the
        section's prompt "What is it?" -> prompt "{prompt}", as where no recipe says one.
        """
        own = {key: value for key, value in choice.items() if key not in ("source", "weight", "revision", "subset")}
        plain = {"prompt": RowOptions.prompt, "answer": RowOptions.answer}
        own |= {key: text for key, text in plain.items() if key in own and own[key] is None}
        if own.get("format", options.format) not in ("auto", "columns"):
            own = plain | own
        return cls(
            choice["source"],
            replace(options, **own),
            choice.get("weight"),
            choice.get("revision", revision),
            choice.get("subset", subset),
        )


def choices_of(
    train: str | Sequence[Mapping[str, Any]], options: RowOptions, revision: str | None, subset: str | None
) -> list[SetChoice]:
    """The sets of `train`; one name is a list of one set."""
    if isinstance(train, str):
        return [SetChoice(train, options, None, revision, subset)]
    return [SetChoice.of(choice, options, revision, subset) for choice in train]


def weights_of(choices: Sequence[SetChoice]) -> list[float] | None:
    """The weights of the sets, None when no set has one. Raises: DataError when only some have."""
    given = [choice.weight for choice in choices if choice.weight is not None]
    if given and len(given) < len(choices):
        bare = next(choice.source for choice in choices if choice.weight is None)
        raise DataError(f"data.train: {bare} has no weight and another set has: give every set a weight, or none")
    return given or None
