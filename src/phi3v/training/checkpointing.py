"""Whether activations are computed twice, and how, as the options of a recipe's `training` section say it.

In come the options, out come plain values. Knows both names that transformers has had for it and imports none of it, as
what counts a run before there is one asks here too.
"""

from collections.abc import Mapping
from typing import Any

from phi3v.recipe import CHECKPOINTING

CHECKPOINTING_KWARGS = tuple(f"{name}_kwargs" for name in CHECKPOINTING)
"""The options that say how."""


def checkpointing(options: Mapping[str, Any]) -> str | None:
    """Under which of its two names `training` has activations computed twice; None where it does not.

    Example: {"activation_checkpointing": True} -> "activation_checkpointing".
    """
    return next((name for name in CHECKPOINTING if options.get(name)), None)


def checkpointing_kwargs(options: Mapping[str, Any]) -> dict[str, Any]:
    """How they are, whichever name says so; checkpoints are not re-entrant unless that is asked for.

    Example: {"gradient_checkpointing_kwargs": {"offload": True}} -> {"use_reentrant": False, "offload": True}.
    """
    given = {key: value for name in CHECKPOINTING_KWARGS for key, value in (options.get(name) or {}).items()}
    return {"use_reentrant": False, **given}
