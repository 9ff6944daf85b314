"""What `phi3v plan` counts beside what a training takes: the allocator's peak on a GPU, resident memory on a CPU.

    python benchmarks/plan_memory.py --out benchmarks/plan_memory [--size full] [--cases lora full] [--device cuda]

Each case is a shipped recipe at a size, on generated photos and a model of random weights: it is planned, and then a
few of its steps run, each case in a process of its own. Told are the counted and the measured peak, and how far apart
they are. On a GPU the measured peak is torch's own count of allocated bytes. On a CPU it is the most that was resident
while steps ran, less what the program held when its rows were read and its model was not; loading itself may take more
for a moment, which is told beside it. `--size mid` is the size for a CPU: 4 layers of width 2048.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CASES: dict[str, tuple[str, list[str]]] = {
    "burberry": ("burberry_lora.yaml", []),
    "lora": ("lora_24gb.yaml", []),
    "lora plain": ("lora_24gb.yaml", ["training.gradient_checkpointing=false"]),
    "qlora": ("qlora_8gb.yaml", []),
    "qlora of 4": ("qlora_8gb.yaml", ["training.micro_batch_size=4", "training.samples_per_step=4"]),
    "full": ("lora_24gb.yaml", ["lora=null", "vision.projector=train"]),
}
"""Name -> a shipped recipe, and what is changed of it, where a micro-batch has one sample and a step two."""
STEPS = 2


def case_recipe(name: str, folder: Path, image: tuple[int, int], device: str) -> Any:
    """The recipe of a case on the model and the rows in a folder."""
    from phi3v.recipe import Recipe

    file, changes = CASES[name]
    values = Recipe.load(RECIPES / file).model_dump()
    values["model"] = {**values["model"], "name": str(folder / "model"), "device": device, "revision": None}
    values["model"]["dtype"] = "auto"
    values["data"] = {"train": str(folder / "rows" / "rows.jsonl"), "images": "images", "split": None}
    values["data"] |= {"prompt": "What is shown in this image?", "answer": "{answer}"}
    values["training"] |= {"samples_per_step": 2, "max_steps": STEPS, "save_strategy": "no", "compile_layers": False}
    values["training"]["micro_batch_size"] = 1
    values["report"] = {"to": []}
    values["output"] = str(folder / f"run_{name.replace(' ', '_')}")
    return Recipe.from_dict(values).with_overrides(changes)


def prepare(folder: Path, size: str, device: str, image: tuple[int, int]) -> None:
    """Writes the model and the photos."""
    from end_to_end import write_model

    from phi3v.data.synthetic import write_synthetic_rows

    write_model(folder / "model", size, device)
    write_synthetic_rows(folder / "rows", 4, [[image]], 60)


def resident(field: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, folder: Path, image: tuple[int, int], device: str) -> dict[str, Any]:
    """Trains a case in this process and says what it took."""
    import bitsandbytes  # noqa: F401 -- the program is loaded before its memory is read
    import peft  # noqa: F401
    import torch
    from transformers import TrainerCallback

    from phi3v.training import prepare
    from phi3v.training.train import train_watched

    seen: dict[str, Any] = {}
    load = prepare.load_base

    def noted(*given: Any, **named: Any) -> Any:
        seen["program"] = resident("VmRSS")  # rows are read and every library is there: what comes now is the model
        return load(*given, **named)

    prepare.load_base = noted  # type: ignore[assignment]

    class Peak(TrainerCallback):
        """Begins anew where steps begin, and reads at the end."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            seen["loading"] = resident("VmHWM") - seen["program"]
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            on_gpu = device == "cuda"
            seen["measured"] = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - seen["program"]

    train_watched(case_recipe(name, folder, image, device), [Peak()])
    return seen


def plan(name: str, folder: Path, image: tuple[int, int], device: str) -> dict[str, Any]:
    """Plans a case."""
    from phi3v.training.memory_plan import plan_recipe

    found = plan_recipe(case_recipe(name, folder, image, device))
    return {"counted": found.memory.step, "lines": found.memory.lines, "tokens": found.largest}


def in_a_process(what: str, name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Runs `plan` or `measure` by itself."""
    command = [sys.executable, __file__, "--one", what, name, str(folder), "--image", given.image]
    done = subprocess.run([*command, "--device", given.device], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    from results import to_write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--size", default="full", help="full, mid, cpu or tiny")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--image", default="1200x1600")
    parser.add_argument("--out", type=to_write, default=None, help="name of the .json")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    width, _, height = given.image.partition("x")
    image = (int(width), int(height))
    if given.one:
        what, name, folder = given.one
        print(json.dumps({"plan": plan, "measure": measure}[what](name, Path(folder), image, given.device)))
        return
    from results import machine, write

    results: dict[str, Any] = {}
    print("| case | counted GiB | measured GiB | apart | largest micro-batch |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, given.size, given.device, image)
        for name in given.cases:
            found = in_a_process("plan", name, folder, given) | in_a_process("measure", name, folder, given)
            results[name] = found
            if "failed" in found:
                print(f"| {name} | {found.get('counted', 0) / 2**30:.2f} | {found['failed']} | | |", flush=True)
                continue
            apart = found["counted"] / found["measured"] - 1
            gib = [f"{found[key] / 2**30:.2f}" for key in ("counted", "measured")]
            print(f"| {name} | {' | '.join(gib)} | {apart:+.1%} | {found['tokens']} tokens |", flush=True)
    if given.out is not None:
        write({**machine(), "size": given.size, "results": results}, given.out)


if __name__ == "__main__":
    main()
