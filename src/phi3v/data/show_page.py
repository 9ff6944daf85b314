"""Shown rows as one HTML page that needs no network, no script and no other file; images as a part of another page.

Both are templates beside this file, filled by jinja2 with auto-escaping on, so no text of a data set can become markup.
They are written by whoever called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from phi3v.data.data_uri import photo_uri
from phi3v.data.show import ShownImage, ShownRow, ShownToken

PAGE_MARK = '<meta name="generator" content="phi3v data show">'
"""What every such page holds near its beginning."""

CANVAS_SIDE = 720  # pixels of the longer side; two crops of a 4 x 4 grid then still show what a letter is


def render_rows(title: str, summary: Mapping[str, Any], shown: Sequence[ShownRow]) -> str:
    """The whole page as one HTML text.

    Args:
        title: what the page is about, the recipe's name for instance.
        summary: "rows", "usable" (numbers) and "model" (a name).
        shown: the rows, in the order in which they are to stand.
    """
    template = _template("show_page.html.j2")
    return template.render(mark=Markup(PAGE_MARK), title=title, summary=summary, shown=shown, canvas_side=CANVAS_SIDE)


def render_images(images: Sequence[ShownImage]) -> str:
    """Images as the model sees them, as one HTML element with its own styles."""
    return _template("show_prompt.html.j2").render(images=images, canvas_side=CANVAS_SIDE)


def _template(name: str) -> Template:
    """One of the templates beside this file."""
    environment = Environment(
        loader=PackageLoader("phi3v.data", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(photo=photo_uri, number=_number, visible=visible, hint=hint)
    return environment.get_template(name)


def visible(text: str) -> str:
    """A token's text with what cannot be seen made visible.

    Example: "<0x0A>" -> "↵", "\\u202e" (which turns the text that follows) -> "\\\\u202e", " a" -> " a".
    """
    if text in ("<0x0A>", "\n"):
        return "↵"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def hint(token: ShownToken) -> str:
    """What a pointer on a token says: "27 · user", "32007 · control, trained"."""
    return f"{token.id} · {token.role}" + (", trained" if token.trained else "")


def _number(value: int) -> str:
    """2509 -> "2,509"."""
    return f"{value:,}"
