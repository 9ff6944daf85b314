"""Whether activations are computed twice, and how, as the options of a recipe's `training` section say it.

In come the options, out come plain values. Knows both names that transformers has had for it and imports none of it, as
what counts a run before there is one asks here too.
"""

from collections.abc import Mapping
from typing import Any

from phi3v.recipe import CHECKPOINTING

CHECKPOINTING_KWARGS = tuple(f"{name}_kwargs" for name in CHECKPOINTING)
"""The options that say how."""

SHARDED_CHECKPOINTING = "fsdp_config.activation_checkpointing"
"""Ranks that share a model have a third option, of FSDP2, which counts with `fsdp` alone."""


def checkpointing(options: Mapping[str, Any]) -> str | None:
    """Which option of `training` has activations computed twice; None where none does.

    Example: {"activation_checkpointing": True} -> "activation_checkpointing", and of {"fsdp": True, "fsdp_config":
    {"activation_checkpointing": True}} it is "fsdp_config.activation_checkpointing".
    """
    found = next((name for name in CHECKPOINTING if options.get(name)), None)
    if found is None and options.get("fsdp") and (options.get("fsdp_config") or {}).get("activation_checkpointing"):
        return SHARDED_CHECKPOINTING
    return found


def checkpointing_kwargs(options: Mapping[str, Any]) -> dict[str, Any]:
    """How they are, whichever name says so; checkpoints are not re-entrant unless that is asked for.

    FSDP2's own take none of these options: each layer is computed twice, and nothing is offloaded.

    Example: {"gradient_checkpointing_kwargs": {"offload": True}} -> {"use_reentrant": False, "offload": True}.
    """
    if checkpointing(options) == SHARDED_CHECKPOINTING:
        return {"use_reentrant": False}
    given = {key: value for name in CHECKPOINTING_KWARGS for key, value in (options.get(name) or {}).items()}
    return {"use_reentrant": False, **given}
