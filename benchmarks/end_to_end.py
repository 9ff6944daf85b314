"""A whole training from JPEG files: `phi3v.train` on 1,000 generated photos of 1200x1600; how long the device waits.

    python benchmarks/end_to_end.py --out benchmarks/end_to_end [--rows 1000] [--workers 8] [--num-crops 16]

Paints the photos, writes a model of full size with random weights, and trains LoRA on it for one epoch by a recipe,
through everything that a run goes through: decoding, resizing, crops, batches, transfer, steps. Told are samples a
second from the fifth step on, the share of the host's time in which the loop waits for its next batch, and, on a GPU,
the share of a step in which no kernel runs: the kernels of ten steps are watched, which makes the host slower, and set
against the median of the steps that are not watched. `--quick` is a tiny model, 12 photos of one crop, and the CPU.
"""

import argparse
import json
import os
import random
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from results import draw_bars, machine, to_write, write
from sizes import build, config_of

SAMPLES_PER_STEP, MICRO_BATCH = 16, 4
FIRST, WATCHED = 5, 10
"""Steps that warm up, and steps that are watched behind them."""


def paint(place: tuple[str, int]) -> None:
    """One photo, a JPEG of about 430 kB."""
    from preprocess import draw_photo

    folder, seed = place
    draw_photo(seed).save(Path(folder) / f"{seed}.jpg", quality=88)


def write_rows(folder: Path, rows: int) -> Path:
    """The photos and a file that names them, with answers of products."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(paint, [(str(folder), seed) for seed in range(rows)], chunksize=4))
    dice, lines = random.Random(0), []
    for seed in range(rows):
        answer = f"Product: Check Wool Scarf {seed}, Category: SCARF, Full Price: {dice.randrange(1000)}"
        lines.append(json.dumps({"image": f"{seed}.jpg", "answer": answer}))
    table = folder / "rows.jsonl"
    table.write_text("\n".join(lines) + "\n")
    return table


def write_model(folder: Path, size: str, device: str) -> None:
    """A model folder of random weights, with the tokenizer of the demo, whose ids lie in any vocabulary."""
    from phi3v.demo.tokenizer import BASE_SIZE, EMBEDDING_ROWS, write_tokenizer
    from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

    config = config_of(size)
    config.vocab_size = max(config.vocab_size, EMBEDDING_ROWS)
    config.image_token_id, config.pad_token_id = BASE_SIZE + 44, BASE_SIZE
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    build(Phi3VForCausalLM, config, device=device, dtype=dtype, attention="sdpa").save_pretrained(folder)
    write_tokenizer(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    processor = {
        "image_processor_type": "Phi3VImageProcessor",
        "processor_class": "Phi3VProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "num_crops": 16,
        "num_img_tokens": 144,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


class Watch:
    """Notes when steps end, what the loop waits for its next step, and the kernels of some steps in the middle."""

    def __init__(self, device: str, first: int, watched: int) -> None:
        from phi3v.training.device_time import DeviceWatch

        self.device_watch = DeviceWatch(torch.device(device)) if device == "cuda" else None
        self.first, self.watched = first, watched
        self.ends: list[float] = []
        self.waits: list[float] = []

    def on_event(self, event) -> None:
        """A step is done."""
        if event.kind != "step":
            return
        self.ends.append(time.perf_counter())
        if self.device_watch and event.step == self.first:
            self.device_watch.start()
        if self.device_watch and event.step == self.first + self.watched:
            self.device_watch.stop()

    def waiting(self, trainer: type):
        """The Trainer's way to its next batches, timed."""
        plain = trainer.get_batch_samples

        def timed(own, *args, **kwargs):
            began = time.perf_counter()
            result = plain(own, *args, **kwargs)
            self.waits.append(time.perf_counter() - began)
            return result

        return timed


def run(folder: Path, given: argparse.Namespace, device: str) -> dict:
    """Trains and tells what was seen."""
    import phi3v
    from phi3v.training.step_trainer import StepTrainer

    rows = write_rows(folder, given.rows)
    print(f"{given.rows} photos are painted", flush=True)
    write_model(folder / "model", "tiny" if given.quick else "full", device)
    print("the model is written", flush=True)
    first, watched = (1, 1) if given.quick else (FIRST, WATCHED)
    watch = Watch(device, first, watched)
    recipe = phi3v.Recipe.from_dict(
        {
            "model": {"name": str(folder / "model"), "device": device},
            "data": {"train": str(rows), "prompt": "What is shown in this image?", "answer": "{answer}", "split": None},
            "image": {"num_crops": given.num_crops, "fast": True},
            "training": {
                "samples_per_step": 4 if given.quick else SAMPLES_PER_STEP,
                "micro_batch_size": 2 if given.quick else MICRO_BATCH,
                "epochs": 1,
                "save_strategy": "no",
                "dataloader_num_workers": given.workers,
            },
            "output": str(folder / "run"),
        }
    )
    plain, StepTrainer.get_batch_samples = StepTrainer.get_batch_samples, watch.waiting(StepTrainer)
    try:
        result = phi3v.train(recipe, on_event=watch.on_event)
    finally:
        StepTrainer.get_batch_samples = plain
    # seconds of each step behind the first ones, without those that were watched and the one that reads what was seen
    steps = [(n, watch.ends[n] - watch.ends[n - 1]) for n in range(first, len(watch.ends))]
    plain_steps = [(n, took) for n, took in steps if not first <= n <= first + watched] or steps
    seconds = sum(took for _, took in plain_steps)
    told = {
        "steps": result.steps,
        "samples/s": round(len(plain_steps) * recipe.training.samples_per_step / seconds, 3),
        "loop waits for data": round(sum(watch.waits[n] for n, _ in plain_steps) / seconds, 4),
    }
    if watch.device_watch and watch.device_watch.busy_seconds is not None:
        busy = watch.device_watch.busy_seconds / watched
        told["device busy, s a step"] = round(busy, 4)
        told["a step, s"] = round(median(took for _, took in plain_steps), 4)
        told["device idle"] = round(1 - busy / told["a step, s"], 4)
        told["device idle while watched"] = round(1 - busy * watched / watch.device_watch.seconds, 4)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU, to try the program")
    parser.add_argument("--out", type=to_write, default=Path("end_to_end"), help="name of the .json and the .png")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if not given.quick and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --quick tries this program with a tiny model on the CPU")
    if given.quick:
        given.rows, given.workers, given.num_crops = 12, 0, 1
    with tempfile.TemporaryDirectory() as folder:
        told = run(Path(folder), given, "cpu" if given.quick else "cuda")
    options = {"rows": given.rows, "workers": given.workers, "num_crops": given.num_crops, "quick": given.quick}
    write({**machine(), **options, **told}, given.out)
    shares = {name: value for name, value in told.items() if name in ("loop waits for data", "device idle")}
    draw_bars({"share of the time": shares}, f"{told['samples/s']} samples/s from JPEG files", given.out, "%.3f")
    print("  ".join(f"{name} {value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
