"""The decoder's matrices in 4 bits (NF4 of bitsandbytes), made on the GPU one after the other."""

import torch
from torch import nn


def quantise(model: nn.Module) -> int:
    """Replaces each linear layer below `model.layers` by its 4-bit form; returns how many.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    replaced = 0
    for name, module in list(model.named_modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is not nn.Linear or ".layers." not in f".{name}." or "vision" in name:
                continue
            with torch.device("meta"):
                small = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=linear.weight.dtype,
                    quant_type="nf4",
                )
            weight = linear.weight.data
            small.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(weight.device)
            setattr(module, child, small)
            replaced += 1
    model.is_loaded_in_4bit = True  # what PEFT asks for
    return replaced
