"""Runs that go wrong: memory, disks, loader workers that are gone, a second run, other data."""

import errno
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from other_process import holding
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import write_photos, write_tiny_model
from transformers import Trainer

import phi3v
from phi3v.data.collate import StepCollator
from phi3v.errors import ConfigError, TrainingError
from phi3v.run_folder import RunFolder
from phi3v.run_lock import RunLock
from phi3v.training import checkpoints, disk_space, doctor, loader_watch
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.checkpoints import newest_checkpoint, read_manifest
from phi3v.training.loader_watch import WatchedWorkers
from phi3v.training.step_faults import is_out_of_memory
from phi3v.training.step_trainer import StepTrainer

MakeRecipe = Callable[..., phi3v.Recipe]
STEPS = {"save_steps": 2, "logging_steps": 1, "epochs": 2}


def adapter(recipe: phi3v.Recipe) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(recipe.output).adapter / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("step", "packing"), [(1, False), (4, True)])
def test_a_step_without_memory_is_done_again_in_smaller_pieces(
    make: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: int,
    packing: bool,
) -> None:
    """From that step on micro-batches hold one sample; the result is that of a run that is cut so from there."""
    training = {**STEPS, "micro_batch_size": 4, "packing": packing}
    sections = {"lora": {"r": 4, "lora_dropout": 0.2 if step == 1 else 0.0}}
    original, sizes = StepTrainer._one, []

    def small(self: Any, model: Any, batch: Any, count: Any) -> torch.Tensor:
        borders = batch.get("cu_seqlens")
        samples = len(batch["input_ids"]) if borders is None else len(borders) - 1
        if self.state.global_step >= step - 1 and samples > 1:
            original(self, model, batch, count)  # gradients and random numbers of a micro-batch that fitted
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append((self.state.global_step + 1, samples))
        return original(self, model, batch, count)

    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "_one", small)
        recipe = make("small", training=training, **sections)
        phi3v.train(recipe)
    assert [one for one in sizes if one[0] >= step] == [(n, 1) for n in range(step, 7) for _ in range(4)]
    manifest = read_manifest(newest_checkpoint(RunFolder(recipe.output).checkpoints))
    assert manifest["halvings"] == 2
    assert [line.split(", as are")[0] for line in caplog.messages] == [
        f"out of memory at step {step}: done again, with the same samples, in micro-batches of 1/{size} of the size"
        for size in (2, 4)
    ], "once each, though one batch was loaded in advance"
    single = make("single", training={**training, "micro_batch_size": 1, "packing": False}, **sections)
    phi3v.train(single)
    for name, tensor in adapter(single).items():
        tolerance = 0.0 if step == 1 and not packing else 1e-5
        torch.testing.assert_close(adapter(recipe)[name], tensor, rtol=tolerance, atol=tolerance)


def test_what_says_that_memory_is_used_up() -> None:
    for words in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"):
        assert is_out_of_memory(RuntimeError(f"{words}\nCompile with `TORCH_USE_CUDA_DSA`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize("where", ["sample", "update", "gathering"])
def test_memory_that_is_too_small_for_one_sample_is_one_line(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")

    if where == "sample":
        monkeypatch.setattr(StepTrainer, "_one", full)
        line = r"^out of memory at step 1 \(.*can't allocate.*\) with one sample at a time: set .* in another output"
    elif where == "gathering":
        collate, left = StepCollator.__call__, iter(range(4))  # the first look, and steps 1 to 3
        monkeypatch.setattr(StepCollator, "__call__", lambda *given: full() if next(left, 4) == 4 else collate(*given))
        line = (
            r"^out of memory before step 4, while samples are put together \(.*can't allocate.*\): set a smaller "
            "training.samples_per_step, image.num_crops or image.max_tokens in another output.*; the same command "
            "goes on from checkpoint-3$"  # which was not due
        )
    else:
        tried = iter([torch.optim.AdamW.step])  # by which the optimiser is tried before the run
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: next(tried, full)(*given))
        line = r"^out of memory at step 1, outside of its micro-batches .*: adamw_8bit.* in another output.* the start"
    with pytest.raises(TrainingError, match=line):
        phi3v.train(make(training=STEPS))


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, recipe = make("undisturbed", training=STEPS), make("full", training=STEPS)
    phi3v.train(undisturbed)
    for place in (7, 15):  # a checkpoint has ten files: in the first one, in the second one
        calls = iter(range(place))

        def full(path: Path, calls: Any = calls, original: Any = checkpoints.sync_file) -> None:
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "sync_file", full)
            with pytest.raises(TrainingError, match=f"^the disk of {recipe.output} is full .* free space there; the s"):
                phi3v.train(recipe)
        assert not list(RunFolder(recipe.output).checkpoints.glob(".*"))
    assert phi3v.train(recipe).steps == 6
    assert_same(adapter(recipe), adapter(undisturbed))


def test_too_little_space_is_said_before_the_first_step(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: used)
    told: list[str] = []

    def watch(event: TrainingEvent) -> None:
        told.append(event.kind)
        if event.kind == "start":
            assert "checkpoints need about" in caplog.text and "save_total_limit" in caplog.text

    phi3v.train(recipe := make(training={"max_steps": 1}), on_event=watch)
    assert "start" in told
    for error in (OSError(errno.EFBIG, "File too large"), SafetensorError("I/O error: too large (os error 27)")):
        with (
            pytest.raises(
                TrainingError, match=r"^a file in .*: raise the limit on the size of files \(ulimit -f\); the run$"
            ),
            disk_space.full_disk(Path(recipe.output), "the run", instead="set TMPDIR"),
        ):
            raise error
    disk_space.warn_of_space(RunFolder(recipe.output), 10**8, 1, best=True)
    assert caplog.messages[-1].startswith("checkpoints need about 4.0 GB in ")  # the best, the newest and a new one
    assert " and 10.0 kB are free: " in caplog.text


def test_a_disk_that_is_full_before_the_first_step_is_one_line(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own where its folder is begun, the one of temporary files where a copy of the adapter is tried."""

    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def start(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = make(training={"max_steps": 1})
    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingError, match="^the disk .*: free space there, or set TMPDIR .*; run the s") as told,
    ):
        patch.setattr(doctor, "save_tuned", full)
        phi3v.train(recipe)
    assert f"the disk of {tempfile.gettempdir()} is full" in str(told.value)
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=f"^the disk of {recipe.output} is full"):
        patch.setattr(RunFolder, "write_versions", start)
        phi3v.train(recipe)
    assert phi3v.train(recipe).steps == 1


def on_first_step(action: Callable[[], None]) -> Callable[[TrainingEvent], None]:
    return lambda event: action() if (event.kind, event.step) == ("step", 1) else None


@pytest.mark.parametrize(
    ("number", "after", "what", "advice"),
    [
        (signal.SIGKILL, 45.0, "was ended from outside", "where memory is short, set a smaller"),
        (signal.SIGSTOP, 2.0, "gave no", "a disk or network that does not answer"),
    ],
)
def test_a_loader_worker_that_is_gone_or_stuck_ends_the_run(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, number: int, after: float, what: str, advice: str
) -> None:
    """A worker of the training is killed; one of a validation, which has one batch for two, stops before its sample."""
    one = {"samples_per_step": 1, "micro_batch_size": 1, "epochs": 1}  # eight steps, of which four are read ahead
    training = {**STEPS, **one, "dataloader_num_workers": 2, "save_steps": 50, "eval_steps": 4}
    recipe = make(data={"split": {"validation": 2}}, training=training, evaluation={"batch_size": 2, "against": None})
    watches: list[WatchedWorkers] = []
    original, sample = WatchedWorkers.__init__, loader_watch._Rows.__getitem__
    began, others = [0.0], multiprocessing.active_children()

    def quick(self: WatchedWorkers, workers: int) -> None:
        original(self, workers, stuck_after=after)
        watches.append(self)

    def stopped(self: Any, index: int) -> Any:
        if began[0]:  # the workers of the training are older
            os.kill(os.getpid(), number)
        return sample(self, index)

    def hit() -> None:
        began[0] = time.monotonic()
        assert len(watches[0].processes) == 2
        if number == signal.SIGKILL:
            os.kill(watches[0].processes[0].pid, number)

    monkeypatch.setattr(WatchedWorkers, "__init__", quick)
    monkeypatch.setattr(loader_watch._Rows, "__getitem__", stopped)
    line = f"^a loader worker {what}.* before step .*: {advice}.*; the same command goes on from check"
    with pytest.raises(TrainingError, match=line) as held:  # as a notebook holds an error, and by it the loader
        phi3v.train(recipe, on_event=on_first_step(hit))
    assert time.monotonic() - began[0] < 60 and held.value.__traceback__ is not None
    deadline = time.monotonic() + 30
    while set(multiprocessing.active_children()) - set(others):
        assert time.monotonic() < deadline, "a worker is left over"
        time.sleep(0.1)
    assert newest_checkpoint(RunFolder(recipe.output).checkpoints) is not None
    after, began[0], watched = 45.0, 0.0, set()
    watches.clear()
    result = phi3v.train(
        recipe.with_overrides(["training.dataloader_num_workers=3", "training.save_total_limit=1"]),
        on_event=lambda event: watched.add(len(watches and watches[0].processes)),
    )
    assert result.status == "resumed" and result.steps == 8
    assert 3 in watched, "the loader that passes over the steps done has workers that are not watched"
    assert len(list(RunFolder(recipe.output).checkpoints.iterdir())) == 1


@pytest.mark.parametrize("fault", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_ends_with_a_sample_half_handed_over_is_one_that_is_gone(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    original = Trainer.get_batch_samples

    def broken(self: Any, *args: Any) -> Any:
        if self.state.global_step == 1:
            raise fault
        return original(self, *args)

    monkeypatch.setattr(Trainer, "get_batch_samples", broken)
    line = r"^a loader worker was ended from outside.* before step 2 .*; the same command goes on from checkpoint-1$"
    with pytest.raises(TrainingError, match=line):
        phi3v.train(make(training=STEPS))


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(make: MakeRecipe) -> None:
    recipe = make(training={**STEPS, "max_steps": 1})
    phi3v.train(recipe)
    with (
        holding(RunLock(recipe.output)) as child,
        pytest.raises(ConfigError, match=f"is being trained by process {child} on .*: wait for it, end it, or giv"),
    ):
        phi3v.train(recipe)
    assert phi3v.train(recipe).status == "finished"


def test_other_rows_or_another_base_are_refused_and_other_versions_listed(
    make: MakeRecipe, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table, model = tmp_path / "rows.jsonl", write_tiny_model(tmp_path / "model")
    lines = [
        f'{{"image": "{world / "photos" / f"{row}.png"}", "colour": "{"red" if row % 2 else "blue"}"}}'
        for row in range(8)
    ]
    table.write_text("\n".join(lines))
    recipe = make(
        model=str(model),
        data={"train": str(table), "allow_outside_root": True},
        training={**STEPS, "max_steps": 4, "micro_batch_size": 1},
    )

    def stop(event: TrainingEvent) -> None:
        if (event.kind, event.step) == ("step", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phi3v.train(recipe, on_event=stop)
    for changed in (lines[::-1], lines[:-1], [lines[0].replace("blue", "green"), *lines[1:]]):
        table.write_text("\n".join(changed))
        with pytest.raises(ConfigError, match="^the training rows are not those that checkpoint-2 was trained with"):
            phi3v.train(recipe)
    table.write_text("\n".join(lines))
    write_tiny_model(model, seed=1)
    with pytest.raises(ConfigError, match="^the weights of the base model are not those that checkpoint-2 was"):
        phi3v.train(recipe)
    write_tiny_model(model)
    monkeypatch.setattr("phi3v.training.conditions.gather_versions", lambda: {"torch": "9.9"})
    assert phi3v.train(recipe).resumed_from == 2
    assert "going on from checkpoint-2 with torch 9.9 (" in caplog.text


def test_other_photos_held_out_rows_or_files_of_the_base_are_refused(make: MakeRecipe, tmp_path: Path) -> None:
    model, photos = write_tiny_model(tmp_path / "model"), tmp_path / "photos"
    lines = write_photos(photos, 8).read_text().splitlines(keepends=True)
    train, held_out = photos / "train.jsonl", photos / "held_out.jsonl"
    train.write_text("".join(lines[:6]))
    held_out.write_text("".join(lines[6:]))
    recipe = make(
        model=str(model),
        data={"train": str(train), "validation": str(held_out)},
        training={**STEPS, "max_steps": 3, "eval_strategy": "no"},
        evaluation={"against": None},
    )

    def stop(event: TrainingEvent) -> None:
        if (event.kind, event.step) == ("step", 3):
            raise KeyboardInterrupt

    def invert(photo: Path) -> None:
        ImageOps.invert(Image.open(photo)).save(photo)

    def set_value(key: str, value: Any, **options: Any) -> Callable[[Path], Any]:
        return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), key: value}, **options))

    with pytest.raises(KeyboardInterrupt):
        phi3v.train(recipe, on_event=stop)
    for file, change, words in (
        (photos / "3.png", invert, "the photos of the training rows"),
        (photos / "7.png", invert, "the validation rows or their photos"),
        (held_out, lambda file: file.write_text(lines[6]), "the validation rows or their photos"),
        (held_out, lambda file: file.write_text("".join(lines[:5:-1])), "the validation rows or their photos"),
        (model / "config.json", set_value("rms_norm_eps", 0.1), "the values in config.json of the base model"),
        (model / "preprocessor_config.json", set_value("image_mean", [0.1] * 3), "the values in preprocessor_config.j"),
        (model / "preprocessor_config.json", set_value("num_crops", 4), "the values in preprocessor_config.json of"),
        (model / "tokenizer_config.json", set_value("add_bos_token", False), "the values in tokenizer_config.json of"),
    ):
        before = file.read_bytes()
        change(file)
        with pytest.raises(ConfigError, match=f"^{words}.* are not those that checkpoint-2 was trained with: put them"):
            phi3v.train(recipe)
        file.write_bytes(before)
        os.utime(file, (1, 1))  # when a file was written says nothing: a set may be copied
    set_value("transformers_version", "9.9", indent=7, sort_keys=True)(model / "config.json")
    assert phi3v.train(recipe).resumed_from == 2
