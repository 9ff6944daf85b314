"""What one training step asks of a GPU, counted at full size on the meta device, for every way that is compared here.

    python benchmarks/count.py --out benchmarks/count [--ways ours peft] [--shapes 2509 757 mixed]

Counted from the code that runs: floating-point operations, bytes read and written, kernel launches, waits of the host,
most memory alive (weights, gradients, both moments of AdamW, activations; no allocator, no workspace). "Predicted" puts
assumed rates of an H200 over the counts (see `counter.Rates`); it is no measurement. What torch.compile fuses is not
seen, so way (c) is not in the table; Liger's kernels have none for the meta device either.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from counter import Counter, Counts, span
from ours import part
from results import draw_bars, machine, to_write, write
from sizes import DECODERS, config_of, image_tokens
from torch import nn
from ways import WAYS, Way, make_way

from phi3v.image_tokens import CROP_SIZE
from phi3v.training.floor import useful_operations
from phi3v.training.live_tensors import HAND_WRITTEN, DeviceKernels, OneKernelEach, run_backward

Grid = tuple[int, int]
SHAPES: dict[str, list[Grid]] = {"2509": [(4, 4)] * 4, "757": [(2, 2)] * 4, "mixed": [(4, 4), (2, 2), (1, 2), (1, 1)]}
"""Image tokens -> the grids of four samples; "mixed" stands for images of different budgets in one set."""
COUNTED = ("guide", "peft", "peft16", "ours-eager", "ours-padded", "ours")
TEXT, TRAINED = 100, 36
LIMITED = tuple(SHAPES)
LIMITS = Path(__file__).with_name("step_limits.json")


def meta_example(config: Any, grid: Grid) -> dict[str, torch.Tensor]:
    """`sizes.make_example` without contents; the sizes of images stay real, the host reads them."""
    tokens, crops = image_tokens(grid) + TEXT, grid[0] * grid[1] + 1
    ids = torch.full((tokens,), config.image_token_id)
    ids[:3], ids[-(TEXT - 3) :] = 5, 5
    labels = torch.full_like(ids, -100)
    labels[-TRAINED:] = 5
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.empty((1, crops, 3, CROP_SIZE, CROP_SIZE), dtype=torch.float32, device="meta"),
        "image_sizes": torch.tensor([[grid[0] * CROP_SIZE, grid[1] * CROP_SIZE]]),
    }


def to_meta(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose tensors are shapes alone.

    Without padding attention needs no mask: a GPU's path finds out by one wait, which the meta device cannot.
    """
    if batch.get("attention_mask") is not None and bool(batch["attention_mask"].all()):
        batch = {**batch, "attention_mask": None}
    return {
        key: value.to("meta") if isinstance(value, torch.Tensor) and key != "image_sizes" else value
        for key, value in batch.items()
    }


def count_step(way: Way, grids: Sequence[Grid], config: Any, micro_batch: int = 4) -> Counts:
    """Counts one optimiser step of a way over one sample for each grid."""
    batches = way.batches([meta_example(config, grid) for grid in grids], micro_batch)
    items = TRAINED * len(grids)
    counter = Counter(rows=items // len(batches))
    stepped = list(way.masters.values()) or way.trained
    moments = [torch.empty_like(weight) for weight in stepped for _ in range(2)]
    for held in [*way.model.parameters(), *way.model.buffers(), *way.masters.values(), *moments]:
        counter.hold(held)
    kernels = OneKernelEach(counter, part("kernels.passes"), HAND_WRITTEN)
    with DeviceKernels(counter, way.autocast), counter, kernels:
        for batch in batches:
            counter.lengths = batch["cu_seqlens"].diff().tolist() if "cu_seqlens" in batch else []
            run_backward(way.loss(to_meta(batch), items))
        _count_optimiser(counter, stepped)
    for weight in way.trained:
        assert weight.grad is not None, "a trained weight has no gradient"
        weight.grad = None
    return counter.counts


def _count_optimiser(counter: Counter, trained: list[nn.Parameter]) -> None:
    """Clipping and AdamW in fused form: what their kernels read and write; a launch takes some 100 tensors."""
    moved, launches = sum(map(span, trained)), -(-len(trained) // 100)
    for _ in range(launches):
        counter.kernel("clipping", 0, 3 * moved / launches)
        counter.kernel("optimiser", 0, 7 * moved / launches)


def floor_of(config: Any, grids: Sequence[Grid]) -> float:
    """Operations that a step over one sample for each grid cannot do without."""
    return sum(
        useful_operations(
            config,
            tokens=image_tokens(grid) + TEXT,
            image=image_tokens(grid),
            crops=grid[0] * grid[1] + 1,
            trained=TRAINED,
        )
        for grid in grids
    )


def count_way(name: str, shapes: Sequence[str], size: str = "full") -> dict[str, dict[str, Any]]:
    """Counts of a way at some shapes, shape -> plain values."""
    config = config_of(size)
    way = make_way(name, config, device="meta", dtype=torch.bfloat16)
    counted = {}
    for shape in shapes:
        counts = count_step(way, SHAPES[shape], config)
        counted[shape] = {**counts.to_dict(), "note": way.note, "samples": len(SHAPES[shape])}
    return counted


def write_limits() -> None:
    """Writes what the test holds our step to: what it takes today and 1 % more; waits of the host as they are."""
    limits = {}
    for shape, counted in count_way("ours", LIMITED).items():
        names = ("operations_1e12", "bytes_1e9", "peak_gib")
        limits[shape] = {name: round(1.01 * counted[name], 2) for name in names}
        limits[shape] |= {"launches": int(1.01 * counted["launches"]), "host_waits": counted["host_waits"]}
    LIMITS.write_text(json.dumps(limits, indent=2) + "\n")
    print(LIMITS.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=COUNTED, default=list(COUNTED))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--size", choices=list(DECODERS), default="full", help="of the model; tiny to try the program")
    parser.add_argument("--out", type=to_write, default=Path("count"), help="name of the .json and the .png")
    parser.add_argument("--write-limits", action="store_true", help="write step_limits.json from ours and do no more")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.write_limits:
        write_limits()
        return
    config = config_of(given.size)
    floors = {shape: floor_of(config, SHAPES[shape]) for shape in given.shapes}
    counted = {}
    for name in given.ways:
        counted[name] = count_way(name, given.shapes, given.size)
        for shape, values in counted[name].items():
            print(
                f"{shape:>6} {name:12} " + ", ".join(f"{k} {v}" for k, v in values.items() if k != "kinds"), flush=True
            )
    result = {**machine(), "size": given.size, "floor_1e12": {s: round(f / 1e12, 2) for s, f in floors.items()}}
    write({**result, "counted": counted}, given.out)
    draw_bars(
        {
            f"{shape}: 10^9 bytes a sample": {
                name: values[shape]["bytes_1e9"] / values[shape]["samples"] for name, values in counted.items()
            }
            for shape in given.shapes
        },
        "10^9 bytes that kernels read and write for one sample, counted",
        given.out,
        "%.0f",
    )
    for shape in given.shapes:
        print(f"\n{shape}, 4 samples; floor {floors[shape] / 1e12:,.4g} 10^12 operations")
        print("| way | 10^12 operations | 10^9 bytes | launches | host waits | peak GiB | predicted ms |")
        print("|---|---|---|---|---|---|---|")
        for name, values in counted.items():
            one = values[shape]
            keys = ("operations_1e12", "bytes_1e9", "launches", "host_waits", "peak_gib", "predicted_ms")
            print(f"| {WAYS[name]} | " + " | ".join(str(one[key]) for key in keys) + " |")


if __name__ == "__main__":
    main()
