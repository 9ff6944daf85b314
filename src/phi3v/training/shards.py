"""Weights and optimisers that FSDP2 has cut over ranks, as whole tensors and back.

A checkpoint holds whole tensors under the names of a model that is not sharded, so that any number of ranks, sharded or
not, goes on from it. Making one whole is a collective: every rank has to ask for the same ones in the same order; the
first keeps them, on the CPU. Going back sends nothing: each rank cuts its own part out of the file. Knows no Trainer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from phi3v.adapters import adapter_state, has_adapter
from phi3v.errors import CheckpointError
from phi3v.targets import ADAPTER_WEIGHTS

_OF_ADAPTERS = (".lora_", ".modules_to_save.")


def shard_on_cpus(accelerator: Any, options: Mapping[str, Any]) -> None:
    """Has accelerate shard the models that it prepares, as it does by itself on GPUs.

    Args:
        accelerator: of several ranks on CPUs, which has prepared nothing.
        options: of accelerate's `FullyShardedDataParallelPlugin`.
    """
    plugin = FullyShardedDataParallelPlugin(**options)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP


def keep_sums_precise(accelerator: Any) -> None:
    """Has gradients of a short number type add up over ranks in float32, and the loss stay what it is; accelerate would
    round both.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, reduce_dtype=torch.float32)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has cut a model."""
    return isinstance(model, FSDPModule)


def whole(value: Any) -> Any:
    """A nested value with whole tensors, on the first rank; what others get is of no use."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def whole_number(value: Any) -> Any:
    """A norm over sharded gradients as a number that every rank has; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(model: nn.Module, *, float32: bool = False) -> dict[str, Any]:
    """The state of a model, of one with an adapter what belongs to that; `float32` makes all weights that type."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    state = {
        _plain_name(name): whole(tensor)
        for name, tensor in model.state_dict().items()
        if not has_adapter(model) or name in trained or any(part in name for part in _OF_ADAPTERS)
    }
    if float32:
        state = {
            name: one.float() if one is not None and one.is_floating_point() else one for name, one in state.items()
        }
    return state


def load_shards(model: nn.Module, folder: Path) -> None:
    """Gives a sharded model the weights of a checkpoint, an adapter or a whole model.

    Raises: CheckpointError where one that trains is not there.
    """
    adapter = folder / ADAPTER_WEIGHTS
    files = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    targets = adapter_state(model) if adapter.is_file() else model.state_dict()
    for name, target in targets.items():
        if _plain_name(name) not in found:
            raise CheckpointError(f"{folder} has no {name}: remove it to go on from the one before it")
        with torch.no_grad():
            target.copy_(_like(target, found[_plain_name(name)]))


def sharded_as(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The whole state of an optimiser, cut as its weights are; where they are whole, as it is."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, weights, strict=True))
    cut = {
        number: {
            name: _like(by_number[number], value)
            if isinstance(value, torch.Tensor) and value.shape == by_number[number].shape
            else value
            for name, value in of_weight.items()
        }
        for number, of_weight in state["state"].items()
    }
    return {**state, "state": cut}


def _like(target: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as `target` is, without asking other ranks."""
    if not isinstance(target, DTensor):
        return full
    full = full.to(target.device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)


def _plain_name(name: str) -> str:
    """The name of a weight without what FSDP's activation checkpointing puts into it."""
    return name.replace("._checkpoint_wrapped_module", "")
