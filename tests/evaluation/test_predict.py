"""Answers without labels: the file in its three forms, rows with problems, what is written over, kills and restarts."""

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from other_process import holding
from pyarrow import parquet
from tiny_models import write_photos, write_tiny_model
from typer.testing import CliRunner

import phi3v
from phi3v import cli_session
from phi3v.cli import app
from phi3v.data.encode import encode_prompt
from phi3v.errors import ConfigError, DataError
from phi3v.evaluation import answers as answers_module
from phi3v.evaluation.answer_files import journal_of, lock_of, plain_cell
from phi3v.evaluation.answers import Answers, answer_rows
from phi3v.evaluation.engine import Engine
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.journal import Journal, read_journal
from phi3v.evaluation.predict import Questions, columns_of, find_questions, table_rows
from phi3v.generate import ChatModel
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target

PHOTOS = 20
TOKENS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, twenty photos, a table that names two more, and photos alone of which one is broken."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    table = write_photos(folder / "photos", PHOTOS)
    rows = table.read_text().splitlines()
    missing = [json.dumps({"image": f"nowhere-{number}.png", "colour": "red"}) for number in range(2)]
    table.write_text("\n".join([*rows[:3], missing[0], *rows[3:], missing[1]]) + "\n")
    (folder / "only").mkdir()
    for number in range(3):
        (folder / "only" / f"{number}.png").write_bytes((folder / "photos" / f"{number}.png").read_bytes())
    (folder / "only" / "broken.png").write_bytes((folder / "photos" / "0.png").read_bytes()[:70])
    return folder


def asking(world: Path, out: Path, **more: Any) -> phi3v.evaluation.predict.Prediction:
    """The table's rows, answered in windows of eight."""
    how = {"prompt": "Is it {colour}?", "batch_size": 1, "max_new_tokens": TOKENS, "device": "cpu", **more}
    return phi3v.predict(world / "model", world / "photos" / "rows.jsonl", out, **how)


@pytest.fixture(scope="module")
def done(world: Path) -> phi3v.evaluation.predict.Prediction:
    """A prediction that nobody disturbed."""
    return asking(world, world / "undisturbed.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_is_in_the_file_with_its_answer_or_its_reason(
    world: Path, done: phi3v.evaluation.predict.Prediction
) -> None:
    found = lines_of(done.out)
    assert [row["row"] for row in found] == list(range(PHOTOS + 2)) == list(range(done.rows))
    assert (
        list(found[0])
        == ["source", "row", "colour", "image", "question", "answer", "reason_code", "problem"]
        == (done.columns)
    )
    assert (found[0]["image"], found[0]["question"], found[0]["problem"]) == ("0.png", "Is it red?", None)
    wrong = [row for row in found if row["problem"] is not None]
    assert [row["row"] for row in wrong] == [3, PHOTOS + 1] and all(row["answer"] is None for row in wrong)
    assert "nowhere-0.png does not exist" in wrong[0]["problem"] and found[0]["reason_code"] is None
    assert [(row["image"], row["reason_code"]) for row in wrong] == [
        (f"nowhere-{number}.png", "image_path") for number in range(2)
    ]
    assert done.answered == PHOTOS and len(done.problems) == 2 and "row 3: image" in done.problems[0]
    asked = find_questions(resolve_target(world / "model"), str(world / "photos" / "rows.jsonl"), "Is it {colour}?", 4)
    assert [row.index for row in asked.rows] == [0, 1, 2] and [one.row for one in asked.problems] == [3]
    chat = ChatModel.from_target(world / "model", device="cpu")
    alone = [chat.answer_encoded([encode_prompt(row, chat.processor)], max_new_tokens=TOKENS)[0] for row in asked.rows]
    assert [row["answer"] for row in found[:3]] == alone
    assert not journal_of(done.out).exists()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_all_forms_hold_the_same(world: Path, done: phi3v.evaluation.predict.Prediction, ending: str) -> None:
    out = world / f"same{ending}"
    asking(world, out, rows=5)
    expected = lines_of(done.out)[:5]
    if ending == ".parquet":
        assert parquet.read_table(out).to_pylist() == expected
        return
    with open(out, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [{name: row[name] or None for name in row} for row in found] == [
        {name: None if value is None else str(plain_cell(value)) or None for name, value in row.items()}
        for row in expected
    ]


def test_cells_that_a_spreadsheet_would_run() -> None:
    given = ["=1+1", "+cmd", "-x", "@a", "\tb", "-3", "+1.5e3", "plain", "", None, 7, ["a.jpg", "=b"]]
    wanted = ["'=1+1", "'+cmd", "'-x", "'@a", "'\tb", "-3", "+1.5e3", "plain", "", None, 7, '["a.jpg", "=b"]']
    assert list(map(plain_cell, given)) == wanted


def test_photos_alone_need_a_prompt_and_no_column(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.prompt names the column 'prompt'.*; or say what to ask with --prompt"):
        phi3v.predict(world / "model", world / "only", tmp_path / "a.csv")
    recipe = {"model": str(world / "model"), "data": {"train": "x", "images": "photo"}}
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    run.start(Recipe.from_dict({**recipe, "output": str(run.path)}))
    place = resolve_target(world / "model")
    asked = find_questions(
        type(place)(str(run.path), "run", place.base, None, None, place.processor), *photo_words(world)
    )
    assert [Path(str(row.images[0].path)).name for row in asked.rows] == ["0.png", "1.png", "2.png"]
    assert [Path(one.message.split()[1]).name for one in asked.problems] == ["broken.png"]
    with pytest.raises(DataError, match="1 of 1 rows cannot be used .*; so there is nothing to answer"):
        (world / "only" / "sub").mkdir(exist_ok=True)
        (world / "only" / "sub" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        find_questions(place, str(world / "only" / "sub"), "What?", None)
    (world / "only" / "sub" / "broken.png").unlink()


def photo_words(world: Path) -> tuple[str, str, None]:
    return str(world / "only"), "What?", None


def test_rows_of_a_file_without_a_good_one_keep_their_place(world: Path, tmp_path: Path) -> None:
    """Of three files the first and the last are broken as a whole; `--rows` counts broken rows with the others."""
    for name, images in (("a", ["x.png", "y.png"]), ("b", ["0.png", "z.png", "1.png"]), ("c", ["v.png"])):
        lines = [str(world / "photos" / image) for image in images]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image", *lines]) + "\n")
    what = {"place": resolve_target(world / "model"), "data": str(tmp_path / "*.csv"), "prompt": "What is it?"}
    how = ["data.images=image", "data.allow_outside_root=true"]
    for limit, expected in ((None, "aabbbc"), (3, "aab"), (4, "aabb")):
        asked = find_questions(**what, limit=limit, overrides=how)
        answers = Answers(["red"] * len(asked.rows), [], [])
        rows = list(table_rows(asked, answers))
        assert "".join(Path(row["source"]).stem for row in rows) == expected
        assert [row["row"] for row in rows] == [0, 1, 0, 1, 2, 0][: len(rows)]
        assert [row["answer"] for row in rows] == [None, None, "red", None, "red", None][: len(rows)]
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used .*so there is nothing to answer"):
        find_questions(**what, limit=2, overrides=how)


def test_questions_of_chats_need_no_answer(world: Path, tmp_path: Path) -> None:
    ask = {"role": "user", "content": "<image>?"}
    told = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"messages": [ask]}, {"messages": [*told, ask]}, {"messages": told}, {"messages": [told[1]]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = find_questions(resolve_target(world / "model"), str(tmp_path / "chats.jsonl"), None, None)
    assert [row.question for row in asked.rows] == ["<image>?", "<image>?", "Hi"]
    assert [one.reason_code for one in asked.problems] == ["turn_order"]


def test_values_of_the_recipe_are_replaced_and_what_says_nothing_is_refused(world: Path, tmp_path: Path) -> None:
    table, place = str(world / "photos" / "rows.jsonl"), resolve_target(world / "model")
    asked = find_questions(place, table, None, 2, overrides=["data.prompt=Is it {colour}?"])
    assert [row.question for row in asked.rows][:1] == ["Is it red?"]
    with pytest.raises(phi3v.errors.ConfigError, match="training.epochs changes nothing about rows or answers"):
        find_questions(place, table, "What?", 2, overrides=["training.epochs=2"])


def test_fields_of_the_answer_have_columns(world: Path) -> None:
    asked = find_questions(resolve_target(world / "model"), str(world / "photos" / "rows.jsonl"), "Is it {colour}?", 3)
    asked = Questions(asked.rows, asked.problems, "x", asked.recipe, AnswerTemplate("{colour} for {price}, {answer}"))
    names = ["source", "row", "colour", "image", "question", "answer"]
    assert list(columns_of(asked)) == [*names, "answer.colour", "price", "answer.answer", "reason_code", "problem"]
    texts = ["red for 470, yes", "nonsense", ""]
    said = answers_module.Answers(texts, [0.0] * 3, [0] * 3, {}, {2: f"{asked.rows[2].source}, row 2: gone"})
    first, second, third = table_rows(asked, said)
    assert (first["answer.colour"], first["price"], first["answer.answer"]) == ("red", "470", "yes")
    assert second["answer"] == "nonsense" and second["price"] is None
    assert (third["answer"], third["problem"], third["price"]) == (None, "gone", None)


def test_what_is_there_is_not_written_over(world: Path, done: phi3v.evaluation.predict.Prediction) -> None:
    before = done.out.read_bytes()
    again = asking(world, done.out)
    assert again.status == "finished" and again.answered == done.answered and again.problems == done.problems
    with pytest.raises(ConfigError, match="holds answers of other settings: name another file, or remove it"):
        asking(world, done.out, max_new_tokens=TOKENS + 1)
    with pytest.raises(ConfigError, match="holds answers of other rows"):
        asking(world, done.out, rows=2)
    assert done.out.read_bytes() == before
    changed = world / "changed.csv"
    changed.write_text("mine")
    for out, words in (
        (changed, "is not as phi3v predict left it"),
        (world / "a.txt", "end its name in .parquet, .csv or .jsonl"),
        (world / "no" / "a.csv", "which is no folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            asking(world, out)
    assert changed.read_text() == "mine"


class Killed(Exception):
    """What stands for a kill."""


def killed_at(count: int) -> Callable[[str, int, int], None]:
    """Progress that ends the process, so to say, when so many rows are done."""

    def watch(stage: str, done: int, total: int) -> None:
        if done >= count:
            raise Killed

    return watch


def test_a_killed_prediction_ends_as_an_undisturbed_one(
    world: Path,
    done: phi3v.evaluation.predict.Prediction,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = world / "killed.jsonl"
    with (
        holding(lock_of(out)) as other,
        pytest.raises(ConfigError, match=rf"^--out .*killed.jsonl is being written by process {other} on"),
    ):
        asking(world, out)
    with pytest.raises(Killed):
        asking(world, out, on_progress=killed_at(12))
    journal = journal_of(out)
    assert not out.exists() and list(read_journal(journal)[1]) == [0]
    with open(journal, "ab") as file:
        file.write(b'{"window": 1, "records": [{"text": "half')
    worked: list[int] = []
    original = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda self, these: original(self, counted(these, worked)))
    with pytest.raises(Killed):
        asking(world, out, on_progress=killed_at(18))
    assert len(worked) >= 10, "the window that was cut off is worked again"
    worked.clear()
    asking(world, out)
    assert len(worked) == PHOTOS - 16, "windows that were done are not"
    assert out.read_bytes() == done.out.read_bytes() and not journal.exists()
    with pytest.raises(Killed):
        asking(world, world / "other.jsonl", on_progress=killed_at(12))
    found = asking(world, world / "other.jsonl", max_new_tokens=1)
    assert "holds answers under other settings: starting over" in caplog.text
    assert found.answered == PHOTOS


def test_a_prediction_that_is_killed_from_outside_ends_as_an_undisturbed_one(
    world: Path, done: phi3v.evaluation.predict.Prediction
) -> None:
    """SIGKILL at a random moment: a random number of milliseconds behind a random row."""
    out, (read, write) = world / "shot.jsonl", os.pipe()
    rows, wait = random.randrange(1, PHOTOS), random.random() / 50
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # threads of the parent are not here
            asking(world, out, on_progress=lambda stage, count, total: os.write(write, bytes(count > 0)))
            signal.pause()  # through before it was killed
        finally:
            os._exit(1)  # nothing of the test run goes on in this process
    os.close(write)
    for _ in range(rows):
        os.read(read, 1)
    os.close(read)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kept = len(read_journal(journal_of(out))[1])
    asking(world, out)
    moment = f"killed {1000 * wait:.1f} ms behind row {rows}, {kept} windows were kept"
    assert out.read_bytes() == done.out.read_bytes() and not journal_of(out).exists(), moment


def counted(examples: Any, worked: list[int]) -> Any:
    for place, example in examples:
        worked.append(place)
        yield place, example


def test_a_question_that_turns_out_to_be_none_is_its_own_problem(world: Path, tmp_path: Path) -> None:
    asked = find_questions(resolve_target(world / "model"), str(world / "photos" / "rows.jsonl"), "What?", 6)
    chat = ChatModel.from_target(world / "model", device="cpu")
    lost = world / "photos" / "1.png"
    content = lost.read_bytes()
    lost.unlink()
    try:
        found = answer_rows(chat.model, chat.processor, asked.rows, batch_size=2, max_new_tokens=2, expected=False)
    finally:
        lost.write_bytes(content)
    assert list(found.problems) == [1] and "1.png" in found.problems[1] and found.texts[1] == ""
    assert found.reasons == {1: "image_unreadable"}
    assert all(found.texts[at] for at in (0, 2, 3, 4)) and found.ways == {"together": 4}


def test_a_journal_takes_nothing_that_is_not_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", {"weights": "a", "rows": "b"})
    for window in (0, 2):
        journal.append(window, [{"text": "a\u2028b", "loss": 0.1, "tokens": 2}])
    whole = journal.path.read_bytes()
    for tail in (b"", b'{"window": 3', b"nonsense\n", b'{"window": "x"}\n', b"5\n"):
        journal.path.write_bytes(whole + tail)
        assert Journal(journal.path, {"weights": "a", "rows": "b"}).windows == journal.windows
        assert journal.path.read_bytes() == whole
    assert Journal(journal.path, {"weights": "a", "rows": "c"}).windows == {}
    with pytest.raises(ConfigError, match="cannot be written"):
        Journal(tmp_path / "no" / "a.jsonl", {})


def test_the_command(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    out = tmp_path / "a.csv"
    words = ["predict", world / "model", "--data", world / "only", "--out", out, "--prompt", "What?"]
    words = [*map(str, words), "--max-new-tokens", "2", "--batch-size", "1", "--device", "cpu"]
    original = answers_module._record

    def interrupted(found: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(answers_module, "_record", interrupted)
    stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 130 and not out.exists()
    kept = "phi3v: interrupted; 0 of 3 rows are answered and kept, and the same command again goes on there\n"
    assert stopped.stderr.endswith(kept)
    monkeypatch.setattr(answers_module, "_record", original)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "no answer: " in done.output and "3 of 4 rows answered" in done.output
    with open(out, encoding="utf-8", newline="") as file:
        (wrong,) = [row for row in csv.DictReader(file) if row["problem"]]
    assert wrong["image"].endswith("broken.png") and wrong["reason_code"] == "image_unreadable"
    again = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(again.stdout)["status"] == "finished" and len(out.read_text().splitlines()) == 5
