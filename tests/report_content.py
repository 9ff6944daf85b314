"""A report of a run that never was, with texts that would like to be markup; and a browser to show pages with."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from phi3v.data.data_uri import photo_uri
from phi3v.data.schema import Message, Row, TextPart
from phi3v.evaluation.categories import break_down
from phi3v.evaluation.constant import best_constant, constant_columns
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.intervals import shares_of_rows
from phi3v.evaluation.kinds import choose_scoring
from phi3v.evaluation.metric_table import metric_table
from phi3v.evaluation.metrics import score_answers
from phi3v.evaluation.report import Photos, ReportContent
from phi3v.evaluation.result import prediction_rows
from phi3v.evaluation.row_scores import score_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEMPLATE = AnswerTemplate("Product: {title}, Group: {group}, Price: {price}")
HOSTILE_GROUP = "<b onclick=alert(1)>&amp;"
HOSTILE = (
    "Product: <script>document.title='owned'</script><img src=x onerror=alert(1)>, Group: TOPS, "
    'Price: {{ 7*7 }} & "quotes" \u202eturned'
)


def make_predictions(rows: int, base: bool = True) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Predictions of `rows` products and their evaluation.json: base answers all wrong but row 2's, of the tuned
    ones row 0 is hostile and every tenth from row 4 on has another title."""
    groups = [HOSTILE_GROUP if i % 3 == 0 else "TOPS" for i in range(rows)]
    expected = [f"Product: Wool Scarf number {i}, Group: {groups[i]}, Price: {100 + i}" for i in range(rows)]
    tuned = [one.replace("Scarf", "Cap") if i % 10 == 4 else one for i, one in enumerate(expected)]
    tuned[0] = HOSTILE
    wrong = ["a red square" if i != 2 else expected[2] for i in range(rows)]
    asked = ["What is shown? <i>&"] * rows
    scoring = choose_scoring(expected, asked, TEMPLATE, numeric_fields=["price"])
    ours, theirs = (
        score_rows(scoring, expected, answers, asked, [loss * 3] * rows, [3] * rows)
        for answers, loss in ((tuned, 0.012345), (wrong, 4.5))
    )
    found = [
        Row(
            (Message("user", (TextPart(asked[i]),)), Message("assistant", (TextPart(expected[i]),))), (), {}, "a.csv", i
        )
        for i in range(rows)
    ]
    single = best_constant(scoring, expected, asked, tuned)
    constant = constant_columns(scoring, expected, asked, answer=single.answer)
    beside = (wrong, theirs) if base else (None, None)
    predictions = prediction_rows(found, tuned, beside[0], TEMPLATE, ours, beside[1], np.arange(rows))
    for one in predictions:
        one["images"] = [f"<s>{one['row']}.jpg", *(["h\udcfct.jpg"] if one["row"] == 1 else [])]
    return predictions, {
        "target": "runs/test",
        "base": "tiny/base" if base else None,
        "against": "base" if base else None,
        "rows": rows,
        "images": {"rows": rows, "different": rows},
        "created": "2026-01-02T03:04:05Z",
        "kind": {"name": scoring.kind, "why": scoring.why},
        "primary": scoring.metrics[0],
        "constant": single.to_dict(),
        "metrics": metric_table(ours, beside[1], constant),
        "categories": break_down(predictions, scoring.metrics[0], constant[scoring.metrics[0]]),
        "notes": [],
        "checks": {"overlap": {"verdict": "fail", "line": "2 of 12 rows <leaked>"}},
        "scores": {
            "base": score_answers(expected, wrong, TEMPLATE, ["price"], loss=4.5).to_dict() if base else None,
            "tuned": score_answers(expected, tuned, TEMPLATE, ["price"], loss=0.012345).to_dict(),
        },
    }


def make_content(rows: int = 12, base: bool = True) -> ReportContent:
    """A report of a run that never was, six of whose rows have photos, row 0 two of them."""
    predictions, evaluation = make_predictions(rows, base)
    photos = {}
    for i in range(6):
        photo = Image.new("RGB", (480, 640 if i % 2 else 300), (200 - 20 * i, 60 + 20 * i, 90))
        ImageDraw.Draw(photo).ellipse((100, 60, 380, 260), fill=(250, 240, 200))
        photos[i] = [photo_uri(photo, 112)] * (2 if i == 0 else 1)
    metrics = [{"step": s, "loss": 4.0 * 0.93**s, "learning_rate": 1e-4} for s in range(1, 101)]
    metrics += [{"step": s, "eval_loss": 4.2 * 0.93**s} for s in range(20, 101, 20)]
    return ReportContent(
        title="a run <of> tests",
        evaluation=evaluation,
        metrics=metrics,
        predictions=predictions,
        samples=4,
        photos=Photos(large=photos, small=photos, note=f"6 of {rows} rows have their photos here"),
        trained=[
            {"part": "language model (LoRA)", "parameters": 1234567, "trained": 34567, "share": 0.028},
            {"part": "vision tower", "parameters": 765432, "trained": 0, "share": 0.0},
        ],
        recipe="model:\n  name: tiny/base\noutput: runs/test # <b>\n",
        versions={"phi3v": "0.1.0", "torch": "2.13"},
        times={"training": 75.0, "evaluation": 4.23},
        memory_gib={"training": 3.25, "evaluation": 0.75},
        fingerprints={"training rows": "9f2c77ab"},
        problems=["a.csv, row 99: column <title> is empty"],
        controls={
            "image blanked": vars(shares_of_rows([[False] * 12])[0]),
            "image swapped": vars(shares_of_rows([[True] + [False] * 11])[0]),
        },
    )


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._hidden = tag in ("style", "script")
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text += data


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium once with a fresh profile, without any service that would reach for the network."""
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --enable-logging=stderr --hide-scrollbars"
    )
    quiet += " --disable-background-networking --disable-component-update --disable-sync"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *quiet.split(), profile, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
