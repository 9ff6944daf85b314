"""Why an adapter does not load, by its configuration and by the names and shapes of its tensors.

In come the small files of an adapter, out come lines that name what is wrong with them, where PEFT's own words would
tell of its code, or of a tensor that is missing and stands there under another name.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3v.errors import CheckpointError
from phi3v.passthrough import expression_fault, first_line
from phi3v.targets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Target, read_json

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.")
"""What DistributedDataParallel and torch.compile put into the names of a raw state_dict()."""
_A = ".lora_A.weight"
_WITH_LORA = ("ADALORA", "XLORA")
"""Other kinds that may hold matrices of LoRA."""
_NUMBERS = {"r": "a whole number", "lora_alpha": "a number", "lora_dropout": "a number"}
"""Values of a LoRA adapter's configuration that PEFT computes with and does not check."""
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
"""Those that give modules another one of these values."""


def refuse_wrong_numbers(folder: Path, values: Mapping[str, Any]) -> None:
    """Raises: CheckpointError where LoRA's numbers in a configuration are none, "4" in quotes for instance."""
    if values.get("peft_type") != "LORA":
        return
    where = folder / ADAPTER_CONFIG
    for name, wanted in _NUMBERS.items():
        if not _fits(name, value := values.get(name, 0)):
            quotes = " without quotes" if isinstance(value, str) else ""
            raise CheckpointError(
                f"{where}: {name} is {value!r}, and {wanted} belongs there: write one{quotes}, or copy the file again"
            )
    for name, number in _PATTERNS.items():
        pattern = values.get(name)
        for key, value in pattern.items() if isinstance(pattern, dict) else ():
            if (fault := expression_fault(key)) is not None:
                raise CheckpointError(f"{where}: {name} names {key!r}, which is no regular expression ({fault})")
            if not _fits(number, value):
                raise CheckpointError(
                    f"{where}: {name} says {value!r} of {key!r}, and {_NUMBERS[number]} belongs there"
                )


def _fits(name: str, value: Any) -> bool:
    """Whether a value is of the kind that `_NUMBERS` names: a whole number for the rank, any number elsewhere."""
    return not isinstance(value, bool) and isinstance(value, int if name == "r" else int | float)


def refuse_prompts(place: Target) -> None:
    """Raises: CheckpointError where an adapter to train on is learned prompts, which PEFT loads for answers alone."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = _config(place).get("peft_type")
    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    if issubclass(configs.get(kind, object), PromptLearningConfig):
        raise CheckpointError(
            f"adapter {place.adapter} is of type {kind}: its learned prompts answer, and cannot be trained on here; "
            "name an adapter of LoRA (DoRA, rsLoRA and the like among them), or begin with a new one"
        )


@contextlib.contextmanager
def said_of(place: Target, stored: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Turns what PEFT raises while it puts an adapter on its base into one line.

    Args:
        place: the adapter and its base.
        stored: names and shapes of the adapter's tensors.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        kind = _config(place).get("peft_type")
        tested = "" if kind == "LORA" else f" (it is of type {kind}; those tested here are LoRA, DoRA and rsLoRA)"
        why = fault_of(place, stored, stored) or f"does not fit {place.base}: {first_line(error)}{tested}"
        raise CheckpointError(f"adapter {place.adapter} {why}") from error


def fault_of(place: Target, stored: Mapping[str, tuple[int, ...]], wrong: Iterable[str]) -> str | None:
    """What is wrong with a LoRA adapter's own files, so that no base would help; None where nothing is seen.

    Args:
        place: the adapter.
        stored: names and shapes of its tensors.
        wrong: names of those that found no place.
    """
    values = _config(place)
    ranks = {shape[0] for name, shape in stored.items() if name.endswith(_A) and shape}
    if (kind := values.get("peft_type")) != "LORA":
        return _of_two_kinds(f"says peft_type: {kind}", "LoRA's") if ranks and kind not in _WITH_LORA else None
    for name in sorted(set(wrong) & stored.keys()):
        if (usual := _usual(name)) != name:
            return (
                f"names its tensors otherwise than PEFT ({name}, where {usual} belongs), as a raw state_dict() does: "
                "write it by PEFT's save_pretrained, or rename them in its file"
            )
    if (patterns := values.get("rank_pattern")) and isinstance(patterns, dict):
        return _unlike_pattern(values.get("r"), patterns, stored) or _with_magnitudes(values, stored)
    if ranks and ranks != {values.get("r")}:
        found = " and ".join(map(str, sorted(ranks)))
        said = f"says r: {values['r']}" if "r" in values else "says no r"
        return _of_two_kinds(said, f"of rank {found}")
    return _with_magnitudes(values, stored)


def _unlike_pattern(rank: Any, patterns: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first tensor whose rank is not that of the pattern that its module takes, or of `r` where it takes none."""
    from peft.utils.other import get_pattern_key

    for name, shape in sorted(stored.items()):
        if name.endswith(_A) and shape:
            module = name.removesuffix(_A).removeprefix(_PREFIX)
            if shape[0] != (said := patterns.get(get_pattern_key(list(patterns), module), rank)):
                return _of_two_kinds(f"says rank {said} of {module} (r, rank_pattern)", f"of rank {shape[0]} there")
    return None


def _with_magnitudes(values: Mapping[str, Any], stored: Iterable[str]) -> str | None:
    """What of DoRA the configuration says, and the tensors do not."""
    has, says = any("lora_magnitude_vector" in name for name in stored), bool(values.get("use_dora"))
    if has == says:
        return None
    return _of_two_kinds(f"says use_dora: {str(says).lower()}", f"{'DoRA' if has else 'LoRA'}'s")


def _of_two_kinds(said: str, are: str) -> str:
    """That configuration and weights contradict each other."""
    return (
        f"is of two kinds: its {ADAPTER_CONFIG} {said}, and the tensors of its {ADAPTER_WEIGHTS} are {are}; copy both "
        "files again, from one place"
    )


def _usual(name: str) -> str:
    """How PEFT's files name a tensor that a raw state names otherwise.

    Example: "module.model.norm.lora_A.default.weight" -> "base_model.model.model.norm.lora_A.weight".
    """
    bare = _WRAPPERS.sub("", name).replace(".default.", ".")
    return bare if bare.startswith(_PREFIX) else f"{_PREFIX}{bare}"


def _config(place: Target) -> dict[str, Any]:
    """The adapter's configuration."""
    assert place.adapter is not None
    return read_json(place.adapter / ADAPTER_CONFIG)
