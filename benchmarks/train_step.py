"""How fast a training step is, and how much memory it takes, beside the other ways of doing it; one call, one device.

    python benchmarks/train_step.py step   --out benchmarks/train_step     # all ways at three shapes, about 5 minutes
    python benchmarks/train_step.py memory --out benchmarks/train_memory   # largest batch in 8, 12 and 24 GiB
    python benchmarks/train_step.py long   --out benchmarks/train_long     # 128K tokens, LoRA at 32K

Phi-3-Vision's full size with random weights, bfloat16, LoRA r=16 on all projections of the decoder; forward,
backward, clipping and AdamW. `--quick` tries a program on the CPU with a tiny model: its figures mean nothing. The
floor of a step is its least arithmetic (`phi3v.training.floor`) over the rate of a large matrix product, measured in
the same call. Lines appear as they are measured, and the JSON is written after each. Past `--minutes` what is left is
skipped, with a line. `--ways` measures some of them, and `--add FILE` puts the lines of an earlier call on the same
kind of card and versions beside them, each with where it comes from (`of`).
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from count import SHAPES, TEXT, TRAINED, Grid
from floor import matrix_rate
from measure import Measured, measure_if_it_fits, release
from ours import Parts, paths_of
from results import draw_bars, machine, to_write, write
from sizes import config_of, image_tokens, make_example
from ways import WAYS, make_way

from phi3v.training.floor import useful_operations

ORDER = (
    *("ours", "ours-lean", "peft16", "peft", "guide", "ours-padded", "ours-eager"),
    *("ours-compiled", "compiled", "liger", "compiled-liger"),
)
"""What is compiled comes late: it takes longest to begin; Liger last: its rope, once there, stays in transformers."""
QUICK_SHAPES: dict[str, list[Grid]] = {"2509": [(1, 2)] * 2, "757": [(1, 1)] * 2, "mixed": [(1, 2), (1, 1)]}


@dataclass
class Bench:
    """One call of this program.

    Attributes:
        given: its arguments.
        device: cpu or cuda.
        config: the model's.
        dtype: of the base.
        rate: operations a second of a large matrix product.
        result: what is written.
        until: when no new measurement is begun.
    """

    given: argparse.Namespace
    device: str
    config: Any
    dtype: torch.dtype
    rate: float
    result: dict[str, Any]
    until: float
    bars: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, given: argparse.Namespace) -> "Bench":
        """Chooses the device and measures its rate."""
        warnings.simplefilter("ignore")
        if not given.quick and not torch.cuda.is_available():
            raise SystemExit("no GPU here: --quick tries this program with a tiny model on the CPU")
        device = "cpu" if given.quick else "cuda"
        dtype = torch.float32 if given.quick else torch.bfloat16
        rate = matrix_rate(device, dtype, side=512 if given.quick else None)
        result = {**machine(), "quick": given.quick, "matrix_rate_1e12": round(rate / 1e12, 3), "lines": []}
        print(f"{result['device']}, torch {result['torch']}, {dtype}, matrix product {rate / 1e12:.1f}e12 a second")
        if given.quick:
            print("--quick: a tiny model on a CPU; no figure below means anything")
        config = config_of("tiny" if given.quick else "full")
        bench = cls(given, device, config, dtype, rate, result, time.monotonic() + 60 * given.minutes)
        if getattr(given, "add", None):
            bench.add(json.loads(given.add.read_text(encoding="utf-8")))
        return bench

    def add(self, earlier: dict[str, Any]) -> None:
        """Takes the lines of an earlier call in, except those of ways that this one measures.

        Each says which call it is of: `{"of": {"date": ..., "command": ...}, "shape": "757", "way": "peft", ...}`. A
        line that the earlier call had added keeps what it said.
        """
        same = ("device", "torch", "transformers", "peft", "quick")
        if differing := [name for name in same if earlier[name] != self.result[name]]:
            raise SystemExit(f"{self.given.add} was measured with another {differing[0]}")
        call = {name: earlier[name] for name in ("date", "command", "matrix_rate_1e12")}
        for line in earlier["lines"]:
            if "way" in line and line["way"] not in self.given.ways:
                self.result["lines"].append({"of": call, **line})
                if "samples/s" in line:
                    self.bars.setdefault(f"{line['shape']}: samples/s", {})[line["way"]] = line["samples/s"]

    def late(self, what: str) -> bool:
        """Whether the time is over; says what is skipped."""
        if time.monotonic() < self.until:
            return False
        self.line({"what": what, "skipped": f"{self.given.minutes:g} minutes are over"})
        return True

    def line(self, values: dict[str, Any]) -> None:
        """Prints and writes one line."""
        print("  ".join(f"{key} {value}" for key, value in values.items() if value not in ("", None)), flush=True)
        self.result["lines"].append(values)
        write(self.result, self.given.out)

    def floor_seconds(self, grids: list[Grid], text: int) -> float:
        """The floor of a step over one sample for each grid."""
        return sum(
            useful_operations(
                self.config,
                tokens=image_tokens(grid) + text,
                image=image_tokens(grid),
                crops=grid[0] * grid[1] + 1,
                trained=min(TRAINED, text - 3),
            )
            / self.rate
            for grid in grids
        )


def examples_of(bench: Bench, shape: str) -> tuple[list[dict[str, torch.Tensor]], list[Grid], int]:
    """Samples of a shape, their grids, and text tokens of each; "mixed" are four of each grid, shuffled."""
    quick = bench.given.quick
    grids = (QUICK_SHAPES if quick else SHAPES)[shape]
    if shape == "mixed":
        order = torch.randperm(4 * len(grids), generator=torch.Generator().manual_seed(0)).tolist()
        grids = [(grids * 4)[place] for place in order]
    text, trained = (20, 6) if quick else (TEXT, TRAINED)
    made = [make_example(bench.config, [g], text=text, trained=trained, seed=n) for n, g in enumerate(grids)]
    return made, grids, text


def step(bench: Bench) -> None:
    """All ways at all shapes."""
    samples = {shape: examples_of(bench, shape) for shape in bench.given.shapes}
    for name in bench.given.ways:
        if bench.late(name):
            continue
        try:
            step_of(bench, name, samples)
        except Exception as error:  # others' kernels and compilers: one that breaks is a line, the rest goes on
            bench.line({"way": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"})
        release()
    compare(bench)


def step_of(bench: Bench, name: str, samples: dict[str, tuple[list, list[Grid], int]]) -> None:
    """One way at all shapes."""
    way = make_way(name, bench.config, device=bench.device, dtype=bench.dtype)
    for shape, (examples, grids, text) in samples.items():
        if bench.late(f"{name} {shape}"):
            continue
        micro_batch, measured = largest_that_fits(bench, way, examples)
        floor = bench.floor_seconds(grids, text)
        note = "; ".join(filter(None, [way.note, paths_of(way.model) if name.startswith("ours") else ""]))
        bench.line(values_of(shape, name, micro_batch, measured, floor, note))
        if measured:
            bench.bars.setdefault(f"{shape}: samples/s", {})[name] = measured.rate


def largest_that_fits(bench: Bench, way: Any, examples: list) -> tuple[int, Measured | None]:
    """Measured with micro-batches of 4, or 2, or 1: the first that fits into memory."""
    how = {"most_seconds": bench.given.seconds, "warm_seconds": 0.0 if bench.given.quick else 2.0}
    for micro_batch in (4, 2, 1):
        measured = measure_if_it_fits(way, examples, micro_batch, bench.device, **how)
        if measured is not None:
            return micro_batch, measured
    return 0, None


def values_of(
    shape: str, way: str, micro_batch: int, measured: Measured | None, floor: float, note: str
) -> dict[str, Any]:
    """One line of the result."""
    if measured is None:
        return {"shape": shape, "way": way, "failed": "out of memory with one sample", "note": note}
    values = asdict(measured)
    return {
        "shape": shape,
        "way": way,
        "samples/s": round(measured.rate, 3),
        "of the floor": round(floor / measured.seconds, 3),
        "peak_gib": round(values.pop("peak_gib"), 2),
        "micro_batch": micro_batch,
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()},
        "note": note,
    }


def compare(bench: Bench) -> None:
    """Our default beside the faster (b), the faster (c) and our own padded run, where both were measured."""
    for name, bars in bench.bars.items():
        plain = max((bars[way] for way in ("peft", "peft16") if way in bars), default=None)
        compiled = max((bars[way] for way in ("compiled", "compiled-liger", "liger") if way in bars), default=None)
        ours = bars.get("ours")
        for other, rate in (("ours / (b)", plain), ("ours / (c)", compiled)):
            if rate and ours:
                bench.line({"shape": name.split(":")[0], other: round(ours / rate, 3)})
        if ours and "ours-padded" in bars:
            ratio = round(ours / bars["ours-padded"], 3)
            bench.line({"shape": name.split(":")[0], "ours packed / padded": ratio})
    draw_bars(bench.bars, "samples/s, full size, LoRA r=16", bench.given.out)


def memory(bench: Bench) -> None:
    """The largest batch and samples/s when the card had so many GiB; LoRA and QLoRA, plain and checkpointed."""
    quick = bench.given.quick
    grid, text = ((1, 1), 20) if quick else ((4, 4), TEXT)
    card = 0 if quick else torch.cuda.get_device_properties(0).total_memory
    made = [make_example(bench.config, [grid], text=text, trained=6, seed=seed) for seed in range(32)]
    for quantized in (False, True) if not quick else (False,):
        for checkpointing in (False, True):
            label = f"{'QLoRA' if quantized else 'LoRA'}{', checkpointed' if checkpointing else ''}"
            if bench.late(label):
                continue
            parts = Parts(checkpointing=checkpointing, quantized=quantized, fast_lora=not quantized, compiled=False)
            try:
                way = make_way("ours", bench.config, device=bench.device, dtype=bench.dtype, parts=parts)
            except ModuleNotFoundError as error:
                bench.line({"what": label, "skipped": f"{error.name} is not installed"})
                continue
            for cap in bench.given.caps:
                if not bench.late(f"{label} in {cap} GiB"):
                    if card:
                        release()
                        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / card))
                    fill_card(bench, way, made, label, cap)
            if card:
                torch.cuda.set_per_process_memory_fraction(1.0)
            del way
            release()
    draw_bars(bench.bars, "samples/s at the best batch that fits", bench.given.out)


def fill_card(bench: Bench, way: Any, made: list, label: str, cap: float) -> None:
    """The largest batch of one sample shape by trying, and samples/s of it and of the next smaller one."""
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)[: 2 if bench.given.quick else None]
    rates: dict[int, Measured] = {}
    low, high = 0, len(sizes)  # sizes before `low` fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        batch = sizes[middle]
        tried = measure_if_it_fits(way, made[:batch], batch, bench.device, warm=1, most_seconds=0.0, least=1)
        low, high = (middle + 1, high) if tried else (low, middle)
    for batch in sizes[max(0, low - 2) : low]:
        measured = measure_if_it_fits(way, made[:batch], batch, bench.device, warm=1, most_seconds=0.0)
        if measured:
            rates[batch] = measured
    values: dict[str, Any] = {"what": label, "gib": cap, "largest batch": sizes[low - 1] if low else 0}
    if rates:
        best = max(rates, key=lambda batch: rates[batch].rate)
        fastest = rates[best]
        values |= {"best batch": best, "samples/s": round(fastest.rate, 3), "peak_gib": round(fastest.peak_gib, 2)}
        bench.bars.setdefault(f"{cap:g} GiB: samples/s", {})[f"ours, {label}"] = fastest.rate
    bench.line({**values, "note": way.note})


def long(bench: Bench) -> None:
    """One forward and generation at 128K tokens, LoRA at 32K; seconds and peaks."""
    quick = bench.given.quick
    most, trained_length, grid = (1024, 512, (1, 1)) if quick else (131072, 32768, (4, 4))
    forward_and_generate(bench, long_example(bench.config, most - 16, grid))
    release()
    if bench.late("LoRA"):
        return
    parts = Parts(checkpointing=True, compiled=False)
    way = make_way("ours", bench.config, device=bench.device, dtype=bench.dtype, parts=parts)
    example = long_example(bench.config, trained_length, grid)
    tokens = len(example["input_ids"])
    measured = measure_if_it_fits(way, [example], 1, bench.device, warm=1, most_seconds=0.0)
    if measured is None:
        bench.line({"what": "LoRA, checkpointed", "tokens": tokens, "failed": "out of memory", "note": way.note})
        return
    values = {"seconds": round(measured.seconds, 3), "peak_gib": round(measured.peak_gib, 2)}
    bench.line({"what": "LoRA, checkpointed", "tokens": tokens, **values, "note": way.note})


def long_example(config: Any, tokens: int, grid: Grid) -> dict[str, torch.Tensor]:
    """A conversation of so many tokens: images of one grid in about nine tenths of it, text for the rest."""
    images = int(0.9 * tokens) // image_tokens(grid)
    return make_example(config, [grid] * images, text=tokens - images * image_tokens(grid), trained=36)


def forward_and_generate(bench: Bench, example: dict[str, torch.Tensor]) -> None:
    """The base alone: what is answered after training."""
    from sizes import build

    from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

    model = build(Phi3VForCausalLM, bench.config, device=bench.device, dtype=bench.dtype, attention="sdpa").eval()
    names = ("input_ids", "attention_mask")
    inputs = {name: example[name][None].to(bench.device) for name in names}
    inputs |= {"pixel_values": example["pixel_values"].to(bench.device), "image_sizes": example["image_sizes"]}
    tokens = inputs["input_ids"].shape[1]

    def forward() -> None:
        model(**inputs, use_cache=False, logits_to_keep=1)

    def generate() -> None:
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    for what, run in (("forward", forward), ("8 tokens generated", generate)):
        if bench.late(what):
            continue
        if bench.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            with torch.no_grad():
                run()
            if bench.device == "cuda":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            bench.line({"what": what, "tokens": tokens, "failed": "out of memory"})
            continue
        peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else 0.0
        seconds = time.perf_counter() - began
        bench.line({"what": what, "tokens": tokens, "seconds": round(seconds, 3), "peak_gib": round(peak, 2)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode, run in (("step", step), ("memory", memory), ("long", long)):
        options = modes.add_parser(mode, help=run.__doc__)
        options.set_defaults(run=run)
        options.add_argument("--quick", action="store_true", help="a tiny model on the CPU, to try the program")
        options.add_argument("--minutes", type=float, default=4.5, help="begin no new measurement after so many")
        options.add_argument(
            "--out", type=to_write, default=Path(f"train_{mode}"), help="name of the .json and the .png"
        )
        if mode == "step":
            options.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(ORDER))
            options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
            options.add_argument("--seconds", type=float, default=4.0, help="of each measurement at most")
            options.add_argument("--add", type=Path, help="the .json of an earlier call, for ways not measured now")
        if mode == "memory":
            options.add_argument("--caps", nargs="+", type=float, default=[8.0, 12.0, 24.0], help="GiB")
    given = parser.parse_args()
    given.run(Bench.open(given))


if __name__ == "__main__":
    main()
