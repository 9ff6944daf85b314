"""What vLLM is told to serve merged weights, and whether the installed vLLM is one whose list of names was read.

vLLM has a Phi-3-V of its own and takes no LoRA for it, so it gets merged weights; configuration and processor are this
package's, which it finds by the entry point `vllm.general_plugins`. Nothing here imports or runs vLLM.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

READ = "0.33"
"""The version whose Phi-3-V was read: names of weights, fields of the configuration, members of the processor."""
OTHER_TOWER = "vLLM cannot serve these weights: its Phi-3-V has a tower of ViT-L/14 at 336 pixels, theirs is another"
"""Said instead of the command where vLLM cannot serve them."""
_STEP = 4096
"""Beyond the original context a server's length is a multiple of it."""


@dataclass(frozen=True)
class Serving:
    """What a vLLM server of some merged weights is told, and what that means for them.

    vLLM chooses rope's factors once for the server: with a length of one token more than the model's original context
    every request has the long ones, short prompts too, which training and `phi3v ask` give the short ones.

    Attributes:
        images: in a prompt at most.
        context: tokens of prompt and answer at most.
        original: the model's original context, `original_max_position_embeddings`.
        shortest: tokens of the run's shortest sample; None where that is not known.
        longest: of its longest.
    """

    images: int = 1
    context: int = 4096
    original: int = 4096
    shortest: int | None = None
    longest: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], samples: Mapping[str, int]) -> "Serving | None":
        """Of the weights of this config.json, tuned on such samples; None where vLLM cannot serve them.

        A config names a tower only where it is not vLLM's. The length is the original context; where a sample is
        longer, so much that it fits.

        Args:
            config: of merged weights.
            samples: see `training.samples.facts_of_samples`; empty where nothing is known of them.
        Example: an original context of 4,096 and a longest sample of 4,810 tokens -> context 8192.
        """
        if "vision_config" in config:
            return None
        most = int(config["max_position_embeddings"])
        original = int(config["original_max_position_embeddings"]) if config.get("rope_scaling") else most
        longest = samples.get("longest", 0)
        context = original if longest <= original else min(-(-longest // _STEP) * _STEP, most)
        lengths = samples.get("shortest"), samples.get("longest")
        return cls(max(1, samples.get("most_images", 1)), context, original, *lengths)

    def command(self, name: str) -> str:
        """The command: "vllm serve shop --max-model-len 4096 --limit-mm-per-prompt '{"image": 1}'" of "shop"."""
        limits = f"--max-model-len {self.context} --limit-mm-per-prompt '{{\"image\": {self.images}}}'"
        return f"vllm serve {shlex.quote(name)} {limits}"

    @property
    def caveat(self) -> str:
        """What is wrong with the command for samples on both sides of the original context; "" where nothing is."""
        if self.context <= self.original or self.shortest is None or self.shortest > self.original:
            return ""
        return (
            f"this run's samples have {self.shortest:,} to {self.longest:,} tokens, and beyond {self.original:,} vLLM "
            "gives rope's long factors to all requests: prompts up to that are answered otherwise than by phi3v; with "
            f"--max-model-len {self.original} they are not, and longer ones are refused"
        )


def version_note() -> str:
    """What is known of the vLLM that is there: "read against vLLM 0.33, and not run here" where there is none."""
    try:
        there = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return f"read against vLLM {READ}, and not run here"
    if there == READ or there.startswith(f"{READ}."):
        return f"read against vLLM {READ}, which is installed, and not run here"
    return f"read against vLLM {READ}, and {there} is installed: it may ask for other names or settings"
