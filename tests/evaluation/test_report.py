"""The report page: what it says, that nothing in it is markup by accident, and how a real browser takes it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageDraw

from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.kinds import choose_scoring
from phi3v.evaluation.metric_table import constant_scores, metric_table
from phi3v.evaluation.metrics import score_answers
from phi3v.evaluation.report import (
    ReportContent,
    Sample,
    curve_points,
    loss_curve_svg,
    photo_uri,
    render_report,
)
from phi3v.evaluation.row_scores import score_rows
from phi3v.evaluation.shares import Share

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
TEMPLATE = AnswerTemplate("Product: {title}, Price: {price}")
HOSTILE = "Product: <script>document.title='owned'</script><img src=x onerror=alert(1)>, Price: {{ 7*7 }} & \"quotes\""


def make_content(rows: int = 12, base: bool = True) -> ReportContent:
    """A report of a run that never was: `rows` products, base answers all wrong, the first tuned one hostile."""
    expected = [f"Product: Wool Scarf number {i}, Price: {100 + i}" for i in range(rows)]
    tuned = [HOSTILE, *expected[1:]]
    wrong = ["a red square"] * rows
    asked = ["What is shown?"] * rows
    scoring = choose_scoring(expected, asked, TEMPLATE, numeric_fields=["price"])
    columns = [
        score_rows(scoring, expected, answers, asked, [loss * 3] * rows, [3] * rows)
        for answers, loss in ((tuned, 0.012345), (wrong, 4.5))
    ]
    table = metric_table(columns[0], columns[1] if base else None, constant_scores(scoring, expected, asked))
    evaluation = {
        "target": "runs/test",
        "base": "tiny/base" if base else None,
        "against": "base" if base else None,
        "rows": rows,
        "created": "2026-01-02T03:04:05Z",
        "kind": {"name": scoring.kind, "why": scoring.why},
        "primary": scoring.metrics[0],
        "metrics": table,
        "notes": [],
        "checks": {"overlap": {"verdict": "fail", "line": "2 of 12 rows <leaked>"}},
        "scores": {
            "base": score_answers(expected, wrong, TEMPLATE, ["price"], loss=4.5).to_dict() if base else None,
            "tuned": score_answers(expected, tuned, TEMPLATE, ["price"], loss=0.012345).to_dict(),
        },
    }
    samples = []
    for i in range(min(rows, 6)):
        photo = Image.new("RGB", (480, 640 if i % 2 else 300), (200 - 20 * i, 60 + 20 * i, 90))
        ImageDraw.Draw(photo).ellipse((100, 60, 380, 260), fill=(250, 240, 200))
        photos = [photo, photo.rotate(90)] if i == 2 else [photo]
        samples.append(Sample(i, photos, "What is shown?", expected[i], wrong[i] if base else None, tuned[i]))
    metrics = [{"step": s, "loss": 4.0 * 0.93**s, "learning_rate": 1e-4} for s in range(1, 101)]
    metrics += [{"step": s, "eval_loss": 4.2 * 0.93**s} for s in range(20, 101, 20)]
    return ReportContent(
        title="a run <of> tests",
        evaluation=evaluation,
        metrics=metrics,
        samples=samples,
        trained=[
            {"part": "language model (LoRA)", "parameters": 1234567, "trained": 34567, "share": 0.028},
            {"part": "vision tower", "parameters": 765432, "trained": 0, "share": 0.0},
        ],
        recipe="model:\n  name: tiny/base\noutput: runs/test # <b>\n",
        versions={"phi3v": "0.1.0", "torch": "2.13"},
        times={"training": 75.0, "evaluation": 4.23},
        controls={"image blanked": vars(Share.of(0, 12)), "image swapped": vars(Share.of(1, 12))},
    )


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._hidden = tag == "style"
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text += data


def test_page_holds_scores_samples_recipe_and_times():
    page = Page(render_report(make_content()))
    for words in (
        "12 held-out rows",
        "before (base)",
        "91.7 %",
        "Exact match on rows that training never saw",
        "12 rows, 95 % interval 64.6 % to 98.5 %",
        "Difference +91.7 points",
        "p < 0.001 (McNemar's test): 11 rows better, 0 worse, 1 the same",
        "Scored as templated answers: 12 of 12 expected answers have the form",
        "field “price”",
        "“price”, mean absolute error",
        "image blanked",
        "fail: 2 of 12 rows <leaked>.",
        "vision tower",
        "1,234,567",
        "1 min 15 s",
        "torch  2.13",
        "output: runs/test # <b>",
        "a run <of> tests",
        "loss per trained token",
        "0.0123",
    ):
        assert words in page.text, words
    assert page.tags.count("img") == 7 and page.tags.count("svg") == 1
    assert page.text.count("✓ right") == 5 and page.text.count("✗ wrong") == 7


def test_nothing_of_a_stranger_becomes_markup():
    page = Page(render_report(make_content()))
    assert "script" not in page.tags
    assert HOSTILE in page.text  # tags, braces, ampersand and quotes arrive as the characters they are


def test_page_reaches_for_nothing_outside_itself():
    html = render_report(make_content())
    page = Page(html)
    assert all(link.startswith(("data:", "#")) for link in page.links), page.links
    assert "@import" not in html and "url(http" not in html
    assert not re.findall(r'(?<!xmlns)(?<!xmlns:xlink)="https?://', html)


def test_page_without_base_curve_samples_or_fields():
    content = make_content(base=False)
    bare = ReportContent(title="bare", evaluation=content.evaluation)
    page = Page(render_report(bare))
    assert "before" not in page.text and "this model" in page.text
    assert "svg" not in page.tags and "img" not in page.tags


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


def browse(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium once with a fresh profile, without any service that would reach for the network."""
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--enable-logging=stderr",
    ]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [CHROMIUM, *quiet, profile, *arguments], capture_output=True, text=True, timeout=120, check=True
    )


@needs_browser
def test_browser_shows_the_page_without_console_errors(tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render_report(make_content()), encoding="utf-8")
    shown = browse(tmp_path, f"--screenshot={picture}", "--window-size=1000,2400", page.as_uri())
    assert "CONSOLE" not in shown.stderr
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 500  # photos, text and curve are there


@needs_browser
def test_page_fits_a_phone_and_every_photo_decodes(tmp_path):
    probe = (
        "<script>addEventListener('load', () => parent.postMessage(JSON.stringify({"
        "wide: document.documentElement.scrollWidth,"
        "photos: [...document.images].filter(i => i.naturalWidth > 0).length"
        "}), '*'))</script></body>"
    )
    html = render_report(make_content()).replace("</body>", probe)
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    frame = (
        "<!doctype html><p id=out></p><script>onmessage = e => { out.textContent = e.data }</script>"
        "<iframe src=report.html width=360 height=800></iframe>"
    )
    (tmp_path / "phone.html").write_text(frame, encoding="utf-8")
    dom = browse(tmp_path, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "phone.html").as_uri()).stdout
    assert '{"wide":360,"photos":7}' in dom
