"""Two gloo ranks on the CPU: DDP and FSDP2 train what one process trains, and stop, save and go on together.

Nearly all of it is one launch of torchrun, `outcomes`, which trains job after job; the tests compare what it left.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rank_worker import launch_forked, rank_process, torchrun
from run_ends import assert_same_end, end_of
from safetensors.torch import load_file
from tiny_models import PREPROCESSOR, write_tiny_model

import phi3v
from phi3v.run_folder import RunFolder
from phi3v.targets import ADAPTER_WEIGHTS
from phi3v.training.checkpoints import find_fault, read_manifest
from phi3v.training.sampling import EvenSamples, epoch_order

TESTS = Path(__file__).resolve().parents[1]
SHAPES = [(40, 30), None, (80, 30), (30, 30), None, None, (45, 45), (90, 32), None, (33, 31), None]
"""Photos of several crop grids, and rows of text alone."""
ROWS, HELD_OUT = 11, 3
TOLERANCE = 2e-6
"""How far weights and logged numbers may be from those of one process, whose sums have another order; absolute for
weights, which are below 1, relative for losses and norms."""
pytestmark = pytest.mark.timeout(600)  # on a machine with one core one launch takes minutes
WHOLE = {"lora": None, "vision": {"tower": "train", "projector": "train", "projector_learning_rate": 1e-4}}
SMOOTH = {"label_smoothing_factor": 0.1}
LOGGED = ("loss", "eval_loss", "eval_loss_low", "eval_loss_high", "grad_norm")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of photos and text, of which three are held out."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "num_crops": 4}))
    rows = []
    for number, shape in enumerate([*SHAPES, (50, 20), None, None]):
        row: dict[str, Any] = {}
        if shape is not None:
            Image.new("RGB", shape, (15 * number, 200 - 12 * number, 90)).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        asked = ("<image>\n" if shape else "") + "Say it again. " * (number % 4 + 1)
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"number {number} " * (number % 3 + 1)}]
        rows.append({**row, "conversations": said})
    for name, part in (("rows", rows[:ROWS]), ("few", rows[:7]), ("held_out", rows[ROWS:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    return folder


def values(world: Path, name: str, *, fsdp: bool = False, held_out: bool = True, **sections: Any) -> dict[str, Any]:
    """A recipe of four packed steps of four samples, as plain values; a checkpoint every second step."""
    training = {
        "samples_per_step": 4,
        "micro_batch_size": 1,
        "max_steps": 4,
        "seed": 6,
        "logging_steps": 1,
        "save_steps": 2,
        **({"eval_steps": 2} if held_out else {}),
        "save_total_limit": 3,
        "lr_scheduler_type": "constant",
        **sections.pop("training", {}),
        **({"fsdp": True} if fsdp else {}),
    }
    return {
        "model": {"name": str(world / "model"), "device": "cpu", "dtype": "float32"},
        "data": {
            "train": str(world / "rows.json"),
            **({"validation": str(world / "held_out.json")} if held_out else {"split": None}),
        },
        "lora": {"r": 4},
        "training": training,
        "evaluation": {"rows": 1, "max_new_tokens": 2, "during_training": 1},
        "output": str(world / name),
        **sections,
    }


def cut_back(world: Path, name: str, copy: str) -> str:
    """A copy of a run as it was when it had saved its second step."""
    run = RunFolder(shutil.copytree(world / name, world / copy))
    for path in (run.finished, run.report, run.evaluation, run.predictions):
        path.unlink(missing_ok=True)
    for path in (run.checkpoints / "checkpoint-4", run.adapter, run.model):
        shutil.rmtree(path, ignore_errors=True)
    return copy


def hard_of(world: Path) -> dict[str, Any]:
    """Dropout, a line of the log across steps, and two steps an epoch, so that the third is inside the second one."""
    few = {"data": {"train": str(world / "few.json"), "split": None}, "held_out": False}
    return {**few, "lora": {"r": 4, "lora_dropout": 0.2}, "training": {"logging_steps": 3}}


def jobs_of(world: Path) -> dict[str, dict[str, Any]]:
    """What two ranks train, by name; "one" and "one_whole" are there."""
    hard = hard_of(world)
    return {
        "ddp": {"recipe": values(world, "ddp")},
        "fsdp": {"recipe": values(world, "fsdp", fsdp=True)},
        "ddp_whole": {"recipe": values(world, "ddp_whole", **WHOLE)},
        "fsdp_whole": {
            "recipe": values(
                world, "fsdp_whole", fsdp=True, training={"fsdp_config": {"activation_checkpointing": True}}, **WHOLE
            )
        },
        "one_then_two": {"recipe": values(world, cut_back(world, "one", "one_then_two"))},
        "hard": {"recipe": values(world, "hard", **hard)},
        "stopped": {"recipe": values(world, "stopped", **hard), "play": "stop"},
        "gone_on": {"recipe": values(world, "stopped", **hard)},
        "nan": {"recipe": values(world, "nan", held_out=False), "play": "nan"},
        "skipped": {"recipe": values(world, "skipped", held_out=False, training={"non_finite": "skip"}), "play": "nan"},
        "oom": {"recipe": values(world, "oom", held_out=False, training={"micro_batch_size": 2}), "play": "oom"},
        "uneven": {"recipe": values(world, "uneven", training={"samples_per_step": 5})},
        "locked": {"recipe": values(world, "one")},
    }


def more_jobs_of(world: Path) -> dict[str, dict[str, Any]]:
    """What they train beside that in the slow tests."""
    hard, best = hard_of(world), {"load_best_model_at_end": True, "greater_is_better": True}
    stream = {"train": str(world / "rows.json"), "streaming": True, "validation": str(world / "held_out.json")}
    return {
        "one_then_fsdp": {"recipe": values(world, cut_back(world, "one", "one_then_fsdp"), fsdp=True)},
        "fsdp_best": {"recipe": values(world, "fsdp_best", fsdp=True, training=best), "play": "stop at 2"},
        "fsdp_best_gone_on": {"recipe": values(world, "fsdp_best", fsdp=True, training=best)},
        "fsdp_hard": {"recipe": values(world, "fsdp_hard", fsdp=True, **hard)},
        "fsdp_stopped": {"recipe": values(world, "fsdp_stopped", fsdp=True, **hard), "play": "stop"},
        "fsdp_gone_on": {"recipe": values(world, "fsdp_stopped", fsdp=True, **hard)},
        "stream": {"recipe": values(world, "stream", data=stream, training=SMOOTH)},
        "finished": {"recipe": values(world, "one_whole", **WHOLE)},
    }


def train_on_two(world: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What came of each job on each rank, one after the other in one pair of processes."""
    (world / "jobs.json").write_text(json.dumps(list(jobs.values())))
    ranks = torchrun(str(TESTS / "rank_worker.py"), str(world / "jobs.json"))
    try:
        _, err = ranks.communicate(timeout=500)
        assert ranks.returncode == 0, err[-3000:]
    finally:
        ranks.kill()
    told = [json.loads((world / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [told[0][place], told[1][place]] for place, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def outcomes(world: Path) -> dict[str, list[dict[str, Any]]]:
    """What came of the jobs of `make test`."""
    for name, sections in (("one", {}), ("one_whole", WHOLE)):
        phi3v.train(phi3v.Recipe.from_dict(values(world, name, **sections)))
    jobs = jobs_of(world)  # copies the run, lock and all: reading a locked file would give its lock back
    lock = RunFolder(world / "one").lock
    lock.take()
    try:
        return train_on_two(world, jobs)
    finally:
        lock.give_back()


@pytest.fixture(scope="module")
def more(world: Path, outcomes: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """What came of the jobs of the slow tests, and of all others."""
    recipe = values(world, "one_stream", training=SMOOTH)
    recipe["data"] = {**recipe["data"], "streaming": True}
    phi3v.train(phi3v.Recipe.from_dict(recipe))
    return outcomes | train_on_two(world, more_jobs_of(world))


def numbers(world: Path, name: str) -> dict[tuple[int, str], float]:
    """Losses and norms of a run by step and name."""
    lines = RunFolder(world / name).read_metrics()
    return {(line["step"], key): line[key] for line in lines for key in LOGGED if key in line}


def weights(world: Path, name: str) -> dict[str, torch.Tensor]:
    """The tuned weights of a run."""
    run = RunFolder(world / name)
    files = [*run.adapter.glob("*.safetensors"), *run.model.glob("*.safetensors")]
    assert files, f"{name} has no weights"
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_alike(world: Path, found: str, expected: str, *, logged: bool = True) -> None:
    """Compares two runs: every tuned tensor, every logged loss and norm."""
    tensors = weights(world, expected)
    assert weights(world, found).keys() == tensors.keys()
    for name, tensor in weights(world, found).items():
        assert tensor.dtype == tensors[name].dtype
        torch.testing.assert_close(
            tensor, tensors[name], rtol=0, atol=TOLERANCE, msg=lambda line, n=name: f"{n}: {line}"
        )
    if logged:
        assert numbers(world, found) == pytest.approx(numbers(world, expected), rel=TOLERANCE)
        assert {name for _, name in numbers(world, found)} == set(LOGGED)


def test_the_data_are_hard_enough() -> None:
    """Rows do not divide by steps or ranks; in some step one rank has text alone."""
    order = epoch_order(ROWS, 4, 6, 0)
    assert len(order) == 12 and set(order) == set(range(ROWS))
    blind = [all(SHAPES[row] is None for row in order[start : start + 2]) for start in range(0, 12, 2)]
    assert any(one != other for one, other in zip(blind[::2], blind[1::2], strict=True)), blind


@pytest.mark.parametrize(
    ("name", "one", "model"),
    [
        ("ddp", "one", "DistributedDataParallel"),
        ("fsdp", "one", "FSDPPeftModelForCausalLM"),
        ("ddp_whole", "one_whole", "DistributedDataParallel"),
        ("fsdp_whole", "one_whole", "FSDPPhi3VForCausalLM"),
    ],
)
def test_two_ranks_train_what_one_trains(
    world: Path, outcomes: dict[str, list[dict[str, Any]]], name: str, one: str, model: str
) -> None:
    """Packed, with steps in which one rank has no picture; with the tower trained where all of the model is."""
    assert [told["status"] for told in outcomes[name]] == ["trained", "trained"]
    assert {told["model"] for told in outcomes[name]} == {model}
    assert_alike(world, name, one)
    moved = weights(world, name), load_file(world / "model" / "model.safetensors")
    assert any(not torch.equal(moved[0][key], moved[1].get(key, torch.zeros(()))) for key in moved[0])


def test_the_first_rank_alone_tells_and_evaluates(world: Path, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    first, second = outcomes["fsdp"]
    assert {"start", "step", "metrics", "samples", "end", "answers"} <= set(first["told"]) and second["told"] == []
    run = RunFolder(world / "fsdp")
    assert run.report.is_file() and run.evaluation.is_file() and run.finished.is_file()
    steps = [line["step"] for line in run.read_metrics() if "loss" in line]
    assert steps == [1, 2, 3, 4], "a line that two ranks write would be there twice"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_whole"])
def test_checkpoints_of_ranks_are_whole_and_plain(
    world: Path, outcomes: dict[str, list[dict[str, Any]]], name: str
) -> None:
    found = sorted((world / name / "checkpoints").iterdir())
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-4"]
    for path in found:
        assert find_fault(path) is None
        files = set(read_manifest(path)["files"])
        assert {"rank-0.json", "rank-1.json", "optimizer.safetensors"} <= files
        assert {Path(file).suffix for file in files} == {".safetensors", ".json"}
        assert read_manifest(path)["conditions"]["ranks"] == 2
    own = [load_file(found[0] / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert not all(torch.equal(own[0][key], own[1][key]) for key in own[0]), "both draw the same dropout"
    one = load_file(world / "one_whole" / "checkpoints" / "checkpoint-2" / "optimizer.safetensors")
    if name == "fsdp_whole":
        whole = load_file(found[0] / "optimizer.safetensors")
        assert {key: tensor.shape for key, tensor in whole.items()} == {key: it.shape for key, it in one.items()}


@pytest.mark.parametrize(
    ("name", "jobs"), [("one_then_two", "outcomes"), pytest.param("one_then_fsdp", "more", marks=pytest.mark.slow)]
)
def test_a_checkpoint_of_one_process_goes_on_on_two(
    world: Path, request: pytest.FixtureRequest, name: str, jobs: str
) -> None:
    assert [told["status"] for told in request.getfixturevalue(jobs)[name]] == ["resumed", "resumed"]
    assert_alike(world, name, "one")


@pytest.mark.parametrize(("name", "one"), [("ddp", "one"), ("fsdp_whole", "one_whole")])
def test_a_checkpoint_of_two_goes_on_on_one(
    world: Path,
    outcomes: dict[str, list[dict[str, Any]]],
    caplog: pytest.LogCaptureFixture,
    name: str,
    one: str,
) -> None:
    """What a sharded run saved goes on in one process without `training.fsdp`, which changes no step."""
    copy = cut_back(world, name, f"{name}_then_one")
    result = phi3v.train(phi3v.Recipe.from_dict(values(world, copy, **(WHOLE if "whole" in name else {}))))
    assert (result.status, result.resumed_from) == ("resumed", 2)
    assert "ranks 1 (2 until then)" in caplog.text
    assert_alike(world, copy, one)


@pytest.mark.parametrize(
    ("stopped", "hard", "jobs"),
    [
        ("stopped", "hard", "outcomes"),
        pytest.param("fsdp_stopped", "fsdp_hard", "more", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_they_go_on_bit_for_bit(
    world: Path, request: pytest.FixtureRequest, stopped: str, hard: str, jobs: str
) -> None:
    """With dropout of each rank's own, and a line of the log across the stop."""
    outcomes = request.getfixturevalue(jobs)
    assert [told["error"] for told in outcomes[stopped]] == ["Interrupted: 15", "Interrupted: 15"]
    assert [told["status"] for told in outcomes[stopped.replace("stopped", "gone_on")]] == ["resumed", "resumed"]
    assert (world / stopped / "checkpoints" / "checkpoint-3").is_dir(), "the step of the signal was done to its end"
    assert_same_end(end_of(world / stopped), end_of(world / hard))


@pytest.mark.slow
def test_the_best_weights_are_put_back_into_a_sharded_model(world: Path, more: dict[str, list[dict[str, Any]]]) -> None:
    """By the largest loss the best are those of step 2, which the last ones are not; the run goes on from them too."""
    assert [told["error"] for told in more["fsdp_best"]] == ["Interrupted: 15", "Interrupted: 15"]
    assert [told["status"] for told in more["fsdp_best_gone_on"]] == ["resumed", "resumed"]
    saved = [load_file(world / "fsdp" / "checkpoints" / f"checkpoint-{step}" / ADAPTER_WEIGHTS) for step in (2, 4)]
    found = weights(world, "fsdp_best")
    assert all(torch.equal(found[name], tensor) for name, tensor in saved[0].items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in saved[1].items())


def test_ranks_halve_their_micro_batches_together(world: Path, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert [told["status"] for told in outcomes["oom"]] == ["trained", "trained"]
    assert read_manifest(world / "oom" / "checkpoints" / "checkpoint-4")["halvings"] >= 1
    assert_alike(world, "oom", "one", logged=False)


def test_ranks_decide_alike_about_a_loss_that_is_no_number(
    world: Path, outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    first, second = (told["error"] for told in outcomes["nan"])
    assert first.startswith("TrainingError: loss is nan at step 2 (rows ") and second == "OtherRankError: rank 0 failed"
    assert [told["status"] for told in outcomes["skipped"]] == ["trained", "trained"]
    lines = RunFolder(world / "skipped").read_metrics()
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps[0] == 1 and steps[-1] == 4
    assert [(line["step"], line["left_out"]) for line in lines if "left_out" in line] == [(2, "loss is nan")]


@pytest.mark.slow
def test_a_stream_is_shared_without_overlap_or_loss(world: Path, more: dict[str, list[dict[str, Any]]]) -> None:
    assert [told["status"] for told in more["stream"]] == ["trained", "trained"]
    assert_alike(world, "stream", "one_stream")


def test_what_ranks_refuse_the_first_one_says(world: Path, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for name, line in (("uneven", "samples_per_step is 5, which 2 ranks"), ("locked", "is being trained by process")):
        first, second = (told["error"] for told in outcomes[name])
        assert first.startswith("ConfigError: ") and line in first and second == "OtherRankError: rank 0 failed"
    assert not (world / "uneven").exists()


@pytest.mark.slow
def test_a_finished_run_is_finished_on_all_ranks(more: dict[str, list[dict[str, Any]]]) -> None:
    assert [told["status"] for told in more["finished"]] == ["finished", "finished"]


def test_held_out_samples_are_filled_up_with_what_counts_for_nothing() -> None:
    samples = [{"labels": torch.tensor([-100, number])} for number in range(5)]
    even = EvenSamples(samples, 4)
    assert [even[place]["labels"].tolist()[1] for place in range(len(even))] == [0, 1, 2, 3, 4, -100, -100, -100]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_ranks_that_are_started_again_end_as_the_undisturbed_ones(
    world: Path, outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    """SIGKILL inside the second epoch, a step behind a checkpoint; in a process of its own, whose signals it takes."""
    recipe = values(world, "forked", **hard_of(world))
    launcher = multiprocessing.get_context("fork").Process(target=launch_forked, args=(recipe,))
    launcher.start()
    launcher.join(120)
    if launcher.is_alive():
        launcher.kill()
    assert launcher.exitcode == 0 and (world / "forked.killed").exists()
    assert_same_end(end_of(world / "forked"), end_of(world / "hard"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_rank_that_is_killed_changes_nothing(world: Path, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """SIGKILL from outside, once its first checkpoint is there; torchrun starts both ranks of the command again."""
    run = RunFolder(world / "killed")
    recipe = phi3v.Recipe.from_dict(values(world, "killed", **hard_of(world)))
    (world / "killed.yaml").write_text(recipe.to_yaml())
    ranks = torchrun("--max-restarts=1", "--monitor-interval=0.1", "-m", "phi3v", "train", str(world / "killed.yaml"))
    try:
        end = time.monotonic() + 120
        while not (run.checkpoints / "checkpoint-2").is_dir():
            assert time.monotonic() < end and ranks.poll() is None
            time.sleep(0.002)
        os.kill(rank_process(ranks, 1), signal.SIGKILL)
        out, err = ranks.communicate(timeout=180)
    finally:
        ranks.kill()
    assert ranks.returncode == 0, err[-3000:]
    assert out.count("going on from the checkpoint of step 2") == 1, "only the first rank prints"
    assert_same_end(end_of(world / "killed"), end_of(world / "hard"))
