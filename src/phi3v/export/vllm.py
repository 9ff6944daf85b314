"""What vLLM is told to serve merged weights, and whether the installed vLLM is one whose list of names was read.

vLLM has a Phi-3-V of its own and takes no LoRA for it, so it gets merged weights; configuration and processor are this
package's, which it finds by the entry point `vllm.general_plugins`. Nothing here imports or runs vLLM.
"""

import shlex
from collections.abc import Mapping
from importlib import metadata
from typing import Any

READ = "0.33"
"""The version whose Phi-3-V was read: names of weights, fields of the configuration, members of the processor."""
CONTEXT = 4096
"""The original context of both of Microsoft's models. vLLM chooses rope's factors once for the server: with one token
more every request has the long ones, short prompts too, which training and `phi3v ask` give the short ones."""


OTHER_TOWER = "vLLM cannot serve these weights: its Phi-3-V has a tower of ViT-L/14 at 336 pixels, theirs is another"
"""Said instead of the command where not `serves`."""


def serves(config: Mapping[str, Any]) -> bool:
    """Whether vLLM can serve merged weights of this config.json, which names a tower only where it is not vLLM's.

    Example: {"vision_config": {"hidden_size": 64, ...}, ...}, as of the demo's model -> False.
    """
    return "vision_config" not in config


def serve_command(name: str) -> str:
    """The command: serve_command("shop") -> "vllm serve shop --max-model-len 4096 --limit-mm-per-prompt '...'"."""
    return f"vllm serve {shlex.quote(name)} --max-model-len {CONTEXT} --limit-mm-per-prompt '{{\"image\": 1}}'"


def version_note() -> str:
    """What is known of the vLLM that is there: "read against vLLM 0.33, and not run here" where there is none."""
    try:
        there = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return f"read against vLLM {READ}, and not run here"
    if there == READ or there.startswith(f"{READ}."):
        return f"read against vLLM {READ}, which is installed, and not run here"
    return f"read against vLLM {READ}, and {there} is installed: it may ask for other names or settings"
