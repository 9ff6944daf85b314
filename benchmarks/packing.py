"""What packing and the rest of our step give on a CPU: one step done plainly, packed, and packed with kept features.

    python benchmarks/packing.py --out benchmarks/packing [--rounds 5] [--threads 1]

A decoder of 8 layers of width 512 with a tower, a vocabulary and LoRA r=16 in about the proportion that they have in
Phi-3-Vision (`sizes.py`). One step is 4 samples of four grids of crops, or `--repeats` times as many in a shuffled
order, cut into micro-batches of 4. Plain is transformers' Phi-3 and CLIP with PEFT: rows padded to the longest of
their micro-batch, every image filled up to 17 crops, logits at every position. The ways take turns step by step, so
that a machine that is slow for a while is slow for all; what counts is the ratio of medians. All ways start from
equal weights, and the program stops when the losses of their first step, before any weight moves, are not equal.
`--vocabulary 32064` makes logits as many as the real model has, which at this width is most of the plain step: the
figure to quote is the other one. `--quick` tries the program and measures nothing.
"""

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from count import Grid
from floor import matrix_rate
from others import joined, joined_batches
from ours import part
from results import draw_bars, machine, to_write, write
from sizes import config_of, image_tokens, make_example
from ways import Example, Way, make_optimiser, make_way, run_step, trained_tokens

from phi3v.training.floor import useful_operations

GRIDS: list[Grid] = [(4, 4), (2, 2), (1, 2), (1, 1)]
MICRO_BATCH = 4


def ways_of(config) -> dict[str, Way]:
    """The plain way and ours; without compiled layers, which do not pay on a CPU."""
    model, _ = joined(config, "peft", device="cpu", dtype=torch.float32, padded=True)
    plain = Way(
        "plain",
        model,
        lambda examples, size: joined_batches(examples, size, crop_slots=17),
        lambda batch, items: model(**batch, num_items_in_batch=items),
        None,
    )
    ours = {name: make_way(name, config, device="cpu", dtype=torch.float32) for name in ("ours-padded", "ours")}
    return {"plain": plain, **ours}


def with_features(way: Way, examples: list[Example]) -> list[Example]:
    """Examples whose images have been through the frozen tower, as a run keeps them from its first epoch on."""
    base = way.model.get_base_model()
    kept = []
    with torch.no_grad():
        for example in examples:
            made = base.get_image_features(example["pixel_values"], example["image_sizes"]).last_hidden_state
            kept.append({**{k: v for k, v in example.items() if k != "pixel_values"}, "image_features": made})
    return kept


def check_losses(losses: dict[str, float]) -> None:
    """Raises: AssertionError when the first step's losses of the ways, kept features among them, are not equal."""
    assert max(losses.values()) - min(losses.values()) <= 1e-4 * max(losses.values()), losses


def measure(ways: dict[str, Way], examples: list[Example], rounds: int) -> dict[str, list[float]]:
    """Seconds of steps, the ways in turn; the first round warms up and compares losses.

    Raises: AssertionError when the ways do not compute the same.
    """
    batches = {name: way.batches(examples, MICRO_BATCH) for name, way in ways.items()}
    if part("features.collate") is not None:
        ways = {**ways, "ours, kept features": ways["ours"]}
        kept = with_features(ways["ours"], examples)
        batches["ours, kept features"] = ways["ours"].batches(kept, MICRO_BATCH)
    optimisers = {name: make_optimiser(way, "cpu") for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        losses = {}
        for name, way in ways.items():
            items = trained_tokens(batches[name])
            began = time.perf_counter()
            losses[name] = float(run_step(way, batches[name], items, optimisers[name], "cpu"))
            seconds[name].append(time.perf_counter() - began)
        if not turn:
            check_losses(losses)
            print("loss of the first step:", {name: round(loss, 5) for name, loss in losses.items()}, flush=True)
        print(f"round {turn}:", {name: round(times[-1], 2) for name, times in seconds.items()}, flush=True)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way that are timed")
    parser.add_argument("--repeats", type=int, default=1, help="samples of each grid in a step")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--vocabulary", type=int, default=1024, help="entries of the model's")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--out", type=to_write, default=Path("packing"), help="name of the .json and the .png")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    config = config_of("tiny" if given.quick else "cpu", vocab_size=given.vocabulary)
    grids = ([(1, 2), (1, 1)] * 2 if given.quick else GRIDS) * given.repeats
    order = torch.randperm(len(grids), generator=torch.Generator().manual_seed(0)).tolist()
    grids = [grids[place] for place in order]
    examples = [make_example(config, [grid], seed=seed) for seed, grid in enumerate(grids)]
    ways = ways_of(config)
    seconds = measure(ways, examples, given.rounds)
    floor = sum(
        useful_operations(
            config, tokens=image_tokens(g) + 100, image=image_tokens(g), crops=g[0] * g[1] + 1, trained=36
        )
        for g in grids
    ) / matrix_rate("cpu", torch.float32)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        **machine(),
        "grids": grids,
        "vocabulary": given.vocabulary,
        "rounds": given.rounds,
        "notes": {name: way.note for name, way in ways.items() if way.note},
        "seconds": {name: round(median, 3) for name, median in medians.items()},
        "of_the_floor": {name: round(floor / median, 3) for name, median in medians.items()},
        "times_the_plain_way": {name: round(medians["plain"] / median, 2) for name, median in medians.items()},
    }
    write(result, given.out)
    rates = {name: len(examples) / median for name, median in medians.items()}
    draw_bars({"samples/s": rates}, "samples/s, width 512, 8 layers, LoRA r=16, mixed crops", given.out)
    print("| way | s a step | samples/s | of the floor | times the plain way |\n|---|---|---|---|---|")
    for name, median in medians.items():
        print(
            f"| {name} | {median:.2f} | {rates[name]:.2f} | {100 * floor / median:.0f} % "
            f"| {medians['plain'] / median:.2f} |"
        )
    for name, note in result["notes"].items():
        print(f"{name}: {note}")
    if given.quick:
        print("--quick tries the program on a tiny model: its times and shares are no measurement")


if __name__ == "__main__":
    main()
