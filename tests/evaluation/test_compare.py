"""Runs side by side: tests on the rows that both answered, words where these are few, what differs, the page."""

import json
import re

import pytest
from browser import Browser
from report_content import CHROMIUM, HOSTILE, Page, make_predictions
from typer.testing import CliRunner

import phi3v
from phi3v.cli import app
from phi3v.errors import CheckpointError, ConfigError
from phi3v.evaluation.compare import differing
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder


def make_run(folder, rows: int = 20, base_side: bool = False, **settings) -> RunFolder:
    """A run as an evaluation leaves it; with `base_side` the answers are those of the untuned model."""
    predictions, evaluation = make_predictions(rows)
    if base_side:
        for one in predictions:
            one["tuned"], one["scores"]["tuned"] = one["base"], one["scores"]["base"]
            one["right"] = one["tuned"] == one["expected"]
        evaluation["metrics"] = {name: {**one, "tuned": one["base"]} for name, one in evaluation["metrics"].items()}
    run = RunFolder(folder)
    values = {"model": "tiny/base", "data": "shop.csv", "output": str(folder), "training": settings}
    folder.mkdir()
    run.write_recipe(Recipe.from_dict(values))
    run.write_versions({"torch": "2.13"})
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": 5.0 / step, "eval_loss": 4.0 / step})
    run.write_predictions(predictions)
    run.write_evaluation(evaluation)
    return run


def test_runs_on_the_same_rows_are_tested_against_the_first(tmp_path):
    for name, how in (("one", {"learning_rate": 1e-4}), ("two", {"learning_rate": 2e-4, "base_side": True})):
        make_run(tmp_path / name, **how).write_versions({"torch": "2.13", "phi3v": f"{name}/of/a/long/{'path' * 20}"})
    found = phi3v.compare([tmp_path / "one", tmp_path / "two"], tmp_path / "compare.html")
    first, second = found.runs
    assert first["beside_first"] == {} and second["why_not"] is None
    gap = second["beside_first"]["exact_match"]
    # of 20 rows the tuned answers miss 0, 4 and 14, the base has row 2 alone: 16 are lost, none is won
    assert (gap["won"], gap["lost"], gap["tied"]) == (0, 16, 4) and gap["p"] == pytest.approx(2 * 0.5**16)
    assert gap["difference"]["value"] == pytest.approx(-0.8) and "loss" not in second["beside_first"]
    assert first["metrics"]["exact_match"]["value"] == pytest.approx(0.85)
    for run in found.runs:
        one, written = (
            run["metrics"]["exact_match"],
            RunFolder(run["folder"]).read_evaluation()["metrics"]["exact_match"],
        )
        assert one["base"] == {key: written["base"][key] for key in ("value", "low", "high", "rows")}
        assert one["constant"] == written["constant"] and one["constant"] is not None
    assert found.recipes.pop("versions.phi3v")[1].startswith("two/of")
    assert found.recipes == {"training.learning_rate": [1e-4, 2e-4]}
    rights = [one["right"] for one in found.disagreements]
    assert rights == [{"one": True, "two": False}] * 16
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.text.count("Its base: ") == page.text.count("The best single answer to every row: ") == 2
    assert page.text.count("base 5.0 %, best single 5.0 %") == 6, "each score has its controls, not the first alone"
    assert re.search(r"-80\.0\(-9\d\.\d to -\d\d\.\d\), p < 0\.001", page.text), "a difference has its interval"
    assert page.text.count("Not new to the model: 2 of 12 rows <leaked>.") == 2
    words = page.text.partition("What these words mean")[2]
    for word in ("held-out rows", "p", "exact match", "similarity", "loss per trained token", "mean absolute error"):
        assert re.search(rf"\n{word}[a-z]", words), word
    assert "kept rows" not in page.text and "At each optimiser step the model is changed once" in words
    assert first["checks"] == {"overlap": {"verdict": "fail", "line": "2 of 12 rows <leaked>"}}
    assert first["constant_answer"].startswith("Product: Wool Scarf number 0")
    assert "Worse than one." in page.text and "16 rows they" not in page.text and html.count('class="row"') == 16
    assert page.tags.count("svg") == 1 and page.tags.count("script") == 1 and page.handlers == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    phi3v.compare([tmp_path / "two", tmp_path / "one"], tmp_path / "compare.html")  # its own page may be replaced
    if CHROMIUM:
        with Browser(tmp_path, width=390) as shown:
            shown.open((tmp_path / "compare.html").as_uri())
            shown.wait("document.body?.innerText.includes('16 of 16 rows') && document.readyState === 'complete'")
            assert shown.told == [] and shown.run("document.querySelector('[hidden]')") is None
            boxes = "[...document.querySelectorAll('.scroll')]"
            assert shown.run(f"{boxes}.map(box => box.scrollWidth - box.clientWidth)") == [0, 0], (
                "no column out of sight"
            )
            labels = (
                "[...document.querySelectorAll('#recipes tr:last-child td')].map(cell => cell.dataset.label ?? null)"
            )
            assert shown.run(labels) == [None, "two", "one"]


def test_runs_on_fewer_rows_of_a_file_are_tested_on_those_that_both_answered(tmp_path):
    make_run(tmp_path / "one")
    make_run(tmp_path / "few", rows=15, base_side=True)
    found = phi3v.compare([tmp_path / "one", tmp_path / "few"], tmp_path / "c.html")
    first, few = found.runs
    assert (first["shared_rows"], first["tested_on"], first["why_not"]) == (20, None, None)
    assert few["tested_on"] == "the 15 rows that both answered (of its 15 and one's 20)" and few["why_not"] is None
    # of 15 rows the tuned answers miss 0, 4 and 14, the base has row 2 alone: 11 are lost, none is won
    gap = few["beside_first"]["exact_match"]
    assert (gap["won"], gap["lost"], gap["tied"]) == (0, 11, 4) and gap["p"] == pytest.approx(2 * 0.5**11)
    assert gap["own"] == pytest.approx(1 / 15) and gap["first"] == pytest.approx(12 / 15)
    assert gap["difference"]["value"] == pytest.approx(-11 / 15) and gap["difference"]["rows"] == 15
    assert first["metrics"]["exact_match"]["value"] == pytest.approx(0.85), "its own score is of all its rows"
    assert [one["row"] for one in found.disagreements] == [1, 3, *range(5, 14)]
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert (
        "Worse than one on the 15 rows that both answered (of its 15 and one's 20): 6.7 % beside 80.0 % there." in page
    )
    assert page.count("p < 0.001, 15 rows") == 7, "each score says on how many rows its test is"
    [forward, back] = phi3v.compare([tmp_path / "few", tmp_path / "one"]).runs  # the first may be the one with fewer
    assert back["beside_first"]["exact_match"]["won"] == 11 and forward["shared_rows"] == back["shared_rows"] == 15
    words = ["compare", str(tmp_path / "one"), str(tmp_path / "few"), "--out", str(tmp_path / "c.html")]
    shown = CliRunner().invoke(app, words).output
    assert "few: tested on the 15 rows that both answered (of its 15 and one's 20): 6.7 % beside 80.0 % there" in shown


def test_an_interval_and_a_test_that_disagree_say_so_beside_each_score(tmp_path):
    """Six of 40 rows a little more alike: Newcombe's interval holds 0, the test says 2 in 64."""
    make_run(tmp_path / "one", rows=40)
    two = make_run(tmp_path / "two", rows=40)
    lines = list(two.read_predictions())
    for run, more in ((RunFolder(tmp_path / "one"), 0.0), (two, 0.4)):
        for line in lines:
            line["scores"]["tuned"] = {"similarity": 0.6 + more * (line["row"] < 6)}
        run.write_predictions(lines)
    gap = phi3v.compare([tmp_path / "one", two.path], tmp_path / "c.html").runs[1]["beside_first"]["similarity"]
    assert gap["p"] == 2 / 64 and gap["difference"]["low"] < 0
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert page.count("p 0.031; the two disagree, and the p value decides") == 1


def test_too_few_shared_rows_are_said_and_not_tested(tmp_path):
    make_run(tmp_path / "one")
    few = make_run(tmp_path / "few", rows=15)
    lines = list(few.read_predictions())

    def other_photos(
        kept: int,
    ) -> None:  # the same numbers and answers, as after a row was cut out of a file of letters
        few.write_predictions(
            {**line, "images": line["images"] if line["row"] < kept else ["else.jpg"]} for line in lines
        )

    for kept, why in (
        (6, None),
        (5, "only 5 rows were answered by one too (of its 15 and one's 20), so there is no test: 6 at least can tell"),
        (1, "only 1 row was answered by one too (of its 15 and one's 20), so there is no test: 6 at least can tell"),
        (0, "no row was answered by one too (of its 15 and one's 20), so there is no test"),
    ):
        other_photos(kept)
        found = phi3v.compare([tmp_path / "one", tmp_path / "few"], tmp_path / "c.html")
        last = found.runs[1]
        assert (last["shared_rows"], last["why_not"]) == (kept, why) and bool(last["beside_first"]) is (why is None)
        page = Page((tmp_path / "c.html").read_text(encoding="utf-8")).text
        assert why is None or why[0].upper() + why[1:] in page
    assert "None: no run has rows of the first one." in page
    few.write_predictions({**line, "expected": "other"} for line in lines)  # as with another answer template
    assert phi3v.compare([tmp_path / "one", tmp_path / "few"]).runs[1]["why_not"] == (
        "no row was answered by one too (of its 15 and one's 20), so there is no test; 15 rows of the same photos have "
        "other expected answers (data.answer)"
    )
    few.write_predictions({**line, "image_group": 0} for line in lines)
    one = RunFolder(tmp_path / "one")
    one.write_predictions([{**line, "image_group": line["row"] // 4} for line in one.read_predictions()])
    [_, last] = phi3v.compare([tmp_path / "one", tmp_path / "few"]).runs
    assert last["why_not"].startswith("only 15 rows about 4 photos were answered by one too"), (
        "photos are what is drawn"
    )


def test_a_field_that_one_run_compared_as_a_number_and_the_other_as_a_text_is_not_tested(tmp_path):
    make_run(tmp_path / "one")
    few = make_run(tmp_path / "few", rows=15)
    evaluation = dict(few.read_evaluation())
    evaluation["metrics"] = {name: one for name, one in evaluation["metrics"].items() if name != "absolute_error.price"}
    few.write_evaluation(evaluation)
    beside = phi3v.compare([tmp_path / "one", tmp_path / "few"]).runs[1]["beside_first"]
    assert {"exact_match", "field_accuracy.title", "field_accuracy.group"} <= beside.keys()
    assert not {"field_accuracy", "field_accuracy.price", "absolute_error.price", "loss"} & beside.keys()


def test_a_moved_set_has_the_same_rows(tmp_path):
    make_run(tmp_path / "one")
    other = make_run(tmp_path / "two")
    other.write_predictions({**one, "source": "/elsewhere/a.csv"} for one in other.read_predictions())
    [_, second] = phi3v.compare([tmp_path / "one", tmp_path / "two"]).runs
    assert second["why_not"] is None and second["beside_first"]["exact_match"]["p"] == 1.0


def test_files_of_one_name_in_several_folders_keep_all_their_rows(tmp_path):
    """A pattern of tables in folders; and a set that is named twice."""
    for name, folder in (("one", "/here"), ("two", "/there")):
        run = make_run(tmp_path / name)
        lines = list(run.read_predictions())
        run.write_predictions(
            {**line, "source": f"{folder}/{place}/a.csv"} for place in ("x", "y", "y") for line in lines
        )
    [first, second] = phi3v.compare([tmp_path / "one", tmp_path / "two"]).runs
    assert first["rows"] == 20 and second["why_not"] is None
    beside = second["beside_first"]["exact_match"]
    assert beside["won"] + beside["lost"] + beside["tied"] == 60


def test_what_cannot_be_compared_is_one_line(tmp_path):
    one = make_run(tmp_path / "one")
    with pytest.raises(ConfigError, match="two runs or more, each once"):
        phi3v.compare([one.path, one.path])
    with pytest.raises(CheckpointError, match="is no run"):
        phi3v.compare([one.path, tmp_path])
    two = make_run(tmp_path / "two")
    (tmp_path / "mine.html").write_text("my own page")
    for out, words in (
        (tmp_path / "mine.html", "is no page of phi3v compare"),
        (tmp_path / "no" / "x", "is no folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            phi3v.compare([one.path, two.path], out)
    two.write_predictions({"row": line["row"]} for line in two.read_predictions())
    with pytest.raises(CheckpointError, match="has no scores of its rows: phi3v evaluate"):
        phi3v.compare([one.path, two.path])
    two.recipe.rename(tmp_path / "recipe.yaml")  # as `phi3v evaluate --out` leaves it
    with pytest.raises(CheckpointError, match=r"holds an evaluation apart from a run \(phi3v evaluate --out\)"):
        phi3v.compare([one.path, two.path])
    (tmp_path / "recipe.yaml").rename(two.recipe)
    two.evaluation.unlink()
    with pytest.raises(CheckpointError, match="was not evaluated: phi3v evaluate"):
        phi3v.compare([one.path, two.path])


def test_compare_on_the_command_line(tmp_path):
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", base_side=True)
    words = ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c.html")]
    done = CliRunner().invoke(app, [*words, "--json"])
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and result["primary"] == "exact_match" and len(result["disagreements"]) == 16
    shown = CliRunner().invoke(app, words)
    assert re.search(r"two +5\.0 %.* -80\.0 +< 0\.001 +0 +16", shown.output), shown.output
    assert "16 rows they disagree on, 0 settings that differ" in shown.output
    assert HOSTILE not in shown.output and "two: check overlap failed: 2 of 12 rows <leaked>" in shown.output


def test_an_older_evaluation_has_the_most_frequent_answer_and_no_checks(tmp_path):
    make_run(tmp_path / "one")
    old = make_run(tmp_path / "old")
    evaluation = {name: one for name, one in old.read_evaluation().items() if name not in ("constant", "checks")}
    old.write_evaluation(evaluation)
    found = phi3v.compare([tmp_path / "one", tmp_path / "old"], tmp_path / "c.html")
    assert (found.runs[1]["constant_answer"], found.runs[1]["checks"]) == (None, {})
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert page.count("The most frequent answer to every row: ") == page.count("No check was made of this run.") == 1


def test_answers_added_to_a_finished_run_are_told(capsys):
    from rich.console import Console

    from phi3v.cli_screen import show_run

    summary = {
        "evaluation": None,
        "steps": 8,
        "seconds": 0.0,
        "status": "finished",
        "folder": "r",
        "report": "r/report",
    }
    for added in (True, False):
        show_run(Console(width=200), summary | {"resumed_from": None}, added=added)
        words = "8 steps; answers and report were added; give another output to train again"
        assert (words in capsys.readouterr().out) is added


def test_a_check_that_failed_has_its_words_on_the_page(tmp_path):
    """Its score need not be one of the rows': captions that were kept are told by another one."""
    make_run(tmp_path / "one", rows=6)
    two = make_run(tmp_path / "two", rows=6)
    for verdict, told in (("pass", 0), ("fail", 1)):
        lost = {"verdict": verdict, "line": "ANLS 7.0 % on 24 kept rows, 97.9 % before", "metric": "anls"}
        two.write_evaluation({**two.read_evaluation(), "checks": {"forgetting": lost}})
        phi3v.compare([tmp_path / "one", two.path], tmp_path / "c.html")
        words = Page((tmp_path / "c.html").read_text(encoding="utf-8")).text
        assert words.count("kept rowsquestions about other things") == words.count("ANLShow alike") == told, verdict


def test_keys_that_differ():
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == {"b": [2, 3], "c": [None, 4]}
