"""What tests start under torchrun: trains recipes one after the other, as one rank of several.

    torchrun --nproc-per-node=2 tests/rank_worker.py jobs.json

`jobs.json` is a list of jobs: {"recipe": VALUES, "play": NAME}, where what is played happens on the last rank alone,
see `PLAYS`; {"predict": ARGUMENTS}; or {"evaluate": ARGUMENTS}. What came of each is in `rank-N.json` beside the
file: {"status": "trained", "told": ["start"], "model": "FSDPPeftModel"}, or {"error": "ConfigError: the line"}.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import phi3v
from phi3v.errors import Interrupted, Phi3VError
from phi3v.evaluation import report_curves
from phi3v.training.step_trainer import StepTrainer

LAST = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Does something at the first micro-batch of a step, on the last rank."""
    original, done = StepTrainer._one, []

    def spy(self: Any, *arguments: Any) -> Any:
        if LAST and self.state.global_step == step - 1 and not done:
            done.append(step)
            result = act()
            return original(self, *arguments) * (1.0 if result is None else result)
        return original(self, *arguments)

    patch.setattr(StepTrainer, "_one", spy)


def no_memory() -> None:
    """What a GPU that is full raises."""
    raise torch.OutOfMemoryError("CUDA out of memory")


PLAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "stop": lambda patch: at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "stop at 2": lambda patch: at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "oom": lambda patch: at_step(patch, 2, no_memory),
    "nan": lambda patch: at_step(patch, 2, lambda: float("nan")),
}


def done(job: dict[str, Any]) -> dict[str, Any]:
    """Trains one job, or answers its rows."""
    try:
        if "predict" in job:
            prediction = phi3v.predict(**job["predict"])
            return {"status": prediction.status, "told": prediction.problems}
        if "evaluate" in job:
            return {"status": "evaluated", "told": phi3v.evaluate(**job["evaluate"]).predictions}
    except Phi3VError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    told, models = [], []
    original = StepTrainer.training_step

    def spy(self: Any, model: Any, *arguments: Any, **named: Any) -> Any:
        models.append(type(model).__name__)
        return original(self, model, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        PLAYS.get(job.get("play", ""), lambda patch: None)(patch)
        patch.setattr(StepTrainer, "training_step", spy)
        patch.setattr(
            report_curves, "_draw", lambda *args, **options: b"<svg></svg>"
        )  # as in tests/training/conftest.py
        try:
            recipe = phi3v.Recipe.from_dict(job["recipe"])
            result = phi3v.train(recipe, on_event=lambda event: told.append(event.kind))
            assert "ACCELERATE_USE_FSDP" not in os.environ  # on GPUs it would shard the next job, whose recipe does not
        except (Phi3VError, Interrupted) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"status": result.status, "told": sorted(set(told)), "model": models[0] if models else None}


def train_killed_once(recipe: dict[str, Any]) -> None:
    """A rank that torchrun's agent starts: the second one is killed in the third step, before it is started again."""
    original = StepTrainer._one

    def killed(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 2:
            Path(f"{recipe['output']}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        StepTrainer._one = killed  # type: ignore[method-assign]
    phi3v.train(phi3v.Recipe.from_dict(recipe))


def launch_forked(recipe: dict[str, Any]) -> None:
    """What `torchrun --nproc-per-node=2 --max-restarts=1` does, with ranks that are forked: nothing is imported."""
    config = LaunchConfig(
        1, 1, 2, run_id="forked", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1,
        monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, train_killed_once)(recipe)


def torchrun(*words: str, timeout: float = 240) -> subprocess.Popen[str]:
    """Starts two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_process(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank among the children of torchrun."""
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for child in children.read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"rank {rank} is not there")


def main(jobs: Path) -> None:
    """Trains all jobs."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")  # stays between jobs
    outcomes = []
    gc.collect()
    gc.freeze()  # as in tests/conftest.py
    for job in json.loads(jobs.read_text()):
        outcomes.append(done(job))
        dist.barrier()
    (jobs.parent / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
