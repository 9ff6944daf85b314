"""A base as shapes alone: the modules and number types that `loading.load_base` would load, on the meta device.

In come a config and plain values, out comes a model without contents, to count what it would take. No file is read.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.quantizers.quantizers_utils import should_convert_module

from phi3v.errors import ConfigError
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one of their own."""


def meta_base(
    config: Any, *, dtype: torch.dtype, attention: str = "sdpa", quantization: BitsAndBytesConfig | None = None
) -> Any:
    """A Phi-3-V on the meta device.

    Args:
        config: its sizes.
        dtype: number type of its weights.
        attention: name of transformers' attention.
        quantization: replaces the matrices that bitsandbytes would replace by their 4-bit or 8-bit form.
    Raises: ConfigError for a kind of quantisation whose sizes are not known.
    """
    with no_init_weights(), torch.device("meta"):
        model: Any = Phi3VForCausalLM._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
        for module in model.modules():  # tables that no file holds stay real under meta
            for name, table in list(module.named_buffers(recurse=False)):
                setattr(module, name, table.to("meta"))
        if quantization is not None:
            _quantise(model, quantization)
    return model


def _quantise(model: Any, quantization: BitsAndBytesConfig) -> None:
    """Gives matrices their 4-bit form; what is left out is what loading leaves out."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    if not quantization.load_in_4bit:
        raise ConfigError("quantization: what 8-bit layers take is not counted; plan for load_in_4bit, or without")
    skipped = list(quantization.llm_int8_skip_modules or [])
    sizes = {name: module.weight.shape for name, module in model.named_modules() if type(module) is nn.Linear}
    replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=quantization)
    for name, module in model.named_modules():
        if name in sizes and should_convert_module(name, skipped):
            module.weight = _four_bits(sizes[name], module, quantization)
            module.quant_state = module.weight.quant_state
    model.is_loaded_in_4bit, model.is_quantized = True, True


def _four_bits(shape: torch.Size, module: Any, quantization: BitsAndBytesConfig) -> Any:
    """A matrix of a shape as bitsandbytes stores it: two weights in a byte, a scale for each 64 weights.

    Example: 16 x 64 weights in NF4 without nested scales take 512 bytes and 16 scales of 4.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    count = shape.numel()
    blocks = -(-count // _BLOCK)
    kind = quantization.bnb_4bit_quant_type
    state2, offset = None, None
    scales = torch.empty(blocks)
    if quantization.bnb_4bit_use_double_quant:
        scales, offset = torch.empty(blocks, dtype=torch.uint8), torch.empty(())
        state2 = QuantState(
            torch.empty(-(-blocks // _NESTED_BLOCK)),
            code=torch.empty(256),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = QuantState(
        scales,
        shape=shape,
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type=kind,
        dtype=quantization.bnb_4bit_compute_dtype,
        offset=offset,
        state2=state2,
    )
    return Params4bit(
        torch.empty(-(-count // 2), 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=kind,
        bnb_quantized=True,
        module=module,
    )
