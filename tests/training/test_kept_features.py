"""Features kept over epochs, evaluations and runs: how often the tower is called, and that nothing else changes."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import write_photos, write_tiny_model

import phi3v
from phi3v.errors import TrainingError
from phi3v.features.store import FeatureMemory
from phi3v.features.vision import VisionFeatures
from phi3v.model.modeling_phi3_v import Phi3VModel
from phi3v.model.vision_phi3_v import Phi3VVisionTransformer
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.feature_cache import FeatureCache, FeatureReport, Packed
from phi3v.training.loader_watch import WatchedWorkers

MakeRecipe = Callable[..., phi3v.Recipe]
ROWS, UNIQUE = 14, 12
"""Fourteen photos, of which the last two have the pixels of the first two."""
ENTRY = 313 * 32 * 4
"""Bytes of the features of a photo of the tiny model."""
EVALUATED = {
    "data": {"split": {"validation": 4}},
    "lora": {"r": 4, "lora_dropout": 0.1},
    "training": {"epochs": 3, "micro_batch_size": 1},
    "evaluation": {"max_new_tokens": 2, "batch_size": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the photos."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", ROWS)
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Crops that go through the tower, a number for each call."""
    calls: list[int] = []
    original = Phi3VVisionTransformer.forward

    def count(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(Phi3VVisionTransformer, "forward", count)
    return calls


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of features and pixels, the number of open images of each."""
    calls: list[int] = []
    original = Phi3VModel.fill_features

    def count(self: Any, features: list, *args: Any) -> torch.Tensor:
        calls.append(sum(one is None for one in features))
        return original(self, features, *args)

    monkeypatch.setattr(Phi3VModel, "fill_features", count)
    return calls


def weights_of(recipe: phi3v.Recipe) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(recipe.output).adapter / "adapter_model.safetensors")


def losses_of(recipe: phi3v.Recipe) -> list[tuple[str, float]]:
    """All losses of a run, those of validations among them."""
    lines = RunFolder(recipe.output).read_metrics()
    return [(name, line[name]) for line in lines for name in ("loss", "eval_loss") if name in line]


def assert_same_run(found: phi3v.Recipe, expected: phi3v.Recipe, tolerance: float) -> None:
    tensors, wanted = weights_of(found), weights_of(expected)
    assert set(tensors) == set(wanted) and any(bool(one.any()) for name, one in wanted.items() if "lora_B" in name)
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=tolerance, atol=tolerance)
    losses, others = losses_of(found), losses_of(expected)
    assert [name for name, _ in losses] == [name for name, _ in others]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in others], rel=tolerance, abs=tolerance)


def run(recipe: phi3v.Recipe, **options: Any) -> list[str]:
    """Trains, and gives the lines about kept features that were told."""
    events: list[TrainingEvent] = []
    phi3v.train(recipe, on_event=events.append, **options)
    return [event.line for event in events if event.kind == "kept"]


def test_the_tower_sees_each_image_once_and_the_run_is_the_same(
    make: MakeRecipe, seen: list[int], tmp_path: Path
) -> None:
    """Three epochs, three validations, and the evaluation of base and tuned model; the dropout of LoRA at work."""
    plain = make("plain", **EVALUATED)
    phi3v.train(plain)
    assert sum(seen) > 3 * 10
    for cache, where in (("memory", "in memory"), ("disk", "on disk")):
        seen.clear()
        kept = make(cache, **EVALUATED, vision={"cache": cache, "cache_folder": str(tmp_path / "features")})
        (line,) = run(kept)
        report = RunFolder(kept.output).read_features()
        assert line == f"features of 12 images are kept {where} ({report['kept_bytes'] / 1000:.1f} kB)"
        assert seen == [1] * UNIQUE  # the view of the whole is the one crop
        assert_same_run(kept, plain, 0.0)  # bit for bit: one photo went through the tower at a time there too
        scores, expected = (RunFolder(one.output).read_evaluation()["scores"] for one in (kept, plain))
        for who in ("base", "tuned"):
            assert scores[who]["loss"] == pytest.approx(expected[who]["loss"], abs=1e-5)
        answers = [[line["tuned"] for line in RunFolder(one.output).read_predictions()] for one in (kept, plain)]
        assert answers[0] == answers[1]
        assert (report["images"], report["kept"], report["computed"], report["rows"]) == (12, 12, 12, 14)
    seen.clear()
    again = make("again", **EVALUATED, vision={"cache": "disk", "cache_folder": str(tmp_path / "features")})
    run(again)
    phi3v.evaluate(again.output)
    assert seen == [] and RunFolder(again.output).read_features()["computed"] == 0
    assert_same_run(again, plain, 0.0)


def test_trials_share_what_is_in_memory(make: MakeRecipe, seen: list[int]) -> None:
    store = FeatureMemory(10**9)
    for name, rate in (("first", 1e-4), ("second", 1e-3)):
        settings = {"max_steps": 1, "learning_rate": rate}
        phi3v.train(make(name, vision={"cache": "memory"}, training=settings), features=store)
    assert sum(seen) == UNIQUE


def test_one_changed_pixel_and_one_changed_weight_are_seen(
    make: MakeRecipe, world: Path, seen: list[int], tmp_path: Path
) -> None:
    shutil.copytree(world, tmp_path / "changed")
    places = {"data": {"train": str(tmp_path / "changed" / "photos" / "rows.jsonl")}, "training": {"max_steps": 1}}
    vision = {"cache": "disk", "cache_folder": str(tmp_path / "features")}

    def computed(name: str) -> int:
        seen.clear()
        recipe = make(name, model=str(tmp_path / "changed" / "model"), vision=vision, **places)
        phi3v.train(recipe)
        assert sum(seen) == RunFolder(recipe.output).read_features()["computed"]
        return sum(seen)

    assert computed("first") == UNIQUE
    photo = tmp_path / "changed" / "photos" / "4.png"
    with Image.open(photo) as image:
        image.load()
    image.putpixel((3, 3), (1, 2, 3))
    image.save(photo)
    assert computed("pixel") == 1
    file = tmp_path / "changed" / "model" / "model.safetensors"
    weights = load_file(file)
    separator = weights["model.vision_embed_tokens.sub_GN"].view(-1)
    separator[5] = torch.nextafter(separator[5], torch.tensor(9.0))
    save_file(weights, file, metadata={"format": "pt"})
    assert computed("weight") == UNIQUE
    weights["lm_head.weight"].view(-1)[0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    assert computed("another head") == 0


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_does_not_fit_is_said_and_goes_through_the_tower_each_time(
    make: MakeRecipe, trained: MakeRecipe, seen: list[int], filled: list[int], tmp_path: Path, cache: str
) -> None:
    plain = trained()
    room = 5 * ENTRY + 4_000
    vision = {"cache": cache, "cache_gb": room / 10**9, "cache_folder": str(tmp_path / "features")}
    little = make("little", vision=vision)
    seen.clear(), filled.clear()
    (line,) = run(little)
    where, ways = ("on disk", "") if cache == "disk" else ("in memory", ", or vision.cache=disk")
    report = RunFolder(little.output).read_features()
    assert line == report["line"]
    assert line == (
        f"features of 5 images are kept {where} ({report['kept_bytes'] / 1000:.1f} kB); the images of 7 of 14 rows go "
        f"through the tower each time: vision.cache_gb={room / 10**9:g} is full, all need about 480.8 kB "
        f"(vision.cache_gb{ways})"
    )
    assert report["kept_bytes"] <= room and report["computed"] == 5 and report["limit_bytes"] == room
    assert sum(path.stat().st_size for path in tmp_path.rglob("features/*/*.safetensors")) <= room
    assert filled and set(filled) == {1}  # micro-batches of one photo with features and one with pixels were there
    assert 5 + 2 * 7 <= sum(seen) <= 5 + 2 * (7 + 2)  # the last step of an epoch repeats two rows
    assert_same_run(little, plain, 1e-5)


def test_a_trained_projector_is_not_kept_and_that_is_said(make: MakeRecipe, seen: list[int]) -> None:
    recipe = make(vision={"cache": "memory", "projector": "train"}, training={"max_steps": 1})
    assert run(recipe) == [
        "vision.cache=memory is not used: parts that see are trained, so features change with each step"
    ]
    assert not RunFolder(recipe.output).features.exists()


def test_features_that_are_taken_away_are_missed_and_nothing_else(
    make: MakeRecipe, seen: list[int], tmp_path: Path
) -> None:
    """Another process with a smaller bound empties the folder in the middle of a run."""
    plain = make("plain", training={"micro_batch_size": 1})
    vision = {"cache": "disk", "cache_folder": str(tmp_path / "features")}
    robbed = make("robbed", vision=vision, training={"micro_batch_size": 1})

    def rob(event: TrainingEvent) -> None:
        if event.kind == "step" and event.step == 2:
            seen.clear()
            shutil.rmtree(tmp_path / "features")

    phi3v.train(plain)
    phi3v.train(robbed, on_event=rob)
    assert 4 * 5 <= sum(seen) <= 4 * 6  # six more steps of four photos, one of which may be read ahead
    assert_same_run(robbed, plain, 0.0)


def test_the_look_at_images_uses_loader_workers_and_ends_when_nothing_fits(world: Path) -> None:
    from phi3v.loading import load_target

    model = load_target(world / "model").model
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[336, 336]])
    photos = [torch.rand(1, 2, 3, 336, 336, generator=generator) for _ in range(22)]
    samples = [{"input_ids": torch.tensor([1]), "pixel_values": one, "image_sizes": sizes} for one in photos]
    rows: list[int] = []
    cache = FeatureCache(VisionFeatures(model, FeatureMemory(2 * ENTRY)), workers=1)
    state = torch.get_rng_state()
    kept = cache.keep(samples, rows.append)
    assert torch.equal(torch.get_rng_state(), state)  # it decides about dropout
    assert rows == list(range(1, 19))  # two that fit, sixteen that do not
    assert ["image_features" in kept[row] for row in range(22)] == [True] * 2 + [False] * 20
    report = cache.report()
    assert (report.images, report.kept, report.rows, report.whole_rows) == (18, 2, 22, 2)
    assert report.needed_bytes == 22 * ENTRY and not report.complete


class Ending(list[Any]):
    """Samples of which one ends or stops the worker that makes it."""

    signal = 0

    def __getitem__(self, index: Any) -> Any:
        if index == 3 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), self.signal)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("number", "after", "what"),
    [(signal.SIGKILL, 45.0, "was ended from outside"), (signal.SIGSTOP, 2.0, "gave no")],
)
def test_a_worker_of_the_look_that_is_gone_or_stuck_is_one_line(
    world: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: float, what: str
) -> None:
    from phi3v.loading import load_target

    features = VisionFeatures(load_target(world / "model").model, FeatureMemory(2 * ENTRY))
    original = WatchedWorkers.__init__
    monkeypatch.setattr(WatchedWorkers, "__init__", lambda self, workers: original(self, workers, stuck_after=after))
    samples = Ending({"input_ids": torch.tensor([1])} for _ in range(8))
    samples.signal = number
    with pytest.raises(TrainingError, match=f"^a loader worker {what} .* while images were looked at .*num_workers; "):
        FeatureCache(features, workers=2).keep(samples)


def test_a_row_is_packed_without_loss() -> None:
    example = {
        "input_ids": torch.tensor([1, *[32044] * 2509, 7, 7, 2]),
        "labels": torch.tensor([*[-100] * 2511, 7, 2]),
        "attention_mask": torch.ones(2513, dtype=torch.long),
        "image_sizes": torch.tensor([[1344, 1344]]),
    }
    packed = Packed.of({**example, "pixel_values": torch.zeros(1, 17, 3, 2, 2)})
    found = packed.example()
    assert set(found) == set(example) and all(torch.equal(found[name], example[name]) for name in example)
    assert all(found[name].dtype == example[name].dtype for name in example)
    assert sum(len(part) for _, _, *parts in packed.parts.values() for part in parts) < 200


def test_the_line_about_a_folder_that_cannot_be_written(make: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    vision = {"cache": "disk", "cache_folder": str(tmp_path / "file" / "features")}
    (line,) = run(make(vision=vision, training={"max_steps": 1}))
    assert line.startswith("features of 0 images are kept on disk (0.0 kB); the images of 14 of 14 rows go through")
    assert line.endswith("written (Not a directory); free space there, or name another folder in vision.cache_folder")


def test_the_report_is_plain_json() -> None:
    report = FeatureReport("memory", 260, 260, 260, 4 * 10**9, 4 * 10**9, 10_000, 260, 154 * 10**9)
    assert json.loads(json.dumps(report.to_dict()))["line"] == (
        "features of 260 images are kept in memory (4.0 GB); the images of 9740 of 10000 rows go through the tower each"
        " time: vision.cache_gb=4 is full, all need about 154.0 GB (vision.cache_gb, or vision.cache=disk)"
    )
