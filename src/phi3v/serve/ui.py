"""The page of `phi3v chat`: photos and questions in, the answers of a model and of its base side by side.

The only file that knows Gradio. What is asked and answered is `side_by_side`'s; here it gets its looks. Whatever people
or models write is escaped, Gradio's own sharing, statistics, interfaces and fonts from the internet are off, and what
is uploaded lies in one folder that its owner deletes.
"""

import hmac
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from phi3v.errors import DataError, DeviceError, ImageError
from phi3v.serve.page_guard import PageGuard
from phi3v.serve.side_by_side import MAX_FILE, MAX_PHOTOS, Photo, Settings, SideBySide, Turn

MAX_ANSWER = 4096  # tokens that can be asked for
_KEPT_PHOTOS = 32  # opened photos that are kept from one look to the next, of all conversations
_PAUSE = 0.05  # seconds between two looks at a growing answer
_LONGEST_NAME = 80
_NO_PHOTO = (
    '<p class="none">Drop photos into the box: what the model sees of them, and what they cost, is shown here.</p>'
)
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_CSS = """
.gradio-container { max-width:1400px !important; margin:0 auto !important; }
.head h1 { font-size:1.25rem; margin:0; overflow-wrap:anywhere; }
.head p, .cost p, .none { font-size:.875rem; margin:.1rem 0; opacity:.8; overflow-wrap:anywhere; }
.cost meter { width:100%; height:.6rem; }
.notice { color:var(--error-text-color, #b3372f); border:1px solid currentcolor; border-radius:8px;
  padding:.5rem .75rem; overflow-wrap:anywhere; }
.answers .md { white-space:pre-wrap; overflow-wrap:anywhere; }
.answers .message img { max-height:9rem; width:auto; }
.answers .message-buttons { display:none; }
"""


class ChatPage:
    """The page and what happens on it.

    Example: `ChatPage(side, folder, {"tuned": "runs/shop", "base": "microsoft/Phi-3.5-vision-instruct"}, "What is
    it?").blocks()` is a page of two columns.
    """

    def __init__(self, side: SideBySide, folder: Path, names: Mapping[str, str], question: str) -> None:
        """Keep what answers, where uploads lie, what stands above each column, and a question to begin with."""
        self._side = side
        self._folder = folder.resolve()
        self._names = names
        self._question = question
        self._asked: dict[str, str] = {}  # session whose question is being answered -> "", "stop" or "clear"
        self._take = lru_cache(maxsize=_KEPT_PHOTOS)(self._open)
        self._seen = lru_cache(maxsize=_KEPT_PHOTOS)(lambda photo: side.seen([photo]))

    def blocks(self) -> Any:
        """The page as Gradio's Blocks."""
        columns = self._side.columns
        with gr.Blocks(title=f"phi3v · {self._names[columns[0]]}", analytics_enabled=False) as page:
            turns = gr.State(())
            looked_at = gr.State(())
            gr.HTML(self._head(), elem_classes="head")
            with gr.Row():
                chats = [self._column(column) for column in columns]
            notice = gr.HTML("", elem_id="notice", padding=False)
            box = gr.MultimodalTextbox(
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                placeholder="Drop photos here, and ask about them",
                show_label=False,
                label="Question and photos",
                max_plain_text_length=1_000_000,
                elem_id="box",
            )
            cost = gr.HTML(self._cost_line((), "", ()), elem_id="cost", padding=False)
            with gr.Row():
                example = gr.Button(self._question, size="sm", elem_id="example")
                clear = gr.Button("Clear the conversation", size="sm", elem_id="clear")
            with gr.Accordion("Settings", open=False, elem_classes="settings"):
                longest = gr.Slider(1, MAX_ANSWER, Settings().max_new_tokens, step=1, label="Longest answer, in tokens")
                warmth = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the likeliest token, always the same)")
            with gr.Accordion("Photos as the model sees them", open=True):
                views = gr.HTML(_NO_PHOTO, elem_id="views")
            looking: dict[str, Any] = {
                "fn": self.look,
                "inputs": [box, turns, looked_at],
                "outputs": [cost, views, looked_at],
                "show_progress": "hidden",
                "api_visibility": "private",
            }
            box.change(**looking, trigger_mode="always_last")
            asked = box.submit(
                self.send,
                [box, turns, longest, warmth],
                [box, turns, notice, *chats],
                show_progress_on=[notice],
                concurrency_id="model",
                concurrency_limit=1,
                api_visibility="private",
            )
            asked.then(**looking)
            over: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            box.stop(self.stop, None, None, **over)
            example.click(self.fill, [box], [box], **over)
            for emptied in (clear.click, *(chat.clear for chat in chats)):
                emptied(self.clear, None, [box, turns, notice, *chats], **over).then(**looking)
        page.has_launched = True  # Gradio looks at the paths that a browser names only if it is
        return page.queue(max_size=32, api_open=False)

    def send(
        self, value: Mapping[str, Any], turns: Sequence[Turn], longest: float, warmth: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Answers a question, column by column; one that cannot be answered is in the box again, the reason at it.

        Yields: the box, the turns, the notice, and what each column shows, some times a second. What is yielded last
        holds, also where somebody has stopped the answer or cleared the conversation meanwhile.
        """
        session = str(request.session_hash)
        self._asked[session] = ""
        try:
            settings = Settings(int(longest), float(warmth))
            answers = self._side.answer(turns, value["text"], self._photos(value), settings)
            with closing(answers):
                yield from self._shown(answers, turns, session)
        except (DataError, DeviceError) as error:
            # what is wrong with the box itself stands in the line below it for as long as it is there
            notice = "" if self._box_fault(value, turns) else _notice(error)
            yield _ready(value=value), turns, notice, *self._chats(turns)
        finally:
            self._asked.pop(session, None)

    def _shown(self, answers: Iterator[Turn], turns: Sequence[Turn], session: str) -> Iterator[tuple[Any, ...]]:
        """What `send` yields of turns that grow."""
        shown, column, began = 0.0, None, False
        for turn in answers:
            if self._asked[session] == "clear":
                yield _ready(), (), "", *self._chats(())
                return
            if self._asked[session] == "stop":
                turn = replace(turn, answering=None)
            elif turn.answering == column and time.monotonic() - shown < _PAUSE:
                continue
            shown, column = time.monotonic(), turn.answering
            box = _ready() if column is None else gr.skip() if began else _busy()
            began = True
            yield box, (*turns, turn), "", *self._chats((*turns, turn))
            if column is None:
                return

    def look(
        self, value: Mapping[str, Any], turns: Sequence[Turn], looked_at: Sequence[str]
    ) -> tuple[Any, Any, Sequence[str]]:
        """What the conversation costs with what is in the box; its photos too, where they are others than before."""
        try:
            waiting = self._photos(value)
            cost = self._cost_line(turns, value["text"], waiting)
        except DataError as error:
            return _notice(error), gr.skip(), looked_at
        photos = [*(photo for turn in turns for photo in turn.photos), *waiting]
        names = tuple(photo.digest for photo in photos)
        if names == tuple(looked_at):
            return cost, gr.skip(), looked_at
        return cost, "".join(map(self._seen, photos)) or _NO_PHOTO, names

    def _box_fault(self, value: Mapping[str, Any], turns: Sequence[Turn]) -> bool:
        """Whether `look` tells why this cannot be sent: a photo that cannot be used, a text that cannot be counted."""
        try:
            self._cost_line(turns, value["text"], self._photos(value))
        except DataError:
            return True
        return False

    def stop(self, request: gr.Request) -> None:
        """Has the answer end with what there is of it; `send` shows that."""
        if request.session_hash in self._asked:
            self._asked[request.session_hash] = "stop"

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """A conversation without turns; what is in the box stays. While an answer is made, `send` shows that."""
        if request.session_hash in self._asked:
            self._asked[request.session_hash] = "clear"
        return _ready(), (), "", *self._chats(())

    def fill(self, value: Mapping[str, Any]) -> Any:
        """The example question in the box, beside the photos that are in it."""
        return {"text": self._question, "files": value["files"]}

    def _photos(self, value: Mapping[str, Any]) -> list[Photo]:
        """The photos in the box. Raises: ImageError for one that cannot be used, DataError for too many."""
        if len(value["files"]) > MAX_PHOTOS:
            raise DataError(
                f"{len(value['files'])} photos are in the box, and the limit is {MAX_PHOTOS}: take some out"
            )
        return [self._take(path) for path in value["files"]]

    def _open(self, path: str) -> Photo:
        """An upload as a photo; a thumbnail of it lies beside the uploads from now on."""
        place = Path(path).resolve()
        name = place.name if len(place.name) <= _LONGEST_NAME else place.name[: _LONGEST_NAME - 3] + "..."
        if not place.is_relative_to(self._folder):
            raise ImageError(f"image {name} was not uploaded: drop it into the page")
        photo = self._side.take(name, place.read_bytes())
        self._thumbnail(photo).write_bytes(photo.thumbnail)
        return photo

    def _thumbnail(self, photo: Photo) -> Path:
        """Where its thumbnail lies."""
        return self._folder / f"{photo.digest}.jpg"

    def _chats(self, turns: Sequence[Turn]) -> list[list[dict[str, Any]]]:
        """What each column shows: Gradio's messages, their text escaped, since it takes all text for HTML."""
        return [
            [message for turn in turns for message in self._messages(turn, column)] for column in self._side.columns
        ]

    def _messages(self, turn: Turn, column: str) -> list[dict[str, Any]]:
        """A question with its photos, and the answer.

        Example: `Turn("2 < 3?", (), {"tuned": "Yes"})` is [{"role": "user", "content": [{"type": "text", "text": "2
        &lt; 3?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}].
        """
        photos = [{"path": str(self._thumbnail(photo)), "alt_text": photo.name} for photo in turn.photos]
        answer = escape(turn.answers.get(column, ""))
        if not answer:
            answer = "<em>…</em>" if turn.answering is not None else "<em>no answer</em>"
        return [
            {"role": "user", "content": [*photos, {"type": "text", "text": escape(turn.question)}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    def _column(self, column: str) -> Any:
        """An empty column."""
        return gr.Chatbot(
            label=self._names[column] if len(self._side.columns) == 1 else f"{column}: {self._names[column]}",
            elem_id=column,
            elem_classes="answers",
            height="50vh",
            min_width=320,
            buttons=[],
            render_markdown=False,
            sanitize_html=True,
            latex_delimiters=[],
            feedback_options=None,
            allow_file_downloads=False,
            placeholder="",
        )

    def _head(self) -> str:
        """What answers here."""
        names = " beside ".join(escape(self._names[column]) for column in self._side.columns)
        alone = f" {escape(self._side.why_alone)}" if self._side.why_alone else ""
        return (
            f"<h1>{names}</h1><p>One model in memory, its context {self._side.context:,} tokens. Answers are those of "
            f"the model and may be wrong; photos stay on the machine that runs it.{alone}</p>"
        )

    def _cost_line(self, turns: Sequence[Turn], question: str, photos: Sequence[Photo]) -> str:
        """The tokens of a conversation against the context, for each column where they differ."""
        costs = self._side.costs(turns, question, photos)
        totals = {column: length.total for column, length in costs.items()}
        first = next(iter(costs.values()))
        count = sum(len(turn.photos) for turn in turns) + len(photos)
        one = len(set(totals.values())) == 1
        told = f"{first.total:,}" if one else ", ".join(f"{column} {total:,}" for column, total in totals.items())
        most = max(totals.values())
        spent = (
            f"{first.image:,} for {count} photo{'s' * (count != 1)}, the rest for text"
            if count
            else "all of them for text"
        )
        return (
            f'<div class="cost"><meter min="0" max="{self._side.context}" value="{most}"></meter>'
            f"<p>What would be sent now: {told} of {self._side.context:,} tokens, {spent}</p></div>"
        )


def chat_app(page: ChatPage, hosts: Collection[str] | None, password: str | None = None) -> PageGuard:
    """The page as an ASGI application.

    Args:
        page: what is shown.
        hosts: see `PageGuard`.
        password: what has to be typed first, under any user name; None for nothing.
    """
    app = FastAPI(openapi_url=None)
    mounted = gr.mount_gradio_app(
        app,
        page.blocks(),
        path="/",
        auth=None if password is None else _asking(password),
        allowed_paths=[],
        max_file_size=MAX_FILE,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=("ui-monospace", "Menlo", "Consolas", "monospace")),
        css=_CSS,
    )
    return PageGuard(mounted, hosts)


def _asking(password: str) -> Callable[[str, str], bool]:
    """Compares what was typed in a time that tells nothing."""
    return lambda user, typed: hmac.compare_digest(typed.encode("utf-8", "replace"), password.encode())


def _busy() -> Any:
    """The box while a question that was in it is answered."""
    return gr.update(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)


def _ready(**changes: Any) -> Any:
    """The box as it takes a question."""
    return gr.update(submit_btn=True, stop_btn=False, **changes)


def _notice(error: Exception) -> str:
    """Why something could not be done."""
    return f'<div class="notice" role="alert">{escape(str(error))}</div>'
