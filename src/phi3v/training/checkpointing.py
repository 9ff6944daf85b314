"""Whether activations are computed twice, and how, as the options of a recipe's `training` section say it.

In come the options, out come plain values, or an error of one line. Knows both names that transformers has had for it
and imports none of it, as what counts a run before there is one asks here too.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.utils.checkpoint import checkpoint

from phi3v.errors import ConfigError
from phi3v.passthrough import check_names
from phi3v.recipe import CHECKPOINTING

CHECKPOINTING_KWARGS = tuple(f"{name}_kwargs" for name in CHECKPOINTING)
"""The options that say how."""

OWN_KWARGS = ("every_n_layers", "offload")
"""Those of them that transformers takes itself; the others are torch's."""

_NOT_PLAIN = ("function", "args", "kwargs", "context_fn")
"""Arguments of torch's checkpoints that a recipe cannot hold."""

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


def check_checkpointing(options: Mapping[str, Any]) -> None:
    """Refuses what says how activations are computed twice where it is misspelt, cannot be, or has no use.

    transformers finds out when the model is loaded, in words of torch, and takes the last without a word: its arguments
    alone switch nothing on.

    Raises: ConfigError in one line that names the key.
    """
    known = [*OWN_KWARGS, *(name for name in inspect.signature(checkpoint).parameters if name not in _NOT_PLAIN)]
    for name in CHECKPOINTING_KWARGS:
        given, switch = options.get(name) or {}, name.removesuffix("_kwargs")
        check_names(f"training.{name}", given, known)
        for key, value in given.items():
            if key == "every_n_layers":
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ConfigError(f"training.{name}.{key} is {value!r}, allowed is a whole number, 1 or more")
            elif key != "determinism_check" and not isinstance(value, bool):
                raise ConfigError(f"training.{name}.{key} is {value!r}, allowed are true and false")
        if given and checkpointing(options) is None and not any(key in options for key in CHECKPOINTING):
            raise ConfigError(
                f"training.{name} says how activations are computed twice, and nothing says that they are: set "
                f"training.{switch}=true, or take it out"
            )
