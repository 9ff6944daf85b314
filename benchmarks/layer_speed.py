"""How long 32 decoder layers with LoRA take on a GPU, forward and backward: PEFT's, compiled, hand-written, in FP8.

    python benchmarks/layer_speed.py --out benchmarks/layer_speed.json

One layer of Phi-3-Vision's width with random weights is called 32 times in a row (its weights, 226 MB, do not stay in a
cache), in bfloat16, LoRA r=16 on the four projections whose gradients are float32. Told are the time, how much of it
the host takes to say what is to be done, the memory above the weights, for hand-written layers the time of the same as
one CUDA graph, where nothing is launched one by one, and for FP8 (see `eight_bits.py`) how far results and gradients
are from bfloat16's after one layer and after 32. Then losses of four layers that learn to say a row of tokens twice:
bfloat16, the same on other samples, and FP8.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from floor import matrix_rate
from lora_layer import HEADS, INNER, PROJECTIONS, WIDTH
from peft import LoraConfig, get_peft_model
from results import machine, to_write, write
from transformers import Phi3Config, Phi3ForCausalLM

from phi3v.kernels.lora_layer import attach_fast_lora, detach_fast_lora, fast_lora_state

SHAPES = ((1, 807), (4, 807), (1, 2559), (4, 2559))
"""Rows and tokens."""
CALLS, STEPS = 32, 40


def make_model(layers: int, gradients: torch.dtype) -> Any:
    """Layers of full width under LoRA whose B is not zero, and the dtype of its gradients; seed 0."""
    config = Phi3Config(
        hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        num_hidden_layers=layers, vocab_size=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = Phi3ForCausalLM(config)
        options = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS)
        model = get_peft_model(base, options, autocast_adapter_dtype=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
        weight.data = weight.data.to(torch.bfloat16)
        if weight.requires_grad:
            weight.grad_dtype = gradients
    return model.train()


class Calls:
    """A layer called some times in a row over one input, and backward."""

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        self.model, self.layer = model, model.base_model.model.model.layers[0]
        self.hidden = torch.randn(rows, tokens, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_(True)
        turned = torch.rand(1, tokens, WIDTH // HEADS // 2, device="cuda").repeat(1, 1, 2)
        self.angles = turned.cos().bfloat16(), turned.sin().bfloat16()
        self.grad = torch.randn_like(self.hidden)

    def forward(self, calls: int = CALLS) -> torch.Tensor:
        """The result of the last call."""
        hidden = self.hidden
        for _ in range(calls):
            hidden = self.layer(hidden, attention_mask=None, position_embeddings=self.angles)
        return hidden

    def gradients(self, calls: int) -> dict[str, torch.Tensor]:
        """Result and gradients, by name."""
        self.model.zero_grad(set_to_none=True)
        self.hidden.grad = None
        result = self.forward(calls)
        result.backward(self.grad)
        assert self.hidden.grad is not None
        trained = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        return {"result": result.detach(), "input": self.hidden.grad, **trained}

    def timed(self, turns: int = 8) -> dict[str, float]:
        """Medians in milliseconds, and GiB above the weights."""
        whole: list[float] = []
        host: list[float] = []
        held = 0
        for turn in range(turns + 3):
            if turn == 3:
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.forward().backward(self.grad)
            told = time.perf_counter()
            torch.cuda.synchronize()
            whole.append(1e3 * (time.perf_counter() - began))
            host.append(1e3 * (told - began))
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
        middle = statistics.median
        return {"ms": round(middle(whole[3:]), 1), "host_ms": round(middle(host[3:]), 1), "gib": round(peak, 2)}

    def as_graph(self) -> float:
        """Milliseconds of the same as one CUDA graph."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.forward().backward(self.grad)
        torch.cuda.current_stream().wait_stream(aside)
        self.model.zero_grad(set_to_none=True)
        self.hidden.grad = None
        graph, times = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            self.forward().backward(self.grad)
        for _ in range(8):
            torch.cuda.synchronize()
            began = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        return round(statistics.median(times), 1)


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norms of differences over those of what was expected: result, input's gradient, mean of the adapters'."""
    far = {
        name: float((found[name].float() - value.float()).norm() / value.float().norm())
        for name, value in expected.items()
    }
    adapters = [error for name, error in far.items() if "lora_" in name]
    return {"result": round(far["result"], 4), "input": round(far["input"], 4), "adapters": round(
        statistics.mean(adapters), 4
    )}  # fmt: skip


def losses(eight_bits: bool, seed: int) -> list[float]:
    """Losses of LoRA steps of four hand-written layers, every fourth."""
    from eight_bits import in_eight_bits

    model = make_model(4, torch.bfloat16)
    assert attach_fast_lora(model) == 4
    inner = model.base_model.model
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    dice, told = torch.Generator(device="cuda").manual_seed(seed), []
    with contextlib.ExitStack() as stack:
        for step in range(STEPS + 1):
            ids = torch.randint(3, 64, (8, 64), generator=dice, device="cuda").repeat(1, 2)
            logits = inner.lm_head(inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, 63:-1]).float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 64:].flatten())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            told += [round(float(loss), 4)] if step % 4 == 0 else []
            if eight_bits and step == 0:
                stack.enter_context(in_eight_bits(model))
    return told


def measure(tell: Callable[[str, Any], None]) -> None:
    """Everything, told as it is measured."""
    from eight_bits import in_eight_bits

    model = make_model(1, torch.float32)
    layer = model.base_model.model.model.layers[0]
    for rows, tokens in SHAPES:
        calls = Calls(model, rows, tokens)
        shape = f"{rows} x {tokens}"
        tell(f"{shape} PEFT", calls.timed())
        assert attach_fast_lora(model) == 1
        tell(f"{shape} hand-written", {**calls.timed(), "as_one_graph_ms": calls.as_graph()})
        expected = {count: calls.gradients(count) for count in (1, CALLS)}
        with in_eight_bits(model):
            timed = calls.timed()
            far = {f"error_{count}": errors(calls.gradients(count), expected[count]) for count in expected}
        tell(f"{shape} hand-written, FP8", {**timed, **far})
        assert set(fast_lora_state(model).calls) == {"fast"}
        detach_fast_lora(model)
    layer.compile(dynamic=True)
    for rows, tokens in SHAPES:
        tell(f"{rows} x {tokens} PEFT, compiled", Calls(model, rows, tokens).timed())
    for name, eight_bits, seed in (("bfloat16", False, 1), ("bfloat16, other samples", False, 2), ("FP8", True, 1)):
        tell(f"losses {name}", losses(eight_bits, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=to_write, default=Path("layer_speed.json"), help="the .json file")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    rate = matrix_rate("cuda", torch.bfloat16)
    result: dict[str, Any] = {**machine(), "matrix_rate_1e12": round(rate / 1e12, 3), "measured": {}}

    def tell(name: str, values: Any) -> None:
        print(f"{name}: {json.dumps(values)}", flush=True)
        result["measured"][name] = values
        write(result, given.out)

    measure(tell)


if __name__ == "__main__":
    main()
