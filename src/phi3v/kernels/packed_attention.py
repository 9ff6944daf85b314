"""Attention of packed rows: each sample attends to itself alone, and no mask of the whole row is made.

In come a row `[1, T]` of several samples, `cu_seqlens` (int32, where each begins and the last ends) and `max_seqlen`;
they reach an attention function of transformers as keyword arguments of the model's `forward`. Any attention of
transformers gives the same: it reads the borders off positions that restart at 0 and makes a mask `[T, T]` of them.
What is attached here does without that mask:

| `attn_implementation` | what a pack goes through |
|---|---|
| sdpa, on a GPU of compute capability 8.0 in bfloat16 or float16 | `torch.nn.attention.varlen`, torch 2.10 or newer |
| the same, of 9 or 10, with the extra `flash`, where layers are not compiled | FlashAttention 4, from 4,096 tokens on |
| sdpa, anywhere else | sdpa for one sample after the other |
| flash_attention_2, _3, _4 | the package's own kernel for several lengths, which transformers calls |
| flex_attention | transformers' block mask |
| eager | transformers' mask |

A row without `cu_seqlens` goes the plain way: sdpa as transformers calls it. Knows no collators, adapters or trainers.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from phi3v.model.modeling_phi3_v import Phi3VModel

FLASH_4 = "phi3v_packed_fa4"
"""Name of the attention with FlashAttention 4's kernel for all samples of a row; transformers keeps names with "flash"
to its own."""

VARLEN = "phi3v_packed_varlen"
"""Name of the attention with torch's kernel for all samples of a row, FlashAttention 2."""

SLICES = "phi3v_packed_slices"
"""Name of the attention that takes one sample after the other."""

MANY = 4096
"""Tokens of a pack from which FlashAttention 4 gains more than it costs: it is launched from Python, and a step of few
waits for the host (4 x 857 tokens on one H200: 29.0 samples/s with it, 30.3 with torch's kernel).
"""

_HALF = (torch.bfloat16, torch.float16)
_MOST_HEAD_SIZE = 256
_FLASH_ARGUMENTS = frozenset(
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale".split()
)

Kernel = Callable[..., torch.Tensor]


def attach_packed_attention(model: nn.Module, *, compiled: bool = False) -> str:
    """Lets packed rows of a model go through the fastest attention that its device and its choice of attention allow.

    The tower keeps its own attention. Attaching twice is attaching once.

    Args:
        model: a Phi-3-V, or a PeftModel around one, on the device that it trains on.
        compiled: the decoder's layers are compiled, which FlashAttention 4 would cut in two: with few tokens that costs
            more than it gains, so torch's kernel is taken.
    Returns: the name of the attention: `FLASH_4`, `VARLEN`, `SLICES`, or the model's own, which then stays.
    """
    (decoder,) = (module for module in model.modules() if isinstance(module, Phi3VModel))
    config: Any = decoder.config
    chosen = str(config._attn_implementation)
    if chosen in (FLASH_4, VARLEN, SLICES) or config.sliding_window is not None:
        return chosen
    if chosen.startswith("flash_attention"):
        decoder.register_forward_pre_hook(_name_for_flash, with_kwargs=True)
    if chosen != "sdpa":
        return chosen
    name, kernel = fastest_kernel(decoder.embed_tokens.weight.device, compiled=compiled)
    AttentionInterface.register(name, partial(packed_attention, kernel=kernel))
    AttentionMaskInterface.register(name, sdpa_mask)
    decoder.set_attn_implementation({"": name, "vision_config": config.vision_config._attn_implementation})
    decoder.register_forward_pre_hook(_make_no_mask, with_kwargs=True)
    return name


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: Kernel | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    borders: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in the form that transformers' AttentionInterface asks for.

    Args:
        module: the attention layer.
        query: `[1, heads, T, head size]`, rotated.
        key: `[1, key heads, T, head size]`.
        value: as `key`.
        attention_mask: of rows without `cu_seqlens`.
        kernel: what `fastest_kernel` gave; None takes slices.
        dropout: on attention weights; the kernel has none, so with it slices are taken.
        scaling: of scores.
        cu_seqlens: `[0, 3, 5]` for samples of 3 and 2 tokens.
        max_seqlen: tokens of the longest sample.
        borders: `cu_seqlens` on the CPU, where slices are taken; they are brought there where it is None.
    Returns: `[1, T, heads, head size]`, and no weights.
    """
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1, "a pack is one row"
    dtype = _autocast_dtype(query.device)
    if dtype is not None:  # rope leaves float32 queries beside values in half precision
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size = query.shape[-1]
    if kernel is None or dropout or query.dtype not in _HALF or size % 8 or size > _MOST_HEAD_SIZE:
        borders = cu_seqlens if borders is None else borders
        return _uncompiled_slices(module, query, key, value, borders, dropout, scaling), None
    groups = query.shape[1] // key.shape[1]
    # squeezed, not indexed: the gradient of an index is a copy into zeros
    rows = [part.squeeze(0).transpose(0, 1) for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    return kernel(*rows, cu_seqlens, max_seqlen, scaling)[None], None


@torch.compiler.disable
def _uncompiled_slices(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """`by_slices` between the compiled parts of a layer, which would be compiled again for each number of samples."""
    return by_slices(module, query, key, value, borders.diff().tolist(), dropout=dropout, scaling=scaling)


def by_slices(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    *,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """One call of sdpa for each sample: `[1, heads, T, head size]` to `[1, T, heads, head size]`.

    Example: lengths [3, 2] attend over positions 0 to 2 and 3 to 4, each causally and without a mask.
    """
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat(
        [sdpa_attention_forward(module, *part, None, dropout=dropout, scaling=scaling)[0] for part in parts], dim=1
    )


def fastest_kernel(device: torch.device, *, compiled: bool = False) -> tuple[str, Kernel | None]:
    """The name and the kernel of packed attention on a device; `(SLICES, None)` where there is no kernel for it."""
    if not compiled and _runs_flash_4(device) and (kernel := flash_4_kernel()) is not None:
        few = varlen_kernel()
        return FLASH_4, kernel if few is None else by_tokens(few, kernel)
    if _runs_varlen(device) and (kernel := varlen_kernel()) is not None:
        return VARLEN, kernel
    return SLICES, None


def by_tokens(few: Kernel, many: Kernel) -> Kernel:
    """One kernel of two: `few` for packs of less than `MANY` tokens, `many` for the others.

    Example: queries `[4095, heads, size]` go to `few`, `[4096, heads, size]` to `many`.
    """

    def attend(query: torch.Tensor, *args: Any) -> torch.Tensor:
        return (few if query.shape[0] < MANY else many)(query, *args)

    return attend


def flash_4_kernel() -> Kernel | None:
    """FlashAttention 4 with the arguments of `varlen_kernel`'s; None where `phi3v[flash]` is not installed.

    Its own function and not `torch.nn.attention.activate_flash_attention_impl`, which changes sdpa for the whole
    process. Deterministic where torch is told to be.
    """
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:  # also that of an older flash_attn, which has no such part
        return None
    # said once for each kernel that it compiles, by the compiler that it brings, about its own code
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)

    @torch.compiler.disable  # no operator of torch: a compiled layer is cut here, and not traced through its compiler
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scaling: float | None,
    ) -> torch.Tensor:
        attended: Any = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scaling,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended[0] if isinstance(attended, tuple) else attended

    return attend


def varlen_kernel() -> Kernel | None:
    """`torch.nn.attention.varlen` as a function of queries, keys, values `[T, heads, head size]`, borders, the longest
    sample and the scale of scores; None where this torch has none.

    Its arguments changed: causal is `is_causal` in torch 2.10 and a window without a right side later, and not each of
    them takes the scale. Where torch's own operator behind it takes what is known here, that is called itself.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if (direct := flash_operator()) is not None:
        return direct
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    takes_scale = "scale" in known

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scaling: float | None,
    ) -> torch.Tensor:
        own = query.shape[-1] ** -0.5
        wanted = own if scaling is None else scaling
        options = {**causal, "scale": wanted} if takes_scale else causal
        if not takes_scale and wanted != own:
            query = query * (wanted / own)
        attended: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        return attended

    return attend


def flash_operator() -> Kernel | None:
    """The operator that `torch.nn.attention.varlen` calls, as `varlen_kernel` gives it; None where this torch has it
    under another name or with other arguments.

    Same kernels, same numbers. varlen's is an operator written in Python around it, with a backward pass registered in
    Python: 0.4 ms a layer, for which a step of few tokens waits.
    """
    operator: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None or not {it.name for it in operator.default._schema.arguments} >= _FLASH_ARGUMENTS:
        return None

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scaling: float | None,
    ) -> torch.Tensor:
        borders = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        # no dropout, causal, no mask to look at
        attended: torch.Tensor = operator(query, key, value, *borders, 0.0, True, False, scale=scaling)[0]
        return attended

    return attend


def _runs_flash_4(device: torch.device) -> bool:
    """Whether FlashAttention 4 has both passes for it: data-centre GPUs of compute capability 9 and 10."""
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )


def _runs_varlen(device: torch.device) -> bool:
    """Whether the kernel runs there: on GPUs of compute capability 8.0, and on the meta device, where it is counted."""
    if device.type == "meta":
        return True
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The number type of mixed precision where it is on; the meta device has none, and refuses the question."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _make_no_mask(
    decoder: Phi3VModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Keeps transformers from making a mask of a pack, and from waiting for the device to see whether it is one.

    A mask of four dimensions is handed on as it is: here an empty one, which `packed_attention` does not read.
    """
    cu_seqlens = kwargs.get("cu_seqlens")
    if cu_seqlens is None:
        return None
    more: dict[str, Any] = {"attention_mask": torch.empty(1, 1, 1, 1, device=cu_seqlens.device)}
    weight = decoder.embed_tokens.weight
    half = (_autocast_dtype(weight.device) or weight.dtype) in _HALF
    if decoder.config._attn_implementation == SLICES or not half:
        more["borders"] = cu_seqlens.cpu()  # once for all layers: on a GPU it waits
    return args, {**kwargs, **more}


def _name_for_flash(
    decoder: Phi3VModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Gives the borders the names under which transformers hands them to FlashAttention."""
    borders, longest = kwargs.get("cu_seqlens"), kwargs.get("max_seqlen")
    if borders is None:
        return None
    names = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    return args, {**kwargs, **names}
