"""`phi3v profile`: a few steps of a recipe's training, taken apart."""

import json
import os
from pathlib import Path

import pytest
import torch

from phi3v.cli_screen import rows_line
from phi3v.data.synthetic import write_synthetic_rows
from phi3v.errors import ConfigError
from phi3v.first_look import RowUse
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.device_time import DeviceWatch, check_trace, covered
from phi3v.training.profile import PartTime, Profile, _of_its_own, advise, floor_operations, profile, watched_recipe
from phi3v.training.step_marks import PARTS, SeenBatch


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    """A profile of a recipe on its own rows, with a trace, and where that lies."""
    import phi3v

    folder = tmp_path_factory.mktemp("profiled")
    recipe = phi3v.Recipe.from_dict(
        {
            "model": str(world / "model"),
            "data": {"train": str(world / "photos" / "rows.jsonl"), "prompt": "Which?", "answer": "{colour}"},
            "lora": {"r": 4},
            "training": {"samples_per_step": 4, "micro_batch_size": 2, "save_steps": 1, "eval_steps": 1},
            "output": str(folder / "run"),
        }
    )
    return profile(recipe, steps=2, warm=1, trace=folder / "trace.json"), folder


def test_the_parts_of_a_step_add_up(found):
    told, _ = found
    assert [part.name for part in told.parts] == list(PARTS)
    assert told.steps == 2 and told.samples_per_step == 4 and told.micro_batches >= 1
    assert sum(part.seconds for part in told.parts) == pytest.approx(told.seconds)
    for name in ("waiting for data", "tower", "decoder forward", "loss", "decoder backward", "optimiser"):
        assert told.share(name) > 0, name
    assert told.share("tower backward") == 0, "nothing of the tower is trained"
    assert told.tokens > 4 * 300 and told.images == 4, "four photos of 313 tokens each, and text"
    assert told.decode_seconds > 0 and told.device_idle is None
    assert 0 < told.floor_share < 1


def test_the_run_of_the_recipe_is_not_touched(found):
    _, folder = found
    assert not (folder / "run").exists()


def test_the_trace_is_one_that_perfetto_reads(found):
    told, folder = found
    trace = json.loads((folder / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any("mm" in name for name in names)
    for part in ("tower", "decoder forward", "loss", "backward and clipping"):
        assert names.count(part) == round(told.steps * told.micro_batches) == 4, part
    assert names.count("transfer") == names.count("optimiser") == told.steps


def test_generated_rows_take_the_place_of_the_recipes(make, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    auto = {"micro_batch_size": "auto", "gradient_checkpointing": "auto", "epochs": 1}
    recipe = make(data={"train": "there/is/no/such/file.csv"}, training=auto, vision={"cache": "disk"})
    events = {}
    told = profile(
        recipe,
        steps=1,
        warm=1,
        rows=3,
        images=[[(64, 48)]],
        words=20,
        on_event=lambda event: events.update({event.kind: event}),
    )
    assert told.steps == 1 and told.tokens > 4 * 300
    assert told.advice is None or "checkpointing" not in told.advice.key  # auto came to false
    assert events["rows"].rows.train == 2 * 4, "one epoch holds both steps, so no worker begins again between them"
    assert events["kept"].line.startswith("features of 3 images are kept on disk") and told.images == 0
    assert not (tmp_path / "cache").exists(), "features of generated photos are not among the user's"


@pytest.mark.parametrize("fsdp", [True, False])
def test_layers_that_ranks_compute_twice_are_computed_twice(make, tmp_path, fsdp):
    checkpointed = {"fsdp": fsdp, "fsdp_config": {"activation_checkpointing": True}}
    training = watched_recipe(make(training=checkpointed), 3, tmp_path)["training"]
    assert not any(key.startswith("fsdp") for key in training)
    assert bool(training.get("gradient_checkpointing")) is fsdp


def test_that_the_steps_are_few_is_no_word_about_the_recipes_rows():
    told = []
    _of_its_own(told.append)(TrainingEvent("rows", 0, 2, rows=RowUse(8, 0, 1, {"url_gone": 1}, 4, not_drawn=16)))
    _of_its_own(told.append)(TrainingEvent("step", 1, 2))
    assert rows_line(told[0].rows).startswith("8 rows to train on, 0 held out; 1 row is left out (1 url_gone)")
    assert told[1].kind == "step"


def test_generated_rows_are_of_the_stated_shape(tmp_path):
    from PIL import Image

    section = write_synthetic_rows(tmp_path / "rows", 3, [[(90, 60)], [(60, 90), (30, 30)]], 10)
    lines = [json.loads(line) for line in Path(section["train"]).read_text().splitlines()]
    assert len(lines) == 3 and all(len(line["answer"].split()) == 10 for line in lines)
    photos = [[Image.open(tmp_path / "rows" / name) for name in line["images"]] for line in lines]
    assert [[photo.size for photo in row] for row in photos] == [[(90, 60)], [(60, 90), (30, 30)], [(90, 60)]]
    assert len({photo.tobytes() for row in photos for photo in row}) == 4
    again = write_synthetic_rows(tmp_path / "again", 2, [[(90, 60)]], 10, lines=5)
    lines = [json.loads(line)["images"] for line in Path(again["train"]).read_text().splitlines()]
    assert lines == [["0_0.jpg"], ["1_0.jpg"], ["0_0.jpg"], ["1_0.jpg"], ["0_0.jpg"]]


def test_lengths_are_read_off_whatever_says_them():
    def batch(borders=None, mask=None, labels=None) -> SeenBatch:
        return SeenBatch((2, 3), borders, mask, labels, None, None)

    assert batch(borders=torch.tensor([0, 3, 5])).lengths == [3, 2]
    assert batch(mask=torch.tensor([[1, 1, 0], [1, 1, 1]])).lengths == [2, 3]
    assert batch(mask=torch.tensor([[0, 1, 1], [0, 1, 2]])).lengths == [2, 3]
    assert batch().lengths == [3, 3]
    assert batch(labels=torch.tensor([[5, -100, 7], [-100, 6, 7]])).trained == 3


def test_the_floor_counts_the_tower_for_images_without_features(make):
    borders, labels, sizes = torch.tensor([0, 400, 900]), torch.ones(1, 900), [[336, 336], [672, 672]]

    def operations(sizes, features=None, tower="frozen"):
        recipe = make(vision={"tower": tower})
        return floor_operations(recipe, [SeenBatch((1, 900), borders, None, labels, sizes, features)])

    none, first = operations(None), torch.empty(313, 0)
    small, large = operations(sizes[:1]) - none, operations(sizes[1:]) - none
    assert 0 < small < large
    assert operations(sizes) - none == pytest.approx(small + large)
    for tower, passes in (("lora", 2), ("train", 3)):  # back through it too, and what its weights learn
        assert operations(sizes, tower=tower) - none == pytest.approx(passes * (small + large))
    assert operations(torch.tensor(sizes), [first, None]) - none == pytest.approx(large)
    assert operations(sizes, [torch.empty(313 + 757, 0)]) == none


def test_what_cannot_be_is_refused_before_a_step(make, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3v.training.profile.train_watched", lambda *given, **more: pytest.fail("trained"))
    with (
        monkeypatch.context() as ranks,
        pytest.raises(ConfigError, match="one process, and here are 2: start it alone"),
    ):
        ranks.setenv("RANK", "0")
        ranks.setenv("WORLD_SIZE", "2")
        profile(make())
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    mine = tmp_path / "shop.yaml"
    mine.write_text("model: mine\n")
    for place, words in (
        (tmp_path, "is a folder or a device: name a file"),
        (fifo, "is a folder or a device: name a file"),
        (tmp_path / "none" / "t.json", r"cannot be written \(.*\): name a file in a folder that is there"),
    ):
        with pytest.raises(ConfigError, match=f"^trace {place} {words}$"):
            profile(make(), trace=place)
    with pytest.raises(ConfigError, match=f"^--trace {mine} is there and is no trace of phi3v profile: name another"):
        profile(make(), trace=mine)
    assert mine.read_text() == "model: mine\n"
    monkeypatch.setattr("phi3v.training.profile.write_synthetic_rows", lambda *given, **more: pytest.fail("painted"))
    with pytest.raises(ConfigError, match="^--image 5000x5000 is 25,000,000 pixels, more than image.max_pixels of 20"):
        profile(make(), rows=1, images=[[(64, 48), (5000, 5000)]])
    with pytest.raises(ConfigError, match="^--image 70000x9: .* at most 65,500 pixels a side"):
        profile(make(), rows=1, images=[[(70_000, 9)]])
    with pytest.raises(
        ConfigError, match="^--image 2x3000: an image of 2x3000 pixels is too narrow: at num_crops=1 it"
    ):
        profile(make(), rows=1, images=[[(2, 3000)]])
    assert sorted(tmp_path.iterdir()) == [fifo, mine]


def test_a_trace_that_is_not_there_afterwards_is_an_error(tmp_path, capfd):
    def watched() -> DeviceWatch:
        watch = DeviceWatch(torch.device("cpu"), traced=True)
        watch.start()
        torch.ones(3).add(1)
        watch.stop()
        return watch

    check_trace(tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
    watched().write_trace(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    for name in ("t.json", "t.json.gz"):
        watched().write_trace(tmp_path / name)
        check_trace(tmp_path / name)  # an earlier one may be written over
    with pytest.raises(ConfigError, match="was not written"):
        watched().write_trace(tmp_path / "gone" / "t.json")
    assert "profiler_start" not in capfd.readouterr().err


def test_a_gpu_that_tells_of_no_kernels_is_not_called_idle(monkeypatch):
    monkeypatch.setattr(DeviceWatch, "_wait", lambda watch: None)
    watch = DeviceWatch(torch.device("cpu"), traced=True)
    watch.start()
    watch.device = torch.device("cuda")
    watch.stop()
    assert watch.busy_seconds is None and watch.seconds > 0


def test_intervals_cover_what_they_cover():
    assert covered([(2, 5), (0, 4), (8, 9)]) == 6
    assert covered([(0, 9), (1, 2), (3, 4)]) == 9
    assert covered([]) == 0


SHARES = {"waiting for data": 0.0, "tower": 0.02, "decoder forward": 0.4, "decoder backward": 0.58}


def profiled(shares=SHARES, **seen) -> Profile:
    """Steps of four samples in two micro-batches, with some shares of their parts."""
    parts = [PartTime(name, shares.get(name, 0.0), None) for name in PARTS]
    values = {"steps": 5, "samples_per_step": 4, "micro_batches": 2.0, "tokens": 900.0, "padding": 0.0, "images": 4.0}
    values |= {"seconds": sum(part.seconds for part in parts), "parts": parts, "decode_seconds": 0.2}
    values |= {"device": "cuda", "device_idle": None, "weights_gib": 1.0, "floor_share": 0.3, "rate": 1e12}
    return Profile(**{**values, "advice": None, "trace": None, **seen})


def test_nothing_is_said_against_what_auto_chose(make):
    told = profiled(device_idle=0.4)
    keys = ["training.gradient_checkpointing", "training.micro_batch_size"]
    recipe = make(training={"gradient_checkpointing": True})
    assert [advise(recipe, told, chosen=keys[:count]).key for count in (0, 1)] == keys
    assert advise(recipe, told, chosen=keys) is None


@pytest.mark.parametrize(
    ("training", "micro_batches", "change"),
    [
        ({"samples_per_step": 12, "micro_batch_size": 4}, 3.0, "training.micro_batch_size=6"),
        ({"samples_per_step": 16, "micro_batch_size": 1}, 9.0, "training.micro_batch_size=2"),
        ({"samples_per_step": 4, "micro_batch_size": 4}, 2.0, None),  # halved, as memory was short
        ({"samples_per_step": 1, "micro_batch_size": 1}, 1.0, None),
        ({"tokens_per_micro_batch": 500}, 2.0, "training.tokens_per_micro_batch=1000"),
        ({"tokens_per_micro_batch": 300}, 2.0, "training.tokens_per_micro_batch=900"),  # samples of 450 go alone
        ({"tokens_per_micro_batch": 900}, 1.0, None),
    ],
)
def test_a_gpu_with_nothing_to_do_gets_more_at_once_where_there_is_more(make, training, micro_batches, change):
    recipe = make(training=training)
    advice = advise(recipe, profiled(device_idle=0.4, micro_batches=micro_batches))
    assert (advice and f"{advice.key}={advice.value}") == change
    if change:
        recipe.with_overrides([change])  # which refuses what `train` would


@pytest.mark.parametrize(
    ("shares", "changes", "key"),
    [
        ({"waiting for data": 0.5}, {}, "training.dataloader_num_workers"),
        ({"waiting for data": 0.5}, {"training": {"dataloader_num_workers": 9}}, "image.fast"),
        ({"tower": 0.3}, {}, "vision.cache"),
        ({"tower": 0.3}, {"training": {"max_steps": 5}}, None),
        ({"tower": 0.3}, {"vision": {"tower": "train"}}, None),
        ({}, {"training": {"gradient_checkpointing": True}}, "training.gradient_checkpointing"),
        ({}, {"training": {"activation_checkpointing": True}}, "training.activation_checkpointing"),
        ({}, {}, None),
    ],
)
def test_the_advice_follows_from_what_was_seen(make, shares, changes, key, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # more workers are never advised
    advice = advise(make(**changes), profiled({**SHARES, **shares}))
    assert (advice.key if advice else None) == key
    assert advice is None or not advice.key.endswith("workers") or advice.value == "1"


def test_advice_about_images_needs_images_and_about_layers_says_how_many(make):
    workers = make(training={"dataloader_num_workers": 9})
    assert advise(workers, profiled({**SHARES, "waiting for data": 0.5}, images=0.0)) is None

    def told(every):
        kwargs = {"every_n_layers": every}
        return advise(
            make(training={"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}), profiled()
        )

    assert told(1).reason.startswith("each layer is computed twice")
    assert told(2).reason.startswith("one layer in 2 is computed twice")
    assert told(12) is None, "three of 32 layers are not what would change most"
