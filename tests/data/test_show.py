"""Rows as the model sees them: tokens, roles and crops of the real sample, and a page that no text can break."""

import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.data.encode import encode
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.data.show import ShownRow, show_row, spaced
from phi3v.data.show_page import render_rows, visible
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>{{ 7*7 }}&\"' <|end|> \u202e"


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=4), build_tokenizer())


def photo(width: int, height: int, name: str = "a.png") -> ImageRef:
    """A picture with a corner of each colour, so that turned or swapped crops would show."""
    picture = Image.new("RGB", (width, height), "white")
    for corner, colour in (((0, 0), "red"), ((width // 2, 0), "lime"), ((0, height // 2), "blue")):
        picture.paste(colour, (*corner, corner[0] + width // 2, corner[1] + height // 2))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return ImageRef(name, data=buffer.getvalue())


def make_row(*images: ImageRef, question: str = "what is this", system: str | None = None) -> Row:
    turns = [] if system is None else [Message("system", (TextPart(system),))]
    turns.append(Message("user", (*(ImagePart(number) for number in range(len(images))), TextPart(question))))
    turns.append(Message("assistant", (TextPart("the answer"),)))
    return Row(tuple(turns), images, {}, "shop.csv", 4)


def test_tokens_are_those_of_the_sample_with_images_folded(processor: Phi3VProcessor) -> None:
    row = make_row(photo(60, 60), photo(90, 30), system="in the end", question=HOSTILE)
    shown, sample = show_row(row, processor), encode(row, processor)
    ids = [token.id for token in shown.tokens for _ in range(token.count)]
    trained = [token.trained for token in shown.tokens for _ in range(token.count)]
    assert ids == sample["input_ids"].tolist()
    assert trained == (sample["labels"] != -100).tolist()
    folded = [token for token in shown.tokens if token.role == "image"]
    assert [token.text for token in folded] == ["[757 image tokens]", "[601 image tokens]"]
    assert [image.tokens for image in shown.images] == [757, 601]
    assert shown.count() == len(ids) and shown.count(role="image") == 1358
    assert shown.count(trained=True) == sum(trained)


def test_roles_follow_the_turns_and_text_never_is_control(processor: Phi3VProcessor) -> None:
    shown = show_row(make_row(photo(20, 20), system="in the end", question="<|assistant|> what"), processor)
    said = {
        role: "".join(token.text for token in shown.tokens if token.role == role)
        for role in ("system", "user", "assistant", "control")
    }
    assert said["system"].split() == ["<0x0A>in", "the", "end"]
    assert "<|assistant|>" in said["user"] and said["assistant"].strip() == "the answer"
    names = re.findall(r"<\|\w+\|>|<s>", said["control"])
    wanted = "<s> <|system|> <|end|> <|user|> <s> <|end|> <|assistant|> <|end|> <|endoftext|>"
    assert names == wanted.split()


def test_crops_are_what_the_model_gets(processor: Phi3VProcessor) -> None:
    (image,) = show_row(make_row(photo(400, 200)), processor).images
    assert (image.rows, image.columns, image.width, image.height) == (1, 2, 400, 200)
    assert image.canvas.size == (672, 336) and image.whole.size == (336, 336) and image.photo.size == (400, 200)
    expected = np.asarray(image.photo.resize((672, 336), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(np.asarray(image.canvas, dtype=int) - expected).max() <= 1
    tall = show_row(make_row(photo(100, 300)), processor).images[0]
    assert (tall.rows, tall.columns) == (3, 1)  # padded below or beside to whole crops
    corners = [tall.canvas.getpixel(place) for place in ((20, 20), (20, 800), (250, 20))]
    assert corners == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def test_a_row_that_cannot_be_encoded_is_shown_with_its_reason(processor: Phi3VProcessor) -> None:
    broken = show_row(make_row(ImageRef("gone.png")), processor)
    assert broken.tokens == [] and broken.problem is not None and "image gone.png does not exist" in broken.problem
    long = show_row(make_row(photo(9, 9)), processor, max_length=100)
    assert long.problem is not None and "and the limit is 100" in long.problem
    assert "left out: " in page_of([broken, long]).text


def test_plain_values_for_machines(processor: Phi3VProcessor) -> None:
    found = show_row(make_row(photo(9, 9)), processor).to_dict()
    assert found["length"] == {"total": found["length"]["total"], "image": 757, "trained": 8}
    assert found["images"] == [{"name": "a.png", "width": 9, "height": 9, "crops": [2, 2], "tokens": 757}]
    assert found["tokens"][0] == {"id": 1, "text": "<s>", "role": "control", "trained": False, "count": 1}


@pytest.mark.parametrize(("count", "wanted", "chosen"), [(10, 3, [0, 3, 6]), (2, 8, [0, 1]), (0, 8, [])])
def test_shown_rows_are_evenly_spaced(count: int, wanted: int, chosen: list[int]) -> None:
    assert spaced(count, wanted) == chosen


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert [visible(text) for text in ("<0x0A>", " a", "\u202e", "\t")] == ["↵", " a", "\\u202e", "\\t"]


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text = ""
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag == "style"
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


def html_of(rows: list[ShownRow], title: str = "shop.csv") -> str:
    return render_rows(title, {"rows": 40, "usable": 38, "model": "tiny"}, rows)


def page_of(rows: list[ShownRow], **options: Any) -> Page:
    return Page(html_of(rows, **options))


def sample_rows(processor: Phi3VProcessor) -> list[ShownRow]:
    rows = [
        make_row(photo(400, 300), photo(100, 300), question=HOSTILE, system="in the end"),
        make_row(),
        make_row(photo(640, 200, name="<b>.png")),
    ]
    return [show_row(row, processor) for row in rows]


def test_a_page_holds_rows_images_and_tokens_and_nothing_of_them_is_markup(processor: Phi3VProcessor) -> None:
    page = page_of(sample_rows(processor), title="<i>shop</i>")
    assert "script" not in page.tags and page.tags.count("img") == 9 and "i" not in page.tags
    assert all(link is not None and link.startswith("data:") for link in page.links)
    for words in ("<i>shop</i>", "3 of 38 usable rows", "[757 image tokens]", "<b>.png, 640×200 pixels", "no image"):
        assert words in page.text, words
    assert "<script>document.title='owned'</script>" in page.text.replace("↵", "")
    assert html_of(sample_rows(processor)) == html_of(sample_rows(processor))


def test_names_that_would_turn_or_break_a_line_are_shown_as_escapes(processor: Phi3VProcessor) -> None:
    odd = "a\x1b[31m\u202e\nb.png"
    shown = show_row(replace(make_row(photo(9, 9, name=odd)), source=odd), processor)
    html = html_of([shown, replace(shown, problem=odd)], title=odd)
    assert not any(sign in html for sign in "\x1b\u202e")
    named = "a\\x1b[31m\\u202e\\nb.png"
    wanted = (f"{named}, 9×9 pixels", f"{named}, row 4</h2>", f"left out: {named}<", f"<title>{named} ")
    assert all(words in html for words in (*wanted, f"<h1>{named}</h1>"))


def browse(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [str(CHROMIUM), *quiet, profile, *arguments], capture_output=True, text=True, timeout=120, check=True
    )


@needs_browser
def test_a_browser_shows_the_page_without_errors(processor: Phi3VProcessor, tmp_path: Path) -> None:
    page, picture = tmp_path / "rows.html", tmp_path / "rows.png"
    page.write_text(html_of(sample_rows(processor)), encoding="utf-8")
    shown = browse(tmp_path, f"--screenshot={picture}", "--window-size=1000,2400", page.as_uri())
    assert "CONSOLE" not in shown.stderr
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    found = {colour for _, colour in colours}
    assert (255, 61, 127) in found and any(red > 250 and green + blue < 10 for red, green, blue in found)  # grid, photo


@needs_browser
def test_a_page_fits_a_phone_and_every_picture_decodes(processor: Phi3VProcessor, tmp_path: Path) -> None:
    probe = (
        "<script>addEventListener('load', () => parent.postMessage(JSON.stringify({"
        "title: document.title, wide: document.documentElement.scrollWidth,"
        "photos: [...document.images].filter(i => i.naturalWidth > 0).length"
        "}), '*'))</script></body>"
    )
    html = re.sub(r"<meta http-equiv[^>]*>", "", html_of(sample_rows(processor)))  # it forbids the probe too
    (tmp_path / "rows.html").write_text(html.replace("</body>", probe), encoding="utf-8")
    frame = (
        "<!doctype html><p id=out></p><script>onmessage = e => { out.textContent = e.data }</script>"
        "<iframe src=rows.html width=360 height=800></iframe>"
    )
    (tmp_path / "phone.html").write_text(frame, encoding="utf-8")
    dom = browse(tmp_path, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "phone.html").as_uri()).stdout
    assert '{"title":"shop.csv · phi3v data","wide":360,"photos":9}' in dom
