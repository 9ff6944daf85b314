"""What one decoder layer with LoRA asks of a device, forward and backward: PEFT's way, compiled, and hand-written.

    python benchmarks/lora_layer.py [--out benchmarks/lora_layer.json]

Counted at full width for 2,559 tokens, nothing is timed: bytes that kernels read and write, kernel launches, and bytes
kept for the backward pass. The eager ways run on the meta device, where each operation reads its inputs and writes its
results once; attention stands in as one flash kernel each way, and each hand-written pass counts as the one kernel that
it is on a GPU. For the compiled way torch's compiler says what its kernels read and write after fusion; it compiles for
the CPU at two lengths, from which 2,559 is extrapolated, since bytes grow linearly with tokens.

"Predicted" puts the rates of an H200 (products 700e12 operations a second, attention 300e12 and 250e12, memory 3.7e12
bytes a second, 2.5 us a launch) over the counts. It is no measurement.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from peft import LoraConfig, get_peft_model
from results import to_write
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, Phi3Config, Phi3ForCausalLM
from transformers.initialization import no_init_weights

from phi3v.kernels import passes
from phi3v.kernels.lora_layer import attach_fast_lora, fast_lora_state

TOKENS, WIDTH, INNER, HEADS, RANK = 2559, 3072, 8192, 32, 16
PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PASSES = ("rms_norm", "rms_norm_backward", "rotate", "rotate_backward", "swiglu", "swiglu_backward", "scale_all")
FREE = set(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias split split_with_sizes "
    "as_strided unbind chunk empty empty_like new_empty empty_strided new_empty_strided narrow reshape".split()
)
WEIGHTS = WIDTH * 3 * WIDTH + WIDTH * WIDTH + 3 * INNER * WIDTH
ADAPTERS = RANK * (4 * WIDTH + 2 * WIDTH + WIDTH + 2 * INNER + INNER + WIDTH)


class Counter(TorchDispatchMode):
    """Bytes and launches of what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.launches, self.seconds = 0, 0, 0.0

    def kernel(self, moved: int, operations: float = 0.0, rate: float = 700e12) -> None:
        """One launch."""
        self.bytes += moved
        self.launches += 1
        self.seconds += max(operations / rate, moved / 3.7e12, 2.5e-6)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in FREE:
            return made
        given = tensors(args)  # what is given as out= is made, not read
        moved = spans(given[:2]) if name == "copy_" else spans(given) + spans(tensors(made))
        operations = 0.0
        if name in ("mm", "addmm", "addmm_"):
            left, right = given[-2:]
            operations = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        self.kernel(moved, operations)
        return made


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def spans(values: list[torch.Tensor]) -> int:
    """Bytes that tensors touch, expanded dimensions once."""
    total = 0
    for tensor in values:
        count = tensor.element_size()
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else 1
        total += count
    return total


class Flash(torch.autograd.Function):
    """Causal attention as one kernel each way, on shapes alone."""

    counter: Counter | None = None

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, made, query.new_empty(query.shape[:3], dtype=torch.float32))
        if Flash.counter:
            Flash.counter.kernel(4 * spans([query]), attention_operations(), 300e12)
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        if Flash.counter:
            Flash.counter.kernel(8 * spans([query]), 2.5 * attention_operations(), 250e12)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention_operations() -> float:
    """Of the forward pass: two products over half a square."""
    return 2.0 * TOKENS * TOKENS * WIDTH


def attention_on_shapes(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    return Flash.apply(query, key, value).transpose(1, 2), None


def make_layer(device: str, *, dropout: float = 0.0, adapters: torch.dtype = torch.bfloat16) -> Any:
    """A model of one layer under LoRA, bfloat16."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
    names = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Phi3Config(**sizes, **names, num_key_value_heads=HEADS, num_hidden_layers=1)
    with no_init_weights(), torch.device(device):
        base = Phi3ForCausalLM(config).to(torch.bfloat16)
        options = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=dropout, target_modules=PROJECTIONS)
        model = get_peft_model(base, options, autocast_adapter_dtype=False).train()
    if device == "meta":
        AttentionInterface.register("on_shapes", attention_on_shapes)
        base.config._attn_implementation = "on_shapes"
    for weight in model.parameters():
        weight.data = weight.data.to(adapters) if weight.requires_grad else weight.data
    return model


def run(model: Any, tokens: int) -> int:
    """A forward and a backward pass of the layer; bytes kept in between, weights aside."""
    layer = model.base_model.model.model.layers[0]
    device = next(model.parameters()).device
    hidden = torch.zeros(1, tokens, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=True)
    angles = torch.zeros(1, tokens, WIDTH // HEADS, dtype=torch.bfloat16, device=device)
    own = {weight.untyped_storage()._cdata for weight in model.parameters()} | {angles.untyped_storage()._cdata}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(hidden, attention_mask=None, position_embeddings=(angles, angles))
    result.backward(torch.zeros_like(result))
    return sum(kept.values())


@contextmanager
def one_kernel_each(counter: Counter) -> Iterator[None]:
    """Hand-written passes count as one kernel: what is given is read or written once, what is made is written."""

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            with _disable_current_modes():
                made = function(*args)
            # queries and keys, two thirds of the matrix, are read and written in place
            moved = spans(tensors(args)) + spans(tensors(made)) if name != "rotate" else 4 * spans([args[0]]) // 3
            counter.kernel(moved)
            return made

        return call

    replaced = {name: counted(name, getattr(passes, name)) for name in PASSES}
    with patch.multiple(passes, **replaced):
        yield


def count_eager(model: Any) -> dict[str, float]:
    """Counts on the meta device."""
    run(model, TOKENS)  # base weights are widened once, not in each step
    model.zero_grad(set_to_none=True)
    counter = Counter()
    Flash.counter = counter
    with one_kernel_each(counter), counter:
        kept = run(model, TOKENS)
    Flash.counter = None
    return table_row(counter.bytes, counter.launches, kept, counter.seconds)


def count_hand_written(dropout: float) -> dict[str, float]:
    """Counts of the hand-written layer, which says that it ran."""
    model = make_layer("meta", dropout=dropout)
    assert attach_fast_lora(model, force=True) == 1
    row = count_eager(model)
    assert fast_lora_state(model).calls == {"fast": 2}
    return row


def count_compiled() -> dict[str, float]:
    """What torch's compiler says of its own kernels, at two lengths, and the line through both."""
    from torch._inductor import compile_fx, config, metrics
    from torch._inductor.async_compile import AsyncCompile

    def not_built(*given: Any, **how: Any) -> Any:
        """A kernel that does nothing: its results are not looked at, and C++ takes minutes to compile."""
        return lambda *tensors: None

    found = []
    for tokens in (32, 64):
        torch.compiler.reset()
        metrics.reset()
        model = make_layer("cpu")
        model.base_model.model.model.layers[0].compile(dynamic=False)
        # the compiler sums up what it moves where somebody listens to that log
        log = patch.object(compile_fx, "inductor_metrics_log", MagicMock())
        with config.patch(force_disable_caches=True), log, patch.object(AsyncCompile, "cpp_pybinding", not_built):
            kept = run(model, tokens)
        launches = sum(1 for _, size in metrics.nodes_num_elem if size)  # views and second results are none
        found.append((metrics.num_bytes_accessed, launches, kept))
    short, long = found
    steps = (TOKENS - 32) / 32
    moved, kept = (short[place] + steps * (long[place] - short[place]) for place in (0, 2))
    # products at their rate; everything beyond their own bytes at that of memory
    products = 2 * product_bytes()
    seconds = product_seconds() + max(moved - products, 0) / 3.7e12
    return table_row(moved, long[1], kept, seconds)


def product_bytes() -> int:
    """Bytes of the frozen products in one direction: weights, inputs and results once."""
    widths = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * INNER), (INNER, WIDTH)]
    return 2 * WEIGHTS + sum(2 * TOKENS * (inputs + outputs) for inputs, outputs in widths) + 6 * 2 * TOKENS * WIDTH


def product_seconds() -> float:
    """Frozen products both ways, and attention, at their rates."""
    attention = attention_operations() * (1 / 300e12 + 2.5 / 250e12)
    return 2 * 2.0 * TOKENS * WEIGHTS / 700e12 + attention


def table_row(moved: float, launches: int, kept: float, seconds: float) -> dict[str, float]:
    return {
        "megabytes": round(moved / 1e6),
        "launches": launches,
        "kept_kib_per_token": round(kept / TOKENS / 1024, 1),
        "predicted_us": round(seconds * 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=to_write, help="a .json file")
    given = parser.parse_args()
    ways = {
        "PEFT, float32 adapters": lambda: count_eager(make_layer("meta", adapters=torch.float32)),
        "PEFT, bfloat16 adapters": lambda: count_eager(make_layer("meta")),
        "hand-written": lambda: count_hand_written(0.0),
        "hand-written, dropout": lambda: count_hand_written(0.05),
        "PEFT, bfloat16 adapters, torch.compile": count_compiled,
    }
    rows: dict[str, dict[str, float]] = {}
    print("| way | MB moved | launches | kept, KiB a token | predicted us |\n|---|---|---|---|---|")
    for name, count in ways.items():
        rows[name] = count()
        print(f"| {name} | " + " | ".join(str(value) for value in rows[name].values()) + " |", flush=True)
    least, floor = 2 * product_bytes() / 1e6, product_seconds() * 1e6
    print(f"| floor: products and attention alone | {least:.0f} | | | {floor:.0f} |")
    if given.out:
        given.out.write_text(json.dumps({"torch": torch.__version__, "tokens": TOKENS, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
