"""`phi3v data check` and `phi3v data show` as they are typed: counts, exit codes, JSON, pages, downloads in parts."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from image_server import image_server
from tiny_models import write_photos, write_tiny_model
from typer.testing import CliRunner

import phi3v
from phi3v import cli_data, cli_session
from phi3v.cli import app
from phi3v.data import survey
from phi3v.data.image_cache import in_shard
from phi3v.errors import DataError
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training import train as training

RECIPE = """
model: {model}
data:
  train: {folder}/photos/rows.jsonl
  prompt: What colour?
  answer: It is {{colour}}.
  split: {{validation: 6}}
training: {{samples_per_step: 4, micro_batch_size: 2, epochs: 2}}
evaluation: {{max_new_tokens: 4, rows: 2}}
output: {folder}/run
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; its context is 8,192 tokens and its short rope factors reach 4,096."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty rows, two of them bad, and a recipe."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in write_photos(tmp_path / "photos", 40).read_text().splitlines()]
    rows[3]["colour"] = None
    rows[9]["image"] = "gone.png"
    rows[20] = rows[24]
    write_rows(tmp_path, rows)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, model=model))
    return tmp_path


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "photos" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in this process, without hushing the libraries of the other tests."""
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    transformers.utils.logging.disable_progress_bar()
    runner = CliRunner()
    return lambda *words: runner.invoke(app, ["data", *map(str, words)])


def test_check_counts_every_row_and_names_every_problem(run: Any, folder: Path) -> None:
    done = run("check", folder / "recipe.yaml", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["rows"], found["usable"], found["train"] + found["validation"]) == (40, 38, 38)
    named = [(problem["row"], problem["reason_code"]) for problem in found["problems"]]
    assert named == [(3, "missing_value"), (9, "image_path")]
    assert found["problems"][0]["fix"] == "fill the cell, or take the column out of the template"
    assert found["reasons"] == {"missing_value": 1, "image_path": 1} and found["skipped_share"] == 0.05
    assert found["passed"] and found["decoded"] and found["images"]["count"] == 12  # four colours, three widths
    assert (found["lengths"]["image"]["least"], found["lengths"]["image"]["most"]) == (313, 313)
    assert (found["context"], found["rope_limit"], found["beyond_rope"]) == (8192, 4096, 0)
    assert (found["outlook"]["steps_per_epoch"], found["outlook"]["steps"]) == (8, 16)
    assert found["outlook"]["operations"] > 1e9 and found["outlook"]["rate"] > 1e6
    assert [price["square"] for price in found["crops"]] == [2509, 757, 313, 757]
    duplicates = found["duplicates"]
    assert duplicates["rows_in_train"] + duplicates["rows_in_both"] > 0 and duplicates["examples"]
    assert not (folder / "run").exists()


def test_check_says_it_to_people(run: Any, folder: Path) -> None:
    done = run("check", folder / "recipe.yaml", "--quick")
    assert done.exit_code == 0, done.output
    lines = [
        "40 rows, 38 usable: 32 to train on, 6 held out (split off)",
        "headers read, none decoded",
        "rows.jsonl, row 3: column 'colour' is empty",
        "what images cost",
        "steps: 8 steps of 4 samples an epoch, 16 in all",
        "5.0 % of the rows are left out, 5.0 % may be",
    ]
    assert [line for line in lines if line not in done.stdout.replace("rows.jsonl:", "rows.jsonl")] == []
    assert "micro-batches: 2 a step, packed, of at most " in done.stdout


def test_too_many_problems_are_exit_code_1_with_the_whole_report(run: Any, folder: Path) -> None:
    for words in (["data.max_skipped=0.04"], ["data.on_problem=stop"], ["data.max_length=330"]):
        done = run("check", folder / "recipe.yaml", *words, "--json")
        found = json.loads(done.stdout)
        assert (done.exit_code, found["passed"]) == (1, False)
        assert found["rows"] == 40 == found["usable"] + len(found["problems"])
    assert found["reasons"] == {"too_long": 38, "missing_value": 1, "image_path": 1}
    assert found["lengths"]["total"]["least"] > 330 and found["beyond_context"] == 38
    assert (found["context"], found["limit"]) == (8192, 330)


def test_a_limit_above_the_models_context_lets_no_row_beyond_it_pass(run: Any, folder: Path) -> None:
    write_rows(folder, [{"image": "0.png", "colour": "red " * (9000 * (n == 5) + 1)} for n in range(20)])
    words = [folder / "recipe.yaml", "data.split=null", "data.max_length=100000"]
    found = json.loads(run("check", *words, "--quick", "--json").stdout)
    assert (found["context"], found["limit"], found["beyond_context"]) == (8192, 8192, 1)
    assert [(problem["row"], problem["reason_code"]) for problem in found["problems"]] == [(5, "too_long")]
    assert "1 beyond the limit of 8,192" in run("check", *words, "--quick").stdout


def test_rows_of_which_none_can_be_used_or_split_are_reported_too(run: Any, folder: Path) -> None:
    write_rows(folder, [{"image": "gone.png", "colour": "red"}] * 2)
    done = run("check", folder / "recipe.yaml")
    assert done.exit_code == 1 and "2 rows, 0 usable" in done.stdout and "100 % of the rows are left out" in done.stdout
    done = run("check", folder / "recipe.yaml", "data.max_skipped=1")
    told = done.stdout.splitlines()[-1]
    assert "refuses them: " in told and "rows.jsonl: 2 of 2 rows cannot be used (2 image_path): row 0: " in told
    assert told.endswith("; no row is left to train on: mend the data") and "data.split" not in told
    write_rows(folder, [{"image": "0.png", "colour": "red"}])
    done = run("check", folder / "recipe.yaml")
    assert done.exit_code == 1 and "1 row, 1 usable" in done.stdout and "cannot be split into train and" in done.stdout


@pytest.mark.parametrize(
    ("bad", "more", "refused"),
    [
        ((0, 0), [], None),
        ((2, 2), [], None),  # 4 of 80
        ((3, 0), [], "a.jsonl: 3 of 40 rows cannot be used"),  # 3 of 80 in all, and more than the share of one set
        ((2, 2), ["data.on_problem=stop"], "data.on_problem is stop"),
        ((40, 0), ["data.max_skipped=1.0"], "a.jsonl has no row to train on (40 missing_value): row 0: "),
        ((40, 40), ["data.max_skipped=1.0"], "no row is left to train on"),
        ((0, 0), ["data.max_length=330"], "80 too_long"),
        ((0, 0), ["data.max_length=330", "data.max_skipped=1.0"], "no row is left to train on"),
    ],
)
def test_check_and_train_refuse_the_same_before_a_model_is_loaded(
    bad: tuple[int, int], more: list[str], refused: str | None, run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"{number % 4}.png", "colour": f"red {number}"} for number in range(40)]
    for name, count in zip("ab", bad, strict=True):
        lines = [json.dumps({**row, "colour": None} if n < count else row) + "\n" for n, row in enumerate(rows)]
        (folder / "photos" / f"{name}.jsonl").write_text("".join(lines))
    sets = f"data.train=[{{source: {folder}/photos/a.jsonl}}, {{source: {folder}/photos/b.jsonl}}]"
    words = [sets, "data.split=null", *more]
    done = run("check", folder / "recipe.yaml", "--quick", "--json", *words)
    found = json.loads(done.stdout)
    monkeypatch.setattr(training, "prepare_model", lambda recipe, device, *rest: pytest.fail("the model is loaded"))
    with pytest.raises((DataError, pytest.fail.Exception)) as caught:
        phi3v.train(Recipe.load(folder / "recipe.yaml", words))
    trained = None if isinstance(caught.value, pytest.fail.Exception) else str(caught.value)
    assert (found["trouble"], done.exit_code) == (trained, 0 if trained is None else 1)
    assert trained == refused if refused is None else trained is not None and refused in trained


def test_of_a_stream_the_first_rows_are_looked_at(run: Any, folder: Path) -> None:
    words = ["data.streaming=true", "data.split.validation=4", "training.max_steps=5"]
    done = run("check", folder / "recipe.yaml", *words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["sampled"] and found["rows"] == 40 == found["usable"] + len(found["problems"])
    assert {problem["reason_code"] for problem in found["problems"]} >= {"missing_value", "image_path"}
    assert (found["outlook"]["steps_per_epoch"], found["outlook"]["steps"]) == (None, 5)
    assert "the first 40 rows of a stream" in run("check", folder / "recipe.yaml", *words).stdout
    assert run("show", folder / "recipe.yaml", *words, "--text", "--rows", 1).exit_code == 0


@pytest.mark.parametrize(
    ("rows", "bad", "more", "line"),
    [
        (40, True, [], "40 of 40 rows cannot be used (40 missing_value): row 0: column 'colour' is empty; "),
        (2500, True, [], "1000 of 1000 rows cannot be used (1000 missing_value): row 0: "),
        (2500, True, ["data.max_skipped=1.0"], "; no row is left to train on: mend the data"),
        (2500, True, ["data.split.validation=4"], "1000 of 1000 rows cannot be used (1000 missing_value): row 0: "),
        (
            4,
            False,
            ["data.split.validation=4"],
            "asks for 4 rows, and the sets have no more: no row is left to train on",
        ),
        (40, False, ["data.max_length=10"], "40 of 40 rows cannot be used (40 too_long): row 0: "),
        (40, False, [], None),
    ],
)
def test_a_stream_of_bad_rows_is_refused_before_a_model_is_loaded_with_the_reasons(
    rows: int, bad: bool, more: list[str], line: str | None, run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(folder, [{"image": f"{n % 3}.png", "colour": None if bad else "red"} for n in range(rows)])
    split = [] if "split" in "".join(more) else ["data.split=null"]
    words = ["data.streaming=true", "training.max_steps=5", *split, *more]
    done = run("check", folder / "recipe.yaml", "--quick", "--json", *words)
    found = json.loads(done.stdout)
    assert found["rows"] == min(rows, 1000) and len(found["problems"]) == (
        found["rows"] if bad or "max_length" in "".join(more) else 0
    )
    monkeypatch.setattr(training, "prepare_model", lambda recipe, device, *rest: pytest.fail("the model is loaded"))
    with pytest.raises((DataError, pytest.fail.Exception)) as caught:
        phi3v.train(Recipe.load(folder / "recipe.yaml", words))
    if line is None:
        assert (done.exit_code, found["trouble"]) == (0, None) and isinstance(caught.value, pytest.fail.Exception)
    else:
        assert done.exit_code == 1 and line in found["trouble"] == str(caught.value)
    assert not (folder / "run").exists()


def test_of_a_stream_of_several_sets_each_is_gone_through_and_judged_by_itself(
    run: Any, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of one row comes to its end before another has shown what it holds; a file may be named twice."""
    monkeypatch.setattr(training, "prepare_model", lambda recipe, device, *rest: pytest.fail("the model is loaded"))
    for name, bad in (("one", range(0)), ("sound", range(0)), ("bad", range(1, 40)), ("worst", range(40))):
        rows = [{"q": f"{name} {n}", "a": None if n in bad else "yes"} for n in range(1 if name == "one" else 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for names, split, counts, trouble in (
        (("sound", "sound"), "null", (80, 80, 80, 0), None),
        (
            ("one", "sound"),
            "{validation: 10}",
            (41, 41, 31, 10),
            "one.jsonl has no usable row to train on: each is held",
        ),
        (("one", "bad"), "null", (41, 2, 2, 0), "bad.jsonl: 39 of 40 rows cannot be used (39 missing_value): row 1: "),
        (("sound", "worst"), "null", (80, 40, 40, 0), "worst.jsonl: 40 of 40 rows cannot be used (40 missing_value): "),
    ):
        sets = [
            f'{{source: {folder}/{name}.jsonl, weight: 1, images: null, prompt: "{place} {{q}}", answer: "{{a}}"}}'
            for place, name in enumerate(names)
        ]
        text = f"data: {{train: [{', '.join(sets)}], streaming: true, split: {split}}}\ntraining: {{max_steps: 3}}\n"
        (folder / "mixed.yaml").write_text(f"model: {model}\n{text}")
        found = json.loads(run("check", folder / "mixed.yaml", "--json").stdout)
        assert (found["rows"], found["usable"], found["train"], found["validation"]) == counts
        assert trouble is None if found["trouble"] is None else trouble is not None and trouble in found["trouble"]
        with pytest.raises((DataError, pytest.fail.Exception)) as caught:
            phi3v.train(Recipe.load(folder / "mixed.yaml", [f"output={folder}/run"]))
        if trouble is None or "bad" in names:  # its first row is sound
            assert isinstance(caught.value, pytest.fail.Exception)
        else:
            assert str(caught.value) == found["trouble"]


def test_a_data_set_alone_is_counted_without_tokens_and_with_a_model_in_full(
    run: Any, folder: Path, model: Path
) -> None:
    words = ["check", folder / "photos" / "rows.jsonl", "data.prompt=What?", "data.answer='{colour}'"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "tokens of texts are not counted: no model is named" in done.stdout
    found = json.loads(run(*words, "--json").stdout)
    assert (found["model"], found["lengths"], found["outlook"], found["rows"]) == (None, {}, None, 40)
    assert [(price["num_crops"], price["longest_row"]) for price in found["crops"]] == [
        (16, None),
        (4, None),
        (1, None),
        (5, None),
    ]
    found = json.loads(run(*words, f"model={model}", "--json").stdout)
    assert found["model"] == str(model) and found["lengths"]["total"]["most"] > 313


def test_images_are_downloaded_on_request_in_parts(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with image_server() as server:
        paths = [f"/404/{number}.png" if number == 7 else f"/good/{number}.png" for number in range(30)]
        write_rows(folder, [{"image": server.url(f"{path}?key=s3cret"), "colour": "red"} for path in paths])
        words = ["check", folder / "recipe.yaml", "data.allow_hosts=['127.0.0.1']", "data.image_cache=images", "--json"]
        before = json.loads(run(*words).stdout)
        assert (before["usable"], before["images"]["not_cached"], server.connections) == (
            30,
            [server.url(f"{path}?...") for path in paths],
            0,
        )
        line = "0 images of different content, decoded where nothing of the row is still to be downloaded; 30 from the"
        assert line in run(*words[:-1]).stdout.replace("\n", " ")
        assert before["lengths"]["total"] is None
        assert "length of a row: not known, the images are not here yet (--fetch downloads" in run(*words[:-1]).stdout
        looked: list[str] = []
        look = survey.open_image
        monkeypatch.setattr(survey, "open_image", lambda image, **more: looked.append(image.url) or look(image, **more))
        part = json.loads(run(*words, "--fetch", "--shard", "0/2").stdout)
        assert 0 < part["part"]["downloaded"] == len(looked) and all(in_shard(url, (0, 2)) for url in looked)
        assert part["lengths"]["image"]["total"] == 313 * len(looked)
        cached, looked[:] = len(looked), []
        said = run(*words[:-1], "--fetch", "--shard", "0/4").stdout  # all of it is there
        assert 0 < len(looked) < cached and all(in_shard(url, (0, 4)) for url in looked)
        assert ", those of part 0/4 decoded; " in said and "are those of this part" in said
        half = json.loads(run(*words).stdout)
        missing = half["images"]["not_cached"]
        assert 0 < len(missing) < 30 and half["images"]["beyond"] == 0
        first = [*words[:-1], "data.max_rows=15", "data.split=null"]
        few = json.loads(run(*first, "--json").stdout)["images"]
        named = before["images"]["not_cached"]
        named = [url for row, url in enumerate(named) if row not in {problem["row"] for problem in half["problems"]}]
        counts = (15, [url for url in missing if url in named[:15]], len(missing))
        assert (few["from_web"], few["not_cached"], few["beyond"] + len(few["not_cached"])) == counts
        line = f"15 from the web, {15 - len(few['not_cached'])} in the cache, {len(few['not_cached'])} not yet"
        line += f" (--fetch downloads them); --fetch downloads {few['beyond']} more, of rows that data.max_rows or"
        assert few["not_cached"] and few["beyond"] and line in run(*first).stdout.replace("\n", " ")
        done = run(*words, "--fetch")
        assert all(server.count(f"{path}?key=s3cret") == 1 for path in paths)
    after = json.loads(done.stdout)
    assert (done.exit_code, after["usable"], after["images"]["not_cached"]) == (0, 29, [])
    assert [(problem["row"], problem["reason_code"]) for problem in after["problems"]] == [(7, "url_not_found")]
    assert after["images"]["from_web"] == 29 and after["images"]["count"] == 29
    assert after["lengths"]["image"]["total"] == 29 * 313


def test_show_writes_a_page_and_prints_the_tokens_where_nobody_can_see_it(run: Any, folder: Path) -> None:
    done = run("show", folder / "recipe.yaml", "--rows", 3)
    assert done.exit_code == 0, done.output
    assert "page: recipe-rows.html" in done.stdout and "[313 image tokens]<s>" in done.stdout
    assert done.stdout.count("⟦") == done.stdout.count("⟧") == 4  # three rows and the legend
    assert (folder / "recipe-rows.html").read_text().count("<article>") == 3
    text = run("show", folder / "recipe.yaml", "--rows", 2, "--text")
    assert "page:" not in text.stdout and text.stdout.count("row ") == 2


def test_show_for_machines(run: Any, folder: Path) -> None:
    done = run("show", folder / "recipe.yaml", "--rows", 2, "--out", folder / "deep" / "page.html", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["rows"], found["usable"], len(found["problems"]), len(found["shown"])) == (40, 38, 2, 2)
    assert found["page"] == str(folder / "deep" / "page.html") and Path(found["page"]).is_file()
    tokens = found["shown"][0]["tokens"]
    assert {token["role"] for token in tokens} == {"control", "user", "assistant", "image"}
    said = "".join(token["text"] for token in tokens if token["role"] == "assistant" and token["trained"])
    assert said.strip().startswith("It is ")


def test_show_downloads_what_it_shows_and_no_more(run: Any, folder: Path) -> None:
    with image_server() as server:
        urls = [server.url(f"/404/{n}.png" if n == 0 else f"/good/{n}.png") for n in range(60)]
        write_rows(folder, [{"image": url, "colour": "red"} for url in urls])
        words = ["show", folder / "recipe.yaml", "data.allow_hosts=['127.0.0.1']", "data.image_cache=images"]
        done = run(*words, "data.split=null", "--rows", 2, "--json")
        assert done.exit_code == 0, done.output
        first, second = json.loads(done.stdout)["shown"]
        assert len(server.seen) == 2
        assert "the server answers 404" in first["problem"] and second["problem"] is None
        assert server.count(f"/good/{second['row']}.png") == 1 and second["length"]["image"] == 313
        assert [image["name"] for image in second["images"]] == [urls[second["row"]]]
        said = run(*words, "data.split=null", "--rows", 2).stdout
        page = (folder / "recipe-rows.html").read_text()
        for told in (said, page, done.stdout):
            assert urls[second["row"]] in told and "objects" not in told


def test_show_needs_a_model(run: Any, folder: Path) -> None:
    done = run("show", folder / "photos" / "rows.jsonl", "data.prompt=What?", "data.answer='{colour}'")
    assert (done.exit_code, done.stdout) == (1, "") and "add model=NAME" in done.stderr


def test_a_browser_opens_only_in_front_of_a_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)) or True)
    assert not cli_data.open_page(tmp_path / "page.html") and opened == []
    monkeypatch.setattr("sys.stdout", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not cli_data.open_page(tmp_path / "page.html") and opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert cli_data.open_page(tmp_path / "page.html") and opened == [(tmp_path / "page.html").as_uri()]


def test_training_leaves_out_what_check_names_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (folder / "photos" / "rows.jsonl").read_text().splitlines()]
    rows[30]["colour"] = "red " * 2000
    write_rows(folder, rows)
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    words = ["train", str(folder / "recipe.yaml"), "data.max_skipped=0.1", "data.max_length=1000"]
    done = CliRunner().invoke(app, [*words, "training.max_steps=1"])
    assert done.exit_code == 0, done.output
    assert "left out (1 missing_value, 1 image_path, 1 too_long)" in " ".join(done.stdout.split())
    assert "phi3v data check" in done.stdout
    found = [(line["row"], line["reason_code"]) for line in RunFolder(folder / "run").read_problems()]
    assert sorted(found) == [(3, "missing_value"), (9, "image_path"), (30, "too_long")]


def test_text_of_strangers_reaches_the_terminal_escaped(run: Any, folder: Path) -> None:
    assert cli_session.printable("a\n b\x1b[31m\u202e\ud83d é🙂") == "a b\\x1b[31m\\u202e\\ud83d é🙂"
    (folder / "odd.csv").write_text("image,ti\x1b[31mtle\na.jpg,Foo\n")
    done = run("check", folder / "odd.csv", "data.prompt=What?", "data.answer='{title}'")
    assert done.exit_code == 1 and "its columns are image, ti\\x1b[31mtle" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
