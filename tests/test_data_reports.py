"""`phi3v data check` and `data show` say the same, and name what is left out: rows, files, splits; errors as JSON."""

import contextlib
import json
import os
import re
from io import StringIO
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import test_data_cli
from image_server import image_server
from PIL import Image
from rich.console import Console
from test_data_cli import write_rows

from phi3v.cli_data_screen import _show_problems
from phi3v.data.check import Report
from phi3v.data.image_cache import in_shard
from phi3v.data.reading import Reading
from phi3v.data.schema import RowProblem
from phi3v.data.show import join_crops
from phi3v.data.sources import stream_data
from phi3v.errors import DataError
from phi3v.first_look import row_options
from phi3v.loading import load_processor
from phi3v.recipe import Recipe
from phi3v.training.data_show import show_recipe
from phi3v.training.samples import augmented_images, encoded_rows, read_data

folder, model, run = test_data_cli.folder, test_data_cli.model, test_data_cli.run


def spoil_rows(folder: Path) -> None:
    """Row 0 does not decode, and row 1 is longer than 1,000 tokens."""
    photo = bytearray((folder / "photos" / "0.png").read_bytes())
    photo[photo.index(b"IDAT") + 6] ^= 0xFF
    (folder / "photos" / "bad.png").write_bytes(photo)  # its header and its end are sound
    rows = [json.loads(line) for line in (folder / "photos" / "rows.jsonl").read_text().splitlines()]
    rows[0]["image"], rows[1]["colour"] = "bad.png", "red " * 2000
    write_rows(folder, rows)


def test_show_and_check_say_the_same_of_rows_that_only_decoding_shows_to_be_bad(run: Any, folder: Path) -> None:
    spoil_rows(folder)
    words = [folder / "recipe.yaml", "data.max_length=1000", "data.max_skipped=0.2", "--json"]
    for more, usable in (([], 36), (["--quick"], 37)):
        checked, shown = (json.loads(run(name, *words, *more).stdout) for name in ("check", "show"))
        assert shown["usable"] == checked["usable"] == usable
        for key in ("rows", "problems", "decoded"):
            assert shown[key] == checked[key]
    found = json.loads(run("show", *words, "data.split=null", "--rows", 40, "--text").stdout)
    assert {row["row"]: row["problem"] for row in found["shown"] if row["problem"]} == {
        problem["row"]: problem["message"] for problem in found["problems"] if problem["row"] in (0, 1)
    }


def test_show_has_images_as_the_first_epoch_changes_them(folder: Path) -> None:
    """By the row's place among those that training reads: a long one has none, a damaged one has."""
    spoil_rows(folder)
    more = ["data.max_length=1000", "data.max_skipped=0.2", "data.split=null", "training.seed=3"]
    plain = Recipe.load(folder / "recipe.yaml", more)
    changed = plain.with_overrides(["image.augment={crop: 0.3, rotate: 20, brightness: 0.5}"])
    processor = load_processor(changed.model.name, **changed.image.processor_options)
    data = read_data(changed, processor, lambda stage, done, total: None)
    samples = encoded_rows(changed, data.train, processor, augmented=augmented_images(changed))
    places = {row.index: place for place, row in enumerate(data.train)}
    assert (places[0], places[2]) == (0, 1)
    found = {name: show_recipe(recipe, rows=4) for name, recipe in (("plain", plain), ("changed", changed))}
    for before, after in list(zip(found["plain"].shown, found["changed"].shown, strict=True))[1:]:
        (was,), (seen,) = before.images, after.images
        crops = [
            Image.fromarray(crop.numpy()) for crop in samples[places[after.row]]["pixel_values"].permute(0, 2, 3, 1)
        ]
        assert was.photo.tobytes() == seen.photo.tobytes()
        assert join_crops(crops, seen.rows, seen.columns).tobytes() == seen.canvas.tobytes()
        assert seen.canvas.tobytes() != was.canvas.tobytes() and (was.changed, seen.changed) == (False, True)
    pages = [found[name].page().count("as training's first epoch sees it") for name in ("plain", "changed")]
    assert pages == [0, 3]


def test_check_names_what_is_not_read(run: Any, folder: Path) -> None:
    photos = folder / "photos"
    photos.joinpath("old.csv").write_text("image,colour\n")
    for name in ("a.txt", "b.txt", ".c"):
        photos.joinpath(name).write_text("x")
    words = ["check", folder / "recipe.yaml", "--quick", f"data.train={photos}"]
    photos.joinpath("rows.jsonl").rename(photos / "rows-1.jsonl")
    photos.joinpath("rows-2.jsonl").write_text(json.dumps({"image": "0.png", "colour": "red"}) + "\n")
    found = json.loads(run(*words, "--json").stdout)
    assert {Path(one["file"]).name for one in found["not_read"]} >= {"old.csv", "a.txt", "b.txt", ".c"}
    assert f"{photos}/0.png" not in {one["file"] for one in found["not_read"]}
    assert (found["problems"][0]["source"], found["problems"][0]["row"]) == (f"{photos}/rows-1.jsonl", 3)
    lines = run(*words).stdout.splitlines()
    assert f"not read, json files are read here: name it itself to read it: {photos}/old.csv" in lines
    by_rows = "no data by its ending, and no row that can be used names it"
    assert f"2 not read, {by_rows}: {photos}/a.txt, {photos}/b.txt" in lines
    assert "not read" not in run("check", photos / "rows-1.jsonl", *words[2:3], "data.answer='{colour}'").stdout


def test_rows_that_weights_leave_out_are_counted_set_by_set(run: Any, folder: Path) -> None:
    for name, count in (("a", 30), ("b", 10)):
        rows = [{"image": f"{number % 4}.png", "colour": f"{name} {number}"} for number in range(count)]
        (folder / "photos" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ", ".join(f"{{source: {folder}/photos/{name}.jsonl, weight: 1}}" for name in "ab")
    words = ["check", folder / "recipe.yaml", "--quick", f"data.train=[{sets}]", "data.split=null"]
    found = json.loads(run(*words, "--json").stdout)
    assert (found["rows"], found["train"]) == (40, 40)
    assert found["sets"] == [
        {"source": f"{folder}/photos/a.jsonl", "rows": 30, "epoch": 20, "left_out": 10},
        {"source": f"{folder}/photos/b.jsonl", "rows": 10, "epoch": 20, "left_out": 0},
    ]
    lines = run(*words).stdout.splitlines()
    assert f"{folder}/photos/a.jsonl: 20 of its 30 rows in an epoch, 10 left out (weights, data.max_rows)" in lines
    assert f"{folder}/photos/b.jsonl: all of its 10 rows in an epoch, 20 with those that come again" in lines
    assert "in an epoch" not in run("check", folder / "recipe.yaml", "--quick").stdout.replace("an epoch,", "")


def test_a_set_of_a_mix_without_a_row_to_train_on_is_refused(run: Any, folder: Path) -> None:
    """However many rows may be left out, and whether the first look finds them or the tokens; one that the recipe
    itself leaves out by `data.max_rows` is not missed."""
    photos = folder / "photos"
    sound = [json.dumps({"image": f"{number}.png", "colour": f"c{number}"}) for number in range(4)]
    (photos / "a.jsonl").write_text("\n".join(sound * 2) + "\n")
    sets = "data.train=" + json.dumps([{"source": f"{photos}/{name}.jsonl", "weight": 1} for name in "ab"])
    words = ["check", folder / "recipe.yaml", "--quick", sets, "data.split=null", "data.max_skipped=1"]
    empty, long = [{"image": "0.png", "colour": None}], [{"image": "0.png", "colour": "red " * 2000}]
    for rows, reason in (
        (empty, "(1 missing_value): row 0: column 'colour' is empty"),
        (long, "(1 too_long): row 0: "),
    ):
        (photos / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = json.loads(run(*words, "data.max_length=1000", "--json").stdout)
        assert found["trouble"].startswith(f"{photos}/b.jsonl has no row to train on {reason}")
        assert found["trouble"].endswith("; mend it, or take it out of data.train")
    (photos / "b.jsonl").write_text(json.dumps(empty[0]) + "\n")
    assert f"{photos}/b.jsonl: no row to train on" in run(*words).stdout.splitlines()
    (photos / "b.jsonl").write_text(sound[0] + "\n")
    assert (
        json.loads(run(*words, sets.replace(', "weight": 1', ""), "data.max_rows=3", "--json").stdout)["trouble"]
        is None
    )


@pytest.mark.parametrize("command", ["check", "show"])
def test_errors_are_json_too(command: str, run: Any, folder: Path, model: Path) -> None:
    (folder / "broken.csv").write_text("image,title\na.jpg,Foo,extra\n")
    done = run(command, folder / "broken.csv", f"model={model}", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, done.stderr) == (1, f"phi3v: {error}\n")
    assert "broken.csv cannot be read: line 2 has 3 cells, the header has 2: put quotes around a cell" in error


def test_half_a_character_in_a_path_kills_neither_report_nor_json(run: Any, folder: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A hat."}]
    rows = [
        {"image": json.loads((folder / "photos" / "rows.jsonl").read_text().splitlines()[n])["image"]} for n in (0, 1)
    ]
    lines = [{**row, "conversations": talk} for row in [*rows, {"image": "img/\ud83d.jpg"}]]
    (folder / "photos" / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("check", folder / "photos" / "talk.jsonl", "--quick", "data.max_skipped=0.5", "data.split=null")
    found = json.loads(run(*words, "--json").stdout)
    assert [(problem["row"], problem["reason_code"]) for problem in found["problems"]] == [(2, "image_path")]
    assert "row 2: column 'image' holds half a character" in run(*words).stdout


def test_show_says_why_there_is_no_row_to_show(run: Any, folder: Path) -> None:
    write_rows(folder, [{"image": "0.png", "colour": None}] * 2)
    done = run("show", folder / "recipe.yaml")
    told = "rows.jsonl: 2 of 2 rows cannot be used (2 missing_value): row 0: column 'colour' is empty"
    assert done.exit_code == 1 and "no row can be shown: " in done.stdout and told in done.stdout
    found = json.loads(run("show", folder / "recipe.yaml", "--json").stdout)
    assert (found["rows"], found["usable"], len(found["problems"]), found["page"]) == (2, 0, 2, None)
    assert not list(folder.glob("*.html"))


def test_show_writes_over_its_own_pages_and_nothing_else(run: Any, folder: Path) -> None:
    done = run("show", folder / "recipe.yaml", "--out", folder / "photos")
    assert done.exit_code == 1
    assert (
        done.stderr
        == f"phi3v: --out {folder}/photos is a folder: name the page, {folder}/photos/rows.html for instance\n"
    )
    for place in (folder / "recipe.yaml", folder / "photos" / "rows.jsonl"):
        before = place.read_bytes()
        done = run("show", folder / "recipe.yaml", "--out", place)
        told = f"phi3v: --out {place} is there and is no page of phi3v data show: name another file, or remove it\n"
        assert (done.exit_code, done.stderr, place.read_bytes()) == (1, told, before)
    os.mkfifo(folder / "pipe")
    assert run("show", folder / "recipe.yaml", "--out", folder / "pipe").exit_code == 1
    for rows in (1, 2):
        assert run("show", folder / "recipe.yaml", "--quick", "--rows", rows, "--out", "own.html").exit_code == 0
        assert Path("own.html").read_text().count("<article>") == rows


def test_a_budget_counts_whatever_the_model_ships_with_and_what_has_no_effect_is_said(
    run: Any, folder: Path, model: Path
) -> None:
    words = ["check", folder / "photos" / "rows.jsonl", "--quick", "data.prompt=What?", "data.answer='{colour}'"]
    for named in ([], [f"model={model}"]):  # the model ships with 1 crop
        found = json.loads(run(*words, *named, "image.max_tokens=1561", "--json").stdout)
        (chosen,) = [price for price in found["crops"] if price["chosen"]]
        assert (chosen["num_crops"], chosen["max_tokens"], found["crops_told"]) == (9, 1561, None)
    said = run(*words, f"model={model}", "image.max_tokens=131072", "image.num_crops=839").stdout
    assert (
        re.search(r"\n 839 \(chosen\) +131,072 .* \d,\d{3},\d{3} +1\d\d,\d+ +3\d *\n", said)
        and "…" not in said
        and "has no effect" not in said
    )
    told = "image.num_crops: 4 counts: image.max_tokens: 1561 would allow 9"
    assert told in run(*words, "image.max_tokens=1561", "image.num_crops=4").stdout.splitlines()
    told = "image.max_tokens: 781 counts, which allows 4: image.num_crops: 16 has no effect"
    assert told in run(*words, "image.max_tokens=781", "image.num_crops=16").stdout.splitlines()
    assert "131072" in run(*words, "image.max_tokens=1000000000").output


@pytest.mark.parametrize(("hosts", "code"), [("['127.0.0.1']", "url_busy"), ("[]", "url_private")])
def test_a_part_whose_images_do_not_come_fails_and_names_each(run: Any, folder: Path, hosts: str, code: str) -> None:
    with image_server() as server:
        urls = [server.url(f"/429-hour/{number}.png") for number in range(40)]
        if hosts == "[]":  # a literal address is a problem of its row at once; a name has to be looked up
            urls = [url.replace("127.0.0.1", "localhost") for url in urls]
        write_rows(folder, [{"image": url, "colour": "red"} for url in urls])
        words = ["check", folder / "recipe.yaml", f"data.allow_hosts={hosts}", "data.image_cache=images", "--fetch"]
        done = run(*words, "--shard", "0/2", "--json")
        part = json.loads(done.stdout)["part"]
        assert (done.exit_code, part["total"], part["downloaded"]) == (1, len(part["failures"]), 0)
        assert 0 < part["total"] < 40 and {failure["reason_code"] for failure in part["failures"]} == {code}
        assert {failure["url"] for failure in part["failures"]} < set(urls)
        lines = run(*words, "--shard", "0/2").stdout.splitlines()
        assert sum(line.startswith(f"  {code}: image {urls[0][:16]}") for line in lines) == part["total"]
        assert f"part 0/2: {part['total']} images, 0 came, {part['total']} did not" in lines
        # a part that is a small share of all rows fails too
        alone = run(*words, "--shard", "0/2", "data.max_skipped=0.9", "--json")
        found = json.loads(alone.stdout)
        assert (alone.exit_code, found["trouble"], found["usable"]) == (1, None, 40 - part["total"])
        assert f"{part['total']} of {part['total']} images did not come" in found["part"]["trouble"]


def test_a_part_that_is_started_again_is_judged_as_before(run: Any, folder: Path) -> None:
    with image_server() as server:
        urls = [server.url(f"/{kind}/{number}.png") for kind in ("good", "404", "403") for number in range(40)]
        mine = [url for url in urls if in_shard(url, (0, 2))]
        counts = {"good": 4, "404": 1, "403": 1}
        urls = [url for kind, count in counts.items() for url in [url for url in mine if f"/{kind}/" in url][:count]]
        write_rows(folder, [{"image": url, "colour": "red"} for url in urls])
        words = ["check", folder / "recipe.yaml", "data.allow_hosts=['127.0.0.1']", "data.image_cache=images"]
        words += ["data.max_skipped=0.4", "data.split=null", "--fetch", "--shard", "0/2"]
        first, again = (json.loads(run(*words, "--json").stdout) for _ in range(2))
        assert [one["part"]["total"] for one in (first, again)] == [6, 6]
        assert [(one["part"]["cached"], one["part"]["downloaded"]) for one in (first, again)] == [(0, 4), (4, 0)]
        assert first["part"]["failures"] == again["part"]["failures"] and len(first["part"]["failures"]) == 2
        assert first["passed"] and again["passed"] and first["problems"] == again["problems"]
        done = run(*words, "data.max_skipped=0.3")
        assert "part 0/2: 6 images, 4 in the cache before, 0 came, 2 did not" in done.stdout and done.exit_code == 1


@pytest.mark.parametrize(
    ("bad", "more", "trouble"),
    [
        (0, [], None),
        (0, ["data.on_problem=stop"], None),
        (5, ["data.max_skipped=0.1"], "rows.jsonl: 5 of 40 rows cannot be used (5 missing_value): row 35: "),
        (0, ["data.validation=held.jsonl"], "held.jsonl: 1 of 5 rows cannot be used (1 missing_value): row 4: "),
        (0, ["data.validation=held.jsonl", "data.max_skipped=0.2"], None),
        (
            0,
            ["data.validation=all.jsonl"],
            "rows.jsonl has no usable row to train on: each is held out, shares an image",
        ),
    ],
)
def test_rows_of_a_stream_with_a_held_out_image_do_not_count_for_check_and_for_train(
    bad: int, more: list[str], trouble: str | None, run: Any, folder: Path
) -> None:
    """A quarter of the rows behind the held-out ones is about their photo; only bad rows count."""
    names = ["0"] * 12 + ["1", "2"] * 14
    rows = [{"image": f"{name}.png", "colour": None if n >= 40 - bad else f"red {n}"} for n, name in enumerate(names)]
    write_rows(folder, rows)
    for file, held in (("held", [*rows[:4], {"image": "0.png"}]), ("all", [rows[n] for n in (0, 12, 13)])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    words = ["data.streaming=true", "training.max_steps=5", "data.split.validation=2", "data.image_root=photos", *more]
    if any("validation=" in word for word in more):
        words.remove("data.split.validation=2")
    done = run("check", folder / "recipe.yaml", "--quick", "--json", *words)
    found = json.loads(done.stdout)
    assert found["passed"] == (done.exit_code == 0) == (trouble is None) and found["skipped_share"] == (
        (bad + ("held.jsonl" in "".join(more))) / found["rows"]
    )
    assert found["reasons"]["held_out_image"] == (
        40 if "all" in "".join(more) else 12 if "held" in "".join(more) else 10
    )
    recipe = Recipe.load(folder / "recipe.yaml", words)
    with contextlib.ExitStack() as stack:
        caught = None if trouble is None else stack.enter_context(pytest.raises(DataError))
        data = stream_data(
            options=row_options(recipe), reading=Reading.of(**recipe.data.reading_options), **recipe.data.load_options
        )
        told: list[RowProblem] = []
        assert [row.index for row in islice(data.train.rows(told.append, shuffled=False), 60)][:28] == [*range(12, 40)]
    assert caught is None or (trouble in found["trouble"] and trouble in str(caught.value))


@pytest.mark.parametrize("words", [["--shard", "0/2"], ["--shard", "2/2", "--fetch"], ["--shard", "x", "--fetch"]])
def test_parts_that_are_none_are_wrong_usage(run: Any, folder: Path, words: list[str]) -> None:
    assert run("check", folder / "recipe.yaml", *words).exit_code == 2


@pytest.mark.parametrize("count", [20, 21])
def test_few_rows_that_are_left_out_are_all_named_on_the_screen(count: int) -> None:
    problem = {"source": "a.csv", "reason_code": "missing_value", "message": "empty", "fix": "fill the cell"}
    problems = [{**problem, "row": number} for number in range(count)]
    screen = StringIO()
    report = cast(Report, SimpleNamespace(problems=problems, reasons={"missing_value": count}))
    _show_problems(Console(file=screen, width=100), report)
    named = re.findall(r"a.csv, row (\d+): empty", screen.getvalue())
    assert len(named) == (20 if count == 20 else 3)
    assert ("and 18 more rows with missing_value; --json names all of them" in screen.getvalue()) == (count == 21)
