"""The report page: what it says, that nothing in it is markup by accident, and how a real browser takes it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_content import CHROMIUM, HOSTILE, HOSTILE_GROUP, Page, browse, make_content

from phi3v.data.data_uri import photo_uri
from phi3v.data.schema import ImageRef, Message, Row, TextPart
from phi3v.evaluation import report_run
from phi3v.evaluation.figures import p_value, unbroken
from phi3v.evaluation.headline import also_changed, beside_control
from phi3v.evaluation.legend import legend
from phi3v.evaluation.report import ReportContent, render_report
from phi3v.evaluation.report_curves import curve_points, loss_curve_svg

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def test_page_holds_scores_rows_recipe_and_times():
    html = render_report(make_content())
    page = Page(html)
    for words in (
        "12 held-out rows",
        "2026-01-02 03:04 UTC",
        "before (base)",
        "83.3 %",
        "Exact match on held-out rows",
        "Not new to the model: 2 of 12 rows <leaked>.",
        "Better after tuning, but a check failed",
        "Clearly better too: fields that are right (",
        "loss per trained token (4.5 to 0.0123)",
        "Always answering “Product: Wool Scarf number 0, Group: <b onclick=alert(1)>&a…”, the best single answer "
        "and the most frequent one, would get 8.3 %: this model is +75.0 points from it",
        "Whether the answers depend on the images was not looked at.",
        "rows that the later column answers better, and worse",
        "overlap: were evaluated rows in the training data?",
        "+75.0 points",
        "9 rows better, 0 worse, 3 the same",
        "would come up about 4 times in 1,000 (McNemar's test, p\u00a0=\u00a00.0039)",
        "Scored as templated answers: 12 of 12 expected answers have the form",
        "field “price”",
        "“price”, mean absolute error",
        "Exact match by category",
        "image blanked",
        "fail: 2 of 12 rows <leaked>.",
        "vision tower",
        "1,234,567",
        "1 min 15 s",
        "most memory of the process by the end of training3.2 GiB",
        "by the end of evaluation0.8 GiB",
        "9f2c77ab",
        "1 row left out",
        "column <title> is empty",
        "torch  2.13",
        "output: runs/test # <b>",
        "a run <of> tests",
        "loss per trained token",
        "Every row asks: “What is shown? <i>&”",
        "6 of 12 rows have their photos here",
    ):
        assert words in page.text, words
    # the list is whole without a script, whose menus are hidden until it runs
    assert html.count('<article class="row"') == 12 and '<form id="filter" hidden' in html
    assert html.count('<article class="sample"') == 4
    assert (
        page.tags.count("svg") == 1 and page.tags.count("img") == 7 + 4
    )  # 7 small ones; rows 0 and 4, and one of the best
    assert "<mark>Cap</mark>" in html and '<mark class="lacks">Scarf</mark>' in html


@pytest.mark.parametrize(
    ("overlap", "named", "warned"),
    [
        ({"verdict": "pass", "line": "none", "not_looked_at": 0}, "rows that training never saw", False),
        ({"verdict": "pass", "line": "none", "not_looked_at": 3}, "held-out rows", False),
        ({"verdict": "warn", "line": "the pictures of 1 of 12 rows are known"}, "held-out rows", True),
        ({"verdict": "fail", "line": "2 of 12 rows are known"}, "held-out rows", True),
        ({"verdict": "skipped", "line": "no rows"}, "held-out rows", False),
        (None, "held-out rows", False),
    ],
)
def test_headline_says_no_more_than_the_overlap_check(overlap, named, warned):
    content = make_content()
    evaluation = {**content.evaluation, "checks": {"overlap": overlap} if overlap else {}}
    html = render_report(ReportContent(title="a", evaluation=evaluation, predictions=content.predictions))
    headline = Page(html[html.index('id="headline"') : html.index('id="scores"')]).text
    assert f"Exact match on {named}" in headline and ("Not new to the model" in headline) is warned
    assert not warned or overlap["line"] in headline


def headline_of(**changed) -> str:
    content = make_content()
    evaluation = {**content.evaluation, "checks": {}, **changed}
    html = render_report(ReportContent(title="a", evaluation=evaluation, predictions=content.predictions))
    return html[html.index('id="headline"') : html.index('id="scores"')]


def test_headline_never_calls_better_what_one_constant_answer_reaches():
    """A model tuned on shuffled answers: far better than its base, and as good as the most frequent answer."""
    metrics = make_content().evaluation["metrics"]
    metrics = {name: {**one, "over_constant": None} if one["field"] else one for name, one in metrics.items()}
    primary, constant = metrics["exact_match"], {"answer": "Product: " + "Scarf " * 20, "origin": "own"}
    assert "Better after tuning" in headline_of() and "always answering" not in headline_of()
    for value, p, words in (
        (0.002, 0.9, "Not clearly better than always answering “Product: Scarf"),
        (-0.1, 0.01, "No better than always answering “Product: Scarf"),
    ):
        above = {**primary["over_constant"], "difference": {**primary["difference"], "value": value}, "p": p}
        dull = {**primary, "over_constant": above}
        html = headline_of(metrics={**metrics, "exact_match": dull}, constant=constant)
        assert "Better after tuning" not in html and f'<p class="verdict wrong">{words}' in html and "…”</p>" in html
        alone = headline_of(
            metrics={**metrics, "exact_match": {**dull, "base": None}}, base=None, against=None, constant=constant
        )
        assert "better than always answering “Product: Scarf" in alone
        same = headline_of(metrics={**metrics, "exact_match": {**dull, "p": 0.5}}, constant=constant)
        assert "No clear difference between before and after</p>" in same and words in same
        few = headline_of(metrics={**metrics, "exact_match": dull}, rows=5)
        assert "Better after tuning" in few, "5 rows cannot tell"
        knows = {**metrics, "exact_match": dull, "field_accuracy.price": make_field(0.9, 1e-7)}
        html = headline_of(metrics=knows, constant=constant)
        assert f'<p class="verdict ">{words}' in html
        assert "one answer to everything all the same: field “price” (90.0\u00a0% beside 10.0\u00a0%)." in html
        chance = headline_of(metrics={**knows, "field_accuracy.price": make_field(0.3, 0.02)}, constant=constant)
        assert "all the same" not in chance, "one of several fields is below 0.05 by chance"


def test_other_figures_are_named_better_only_beside_their_control():
    evaluation = make_content().evaluation
    for above, named in ((0.2, False), (1e-7, True), (None, False)):
        one = {**make_field(0.9, 1e-7), "p": 1e-6}
        one["over_constant"] = {**one["over_constant"], "p": above}
        found = also_changed({**evaluation, "metrics": {**evaluation["metrics"], "field_accuracy.price": one}})
        assert any("price" in said and "error" not in said for said in found["better"]) is named
    one["over_constant"] = None
    found = also_changed({**evaluation, "metrics": {**evaluation["metrics"], "field_accuracy.price": one}})
    assert any("price" in said and "error" not in said for said in found["better"]), "what has no control is named"
    long = {"answer": 'Product: "Scarf" ' * 9, "origin": "own"}
    assert f'title="{"Product: &#34;Scarf&#34; " * 9}"' in headline_of(constant=long), "the whole answer"


def make_field(value: float, p: float) -> dict[str, Any]:
    """A field's figures, with the p value of its test against its most frequent value."""
    one = make_content().evaluation["metrics"]["field_accuracy.price"]
    above = {**one["over_constant"], "p": p, "difference": {**one["difference"], "value": value - 0.1}}
    return {**one, "tuned": {**one["tuned"], "value": value}, "constant": 0.1, "over_constant": above}


def test_each_figure_stands_beside_the_test_of_its_control():
    """An error far below its control, which one row makes so large that nothing is shown; and no control, no test."""
    content = make_content()
    metrics = content.evaluation["metrics"]
    error = metrics["absolute_error.price"]
    control = {"test": "sign_flip", "won": 7, "lost": 5, "tied": 0}
    for p, gap, own, words in (
        (0.21, (-371.0, -700.0, 40.0), (90.0, 600.0), "model not clearly better, p 0.21"),
        (1e-9, (-371.0, -700.0, -40.0), (90.0, 300.0), "model better, p < 0.001"),
        (0.01, (98.0, 20.0, 150.0), (550.0, 700.0), "model worse, p 0.01"),
        (1e-9, (-371.0, -700.0, -40.0), (90.0, 600.0), "model better, p < 0.001 (difference -371, -700 to -40)"),
        (
            1e-9,
            (-371.0, -700.0, 40.0),
            (90.0, 600.0),
            "model better, p < 0.001 (difference -371, -700 to +40; the two disagree, and the p value decides)",
        ),
    ):
        above = {**control, "p": p, "difference": dict(zip(("value", "low", "high"), gap, strict=True))}
        one = {**error, "tuned": {**error["tuned"], "value": 131.0, "low": own[0], "high": own[1]}, "constant": 502.0}
        changed = {**metrics, "absolute_error.price": {**one, "over_constant": above}}
        page = Page(render_report(replace(content, evaluation={**content.evaluation, "metrics": changed})))
        assert beside_control(changed["absolute_error.price"]) == words and f"502{unbroken(words)}" in page.text
        assert "“not clearly better” is not shown to be better than one answer to everything" in page.text
    assert beside_control(metrics["loss"]) == beside_control({**error, "over_constant": None}) == ""
    found = beside_control(metrics["exact_match"])
    assert found == f"model better, p {p_value(metrics['exact_match']['over_constant']['p'])}"


def test_right_values_out_of_form_stand_beside_the_fields():
    evaluation = make_content().evaluation
    scores = json.loads(json.dumps(evaluation["scores"]))
    scores["base"]["fields"]["price"]["out_of_form"] = 11
    html = render_report(ReportContent(title="a", evaluation={**evaluation, "scores": scores}))
    assert "<td>“price”, value there, answer out of form</td>" in html and "field “price” (8.3" in html
    assert "base said it in 11 answers out of form)" in html and html.count("<td>“price”, value there") == 1
    assert "<dt>value there, answer out of form</dt>" in html
    assert "out of form" not in render_report(ReportContent(title="a", evaluation=evaluation))


def test_a_check_that_failed_stands_beside_the_headline():
    lost = {"verdict": "fail", "line": "ANLS 5.4 % on 24 kept rows", "metric": "anls"}
    html = headline_of(checks={"forgetting": lost, "form": {"verdict": "warn", "line": "a few"}, "images": lost})
    assert 'class="verdict ">Better after tuning, but 2 checks failed' in html and "a few" not in html
    assert '<strong class="wrong">Forgotten:</strong> ANLS 5.4\u00a0% on 24 kept rows.' in html
    assert '<strong class="wrong">Nothing shows that the images matter:</strong>' in html
    content = make_content()
    words = [legend({**content.evaluation, "checks": checks}) for checks in ({"forgetting": lost}, {})]
    assert words[0].keys() - words[1].keys() == {"ANLS", "kept rows"}
    assert "was not looked at" not in html and "was not looked at" in headline_of()
    assert 'class="verdict right">Better after tuning<' in headline_of()


def test_nothing_of_a_stranger_becomes_markup():
    page = Page(render_report(make_content()))
    assert page.tags.count("script") == 1 and page.handlers == []
    assert HOSTILE in page.text  # tags, braces, ampersand and quotes arrive as the characters they are
    assert HOSTILE_GROUP in page.text and "<s>0.jpg" in page.text
    assert "h\\udcfct.jpg" in page.text  # a name that is no UTF-8, as its escape


def test_page_reaches_for_nothing_outside_itself():
    html = render_report(make_content())
    page = Page(html)
    assert all(link.startswith(("data:", "#")) for link in page.links), page.links
    assert "@import" not in html and "url(http" not in html
    assert not re.findall(r'(?<!xmlns)(?<!xmlns:xlink)="https?://', html)
    assert "default-src 'none'" in html


def test_words_of_held_out_rows_and_of_the_curve_are_explained():
    html = render_report(make_content())
    assert "<dt>held-out rows</dt><dd>rows that are there to ask about alone" in html
    assert "At each optimiser step the model is changed once" in html and "optimiser step" in html.split("<svg")[1]
    content = make_content()
    apart = replace(content, apart=True, evaluation={**content.evaluation, "data": "more.csv"})
    assert "<dt>held-out rows</dt>" not in render_report(apart), "rows of any kind"


def test_page_without_base_curve_photos_or_fields():
    content = make_content(base=False)
    bare = ReportContent(title="bare", evaluation=content.evaluation, predictions=content.predictions)
    page = Page(render_report(bare))
    assert "before" not in page.text and "this model" in page.text
    assert "svg" not in page.tags and "img" not in page.tags
    old = {name: value for name, value in content.evaluation.items() if name != "categories"}
    assert "by category" not in render_report(replace(bare, evaluation=old))
    assert Page(render_report(ReportContent(title="no rows", evaluation=None))).tags.count("form") == 0


def test_same_content_gives_the_same_page():
    assert render_report(make_content()) == render_report(make_content())


def test_curve_points_take_the_last_of_a_step_logged_twice():
    metrics = [
        {"step": 2, "loss": 1.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 0.5},
        {"step": 2, "eval_loss": 9},
        {"x": 1},
    ]
    assert curve_points(metrics, "loss") == [(1.0, 2.0), (2.0, 0.5)]
    assert curve_points(metrics, "eval_loss") == [(2.0, 9.0)]


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, -1.0)], [(1.0, 100.0), (2.0, 0.01)]])
def test_curve_of_few_zero_or_far_apart_values(points):
    svg = loss_curve_svg(points, [])
    assert svg.startswith('<svg role="img"') and svg.rstrip().endswith("</svg>") and "<metadata" not in svg


def test_photo_is_small_and_the_original_untouched():
    photo = Image.new("RGBA", (2000, 1000), (10, 20, 30, 128))
    uri = photo_uri(photo, side=100)
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 4000
    assert photo.size == (2000, 1000) and photo.mode == "RGBA"


def test_photos_stop_at_their_limits_and_say_so(tmp_path, monkeypatch):
    for i in range(6):
        Image.effect_noise((300, 300), 90).save(tmp_path / f"{i}.png")
    said = (Message("user", (TextPart("What?"),)), Message("assistant", (TextPart("It."),)))
    rows = [Row(said, (ImageRef(f"{i}.png", root=str(tmp_path)),), {}, "a.csv", i) for i in range(6)]
    (tmp_path / "1.png").unlink()
    whole = report_run.gather_photos(rows, [3, 1], 10**6)
    assert list(whole.large) == [3] and list(whole.small) == [3, 0, 2, 4, 5]
    assert whole.note == "5 of 6 rows have their photos here; those of 1 could not be opened"
    bare = report_run.gather_photos([*rows, Row(said, (), {}, "a.csv", 6)], [], 10**6)
    assert bare.note == "5 of 7 rows have their photos here (1 without any); those of 1 could not be opened"
    monkeypatch.setattr(report_run, "MOST_PHOTOS", 2)
    few = report_run.gather_photos(rows, [3], 10**6)
    assert list(few.small) == [3, 0] and few.note.startswith("2 of 6 rows have their photos here: a page holds those")
    monkeypatch.setattr(report_run, "MOST_PHOTOS", 9)
    monkeypatch.setattr(report_run, "PHOTO_BYTES", 200_000)
    large = report_run.gather_photos(rows, range(6), 10**6)
    taken = sum(len(photo) for kind in (large.large, large.small) for its in kind.values() for photo in its)
    assert 0 < taken <= 200_000 and 0 < len(large.small) < 5 and " MB at most" in large.note


@needs_browser
def test_browser_shows_the_page_without_console_errors(tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render_report(make_content()), encoding="utf-8")
    shown = browse(tmp_path, f"--screenshot={picture}", "--window-size=1000,2400", page.as_uri())
    assert "CONSOLE" not in shown.stderr
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 500  # photos, text and curve are there


PROBE = """<script>addEventListener('load', () => {
  const form = document.getElementById('filter'), counts = {};
  const count = () => {
    form.dispatchEvent(new Event('input'));
    const seen = [...document.querySelectorAll('#rows > .row')].filter(row => row.getClientRects().length).length;
    return [seen, form.querySelector('output').textContent];
  };
  for (const menu of form.querySelectorAll('select'))
    for (const option of [...menu.options].slice(1)) {
      menu.value = option.value;
      counts[option.value] = count();
      menu.value = '';
    }
  for (const words of ['wrong', 'before', 'expected', 'row', '✗', 'what is SHOWN', '299', 'Row 17', '7.jpg', 'square'])
    form.elements.words.value = words, counts[`search ${words}`] = count();
  form.elements.words.value = 'CAP number 4';
  counts.words = count();
  form.querySelectorAll('select')[0].value = 'right';
  counts.none = count();
  form.querySelectorAll('select')[0].value = form.elements.words.value = '';
  counts.all = count();
  parent.postMessage(JSON.stringify({
    wide: document.documentElement.scrollWidth, title: document.title, counts, menus: getComputedStyle(form).display,
    photos: [...document.querySelectorAll('.sample img')].filter(photo => photo.naturalWidth > 0).length,
    hidden: [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)
      .map(box => box.textContent),
  }), '*');
})</script></body>"""


@needs_browser
def test_filters_of_300_rows_count_as_the_json_and_the_page_fits_a_phone(tmp_path: Path):
    content = replace(
        make_content(300),
        fingerprints={"training rows": "9f2c77ab" * 4, "recipe.yaml": "m" * 32, "computed in": "float32"},
    )
    html, evaluation = render_report(content), content.evaluation
    page = tmp_path / "report.html"
    page.write_text(html, encoding="utf-8")
    shown = browse(tmp_path, "--dump-dom", page.as_uri())  # as it is: the policy lets its script run, and no other
    assert "CONSOLE" not in shown.stderr and '<form id="filter" autocomplete' in shown.stdout
    probed = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", html).replace("</body>", PROBE)
    page.write_text(probed, encoding="utf-8")
    frame = (
        "<!doctype html><p id=out></p><script>onmessage = e => { out.textContent = e.data }</script>"
        "<iframe src=report.html width=360 height=800></iframe>"
    )
    (tmp_path / "phone.html").write_text(frame, encoding="utf-8")
    seen = browse(tmp_path, "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "phone.html").as_uri())
    assert "CONSOLE" not in seen.stderr
    found = json.loads(re.search(r'<p id="out">(.*?)</p>', seen.stdout)[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert found["hidden"] == [], "no column of a table is out of sight"
    assert found["wide"] == 360 and found["photos"] > 0 and found["menus"] == "flex"
    assert found["title"] == "a run <of> tests · phi3v report"  # no text of a stranger ran
    searched = {name[7:]: shown for name, (shown, _) in found["counts"].items() if name.startswith("search ")}
    found["counts"] = {name: one for name, one in found["counts"].items() if not name.startswith("search ")}
    assert searched == {  # labels of the page are in no row, the question that all share is in every one
        **dict.fromkeys(["wrong", "before", "expected", "row", "✗"], 0),
        **{"what is SHOWN": 300, "299": 2, "Row 17": 1, "7.jpg": 30, "square": 299},
    }
    primary = evaluation["metrics"][evaluation["primary"]]
    right = sum(one["right"] for one in content.predictions)
    expected = {"right": right, "wrong": 300 - right, "all": 300, "words": 4 + 10, "none": 0}
    expected |= {"won": primary["won"], "lost": primary["lost"], "same": primary["tied"]}
    for at, field in enumerate(["title", "group", "price"]):
        share = evaluation["metrics"][f"field_accuracy.{field}"]["tuned"]["value"]
        expected[f"f{at}"] = round(300 * (1 - share))
    [(name, values)] = evaluation["categories"].items()
    assert name == "group" and list(values) == ["TOPS", HOSTILE_GROUP]
    expected |= {"c0-0": values[HOSTILE_GROUP]["rows"], "c0-1": values["TOPS"]["rows"]}  # in the order of the rows
    assert primary["won"] > 200 and primary["lost"] == 0 and primary["tied"] > 10
    words = {name: [count, f"{count} of 300 rows"] for name, count in expected.items()}
    assert {**found["counts"], "words": words["words"]} == words
    hits = sum("cap" in one["tuned"].lower() and "number 4" in one["tuned"] for one in content.predictions)
    assert found["counts"]["words"][0] >= hits > 0
