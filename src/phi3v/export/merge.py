"""An adapter's tensors merged into the base's weights, one module at a time, each read from its file when it is due.

In come the files of a base and of an adapter, out come the merged weights by their names, in the model's order. The
sums are PEFT's own: each module is given its weights in float32 and wrapped by PEFT as the whole model would be,
merges, and is forgotten. So LoRA, DoRA, rank-stabilised scales, whole modules and decompositions of the base (pissa)
come out as in a loaded model, and no more than a module is in memory. Knows nothing about what is written where.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TrainableTokensConfig, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from phi3v.adapters import adapter_state, check_adapter, check_fit, load_adapter, works_on_prompts
from phi3v.errors import CheckpointError
from phi3v.targets import ADAPTER_WEIGHTS, Target, tensor_shapes

_PREFIX = "base_model.model."
"""In front of each name in an adapter's file."""
_TOKEN_ROWS = ".token_adapter."
"""In the names of single rows of an embedding."""


def module_of(name: str) -> str:
    """The module that a weight belongs to: "model.norm.weight" -> "model.norm"."""
    return name.rpartition(".")[0]


class Merger:
    """What an adapter does to the modules of its base.

    Args:
        model: the base on the meta device, which is changed.
        place: a target with an adapter.
    Raises: CheckpointError where the adapter does not fit the base, or is of a kind that nothing can be merged of.
    """

    def __init__(self, model: Any, place: Target) -> None:
        assert place.adapter is not None
        check_adapter(place.adapter)
        self.place = place
        self.file = place.adapter / ADAPTER_WEIGHTS
        self.leaves = {name: _leaf(module) for name, module in model.named_modules() if name}
        self.config = PeftConfig.from_pretrained(str(place.adapter))
        self.config.modules_to_save = None  # weights that are there whole are taken by their names
        if works_on_prompts(self.config):
            raise _no_weights(place, self.config)
        stored = tensor_shapes(self.file)
        self.of_module = _by_module(stored, self.leaves, place)
        tuned = load_adapter(model, place, on_meta=True)
        if not hasattr(tuned.base_model, "merge_and_unload"):
            raise _no_weights(place, self.config)
        check_fit(tuned, place, stored)

    def merge(self, module: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a module, by their full names, as they are with the adapter; in float32 where it has a part.

        Example: of `model.norm`, which LoRA leaves alone, {"model.norm.weight": w} gives back w itself.
        """
        if module not in self.of_module:
            return dict(weights)
        with safe_open(self.file, framework="pt") as file:
            own = {name: file.get_tensor(name) for name in self.of_module[module]}
        if (kept := f"{_PREFIX}{module}.base_layer.weight") in own:  # beside LoRA on an embedding: the base's, as it is
            own[f"{_PREFIX}{module}.weight"] = own.pop(kept)
        whole = {name: own.pop(_PREFIX + name, weight).float() for name, weight in weights.items()}
        if not own:
            return whole
        leaf = copy.deepcopy(self.leaves[module])
        for name, weight in whole.items():
            setattr(leaf, name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))
        root, (config, own) = _nest(module, leaf), self._alone(module, own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it would say about the tensors is checked below
            tuned = PeftModel(root, config).eval()
            set_peft_model_state_dict(tuned, own)
        if (found := {*adapter_state(tuned)}) != {*own}:
            raise CheckpointError(
                f"{self.file}: {min(found ^ {*own})} has no place in {module}; save it with peft again"
            )
        merged = tuned.merge_and_unload().get_submodule(module)
        return {name: getattr(merged, name.rpartition(".")[2]).detach() for name in weights}

    def _alone(self, module: str, own: dict[str, torch.Tensor]) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
        """The configuration and tensors by which PEFT takes one module.

        Rows of an embedding that LoRA's `trainable_token_indices` trains beside its own modules are an adapter of
        their own kind where they are alone.

        Example: "...embed_tokens.token_adapter.trainable_tokens_delta" -> "...embed_tokens.trainable_tokens_delta".
        """
        if not any(_TOKEN_ROWS in name for name in own):
            config = copy.deepcopy(self.config)
            config.trainable_token_indices = None
            return config, own
        rows = self.config.trainable_token_indices
        if isinstance(rows, dict):
            rows = next(at for name, at in rows.items() if f".{module}".endswith(f".{name}"))
        alone = TrainableTokensConfig(target_modules=[module], token_indices=rows, init_weights=False)
        return alone, {name.replace(_TOKEN_ROWS, "."): tensor for name, tensor in own.items()}


def _no_weights(place: Target, config: Any) -> CheckpointError:
    """The line for a kind of adapter that cannot be merged."""
    kind = config.peft_type.value if config.is_prompt_learning or not works_on_prompts(config) else "aLoRA"
    return CheckpointError(
        f"adapter {place.adapter} is of kind {kind}, which is no change of the weights: it cannot be "
        "merged, use --to adapter"
    )


def _by_module(stored: Mapping[str, Any], modules: Mapping[str, Any], place: Target) -> dict[str, list[str]]:
    """The adapter's tensors by the module of the base that they belong to, which is the deepest whose name fits.

    Example: "base_model.model.lm_head.lora_A.weight" -> {"lm_head": [that name]}.
    """
    found: dict[str, list[str]] = {}
    for name in stored:
        module = name.removeprefix(_PREFIX)
        while module and module not in modules:
            module = module_of(module)
        if not module or not name.startswith(_PREFIX):
            raise CheckpointError(f"adapter {place.adapter} does not fit {place.base}: it has no module for {name}")
        found.setdefault(module, []).append(name)
    return found


def _leaf(module: nn.Module) -> nn.Module:
    """A module without those below it, which have turns of their own."""
    if not any(True for _ in module.children()):
        return module
    alone = nn.Module()
    for name, weight in module.named_parameters(recurse=False):
        alone.register_parameter(name, weight)
    return alone


def _nest(path: str, leaf: nn.Module) -> nn.Module:
    """A module below others that do nothing, so that it has its full name: "model.norm" -> {model: {norm: leaf}}."""
    root = nn.Module()
    *above, last = path.split(".")
    place = root
    for name in above:
        place.add_module(name, nn.Module())
        place = place.get_submodule(name)
    place.add_module(last, leaf)
    return root


def merged_weights(
    names: list[str], files: Mapping[str, Path], merger: Merger | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights with their names, merged where there is an adapter.

    A file is opened for each module anew: what was read of it before is given back to the system.

    Args:
        names: the weights in the order in which they come out; those of a module lie together.
        files: where each of them lies.
        merger: what is merged; None for nothing.
    """
    for module, own in groupby(names, module_of):
        weights = {}
        for name in own:
            with safe_open(files[name], framework="pt") as file:
                weights[name] = check_finite(name, file.get_tensor(name), files[name])
        for name, weight in (merger.merge(module, weights) if merger else weights).items():
            merged = f"{name}, with the adapter added," if merger else name
            yield name, check_finite(merged, weight, merger.file if merger else files[name])


def check_finite(name: str, weight: torch.Tensor, file: Path) -> torch.Tensor:
    """The weight itself. Raises: CheckpointError where it holds NaN or infinity, which would answer with nothing.

    By least and largest, which are NaN where one is: no second tensor of its size is made.
    """
    if weight.is_floating_point() and weight.numel() and not all(end.isfinite() for end in weight.aminmax()):
        raise CheckpointError(
            f"{file}: {name} holds NaN or infinity, with which no answer comes: copy the file again, or train again"
        )
    return weight
