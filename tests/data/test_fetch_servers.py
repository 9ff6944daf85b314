"""Servers that misbehave: none hangs, none fills the disk, each gets its reason, and the cache stays clean."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from image_server import BEHAVIOURS, JPEG, ImageServer, image_server, picture

from phi3v.data.fetch import FetchLimits, FetchSummary, fetch_images
from phi3v.data.image_cache import ImageCache
from phi3v.serve.images import _FETCHES

ROOT = Path(__file__).parents[2]
SECONDS = 3.0
LIMITS = FetchLimits(seconds=SECONDS, max_bytes=2_000_000, backoff=0.01, workers=32, allow_hosts=("127.0.0.1",))
EXPECTED = {  # path: (reason, requests)
    "/404": ("url_not_found", 1),
    "/410": ("url_gone", 1),
    "/403": ("url_refused", 1),
    "/204": ("url_refused", 1),
    "/429": ("url_busy", 3),
    "/500": ("url_server", 3),
    "/reset": ("url_reset", 3),
    "/nothing": ("url_reset", 3),
    "/short": ("url_length", 3),
    "/long": ("url_damaged", 1),
    "/endless": ("url_too_large", 1),
    "/too-large": ("url_too_large", 1),
    "/drip": ("url_timeout", 1),
    "/slow-head": ("url_timeout", 1),
    "/loop": ("url_redirects", 6),
    "/no-location": ("url_refused", 1),
    "/to-private": ("url_private", 1),
    "/to-metadata": ("url_private", 1),
    "/to-file": ("url_invalid", 1),
    "/to-secret": ("url_invalid", 1),
    "/to-odd": ("url_invalid", 1),
    "/bomb": ("url_encoded", 1),
    "/html": ("url_html", 1),
    "/svg": ("url_not_image", 1),
    "/empty": ("url_empty", 1),
    "/broken-head": ("url_damaged", 1),
    "/cut": ("url_damaged", 1),
    "/cut-unmarked": ("url_damaged", 3),
    "/no-http": ("url_protocol", 1),
    "/big-number": ("url_protocol", 1),
    "/big-head": ("url_protocol", 1),
    "/to-good": ("", 1),
    "/cookie": ("", 1),
    "/unmarked": ("", 1),
    "/fails-once": ("", 2),
}
LEFT_ALONE = {"/429-hour", "/429-never"}  # after these, nothing else of the server is asked
PAUSING = {"/busy-once"}  # after this all others wait a second, also those in the middle of their redirects


class Visit(NamedTuple):
    """One call for all behaviours at once."""

    server: ImageServer
    cache: ImageCache
    summary: FetchSummary
    seconds: float


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    cache = ImageCache(tmp_path_factory.mktemp("cache"))
    with image_server() as server:
        began = time.monotonic()
        summary = fetch_images([server.url(path) for path in EXPECTED], cache, LIMITS)
        yield Visit(server, cache, summary, time.monotonic() - began)


def test_every_behaviour_of_the_server_is_expected() -> None:
    assert set(BEHAVIOURS) == {*EXPECTED, *LEFT_ALONE, *PAUSING, "/mutated", "/elsewhere"}


def test_every_reason_is_in_the_documentation() -> None:
    source = ROOT / "src" / "phi3v" / "data"
    code = "".join((source / name).read_text(encoding="utf-8") for name in ("download.py", "guarded_network.py"))
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = document.partition("\n## Images behind web addresses\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `(url_\w+)`", section, re.MULTILINE)
    assert sorted(table) == sorted(set(re.findall(r'"(url_\w+)"', code))) == sorted(_FETCHES), "served ones have words"


@pytest.mark.parametrize("path", EXPECTED)
def test_each_behaviour_has_its_reason(path: str, visit: Visit) -> None:
    failure = visit.summary.failures.get(visit.server.url(path))
    assert (failure.reason_code if failure else "", visit.server.count(path)) == EXPECTED[path]
    assert (visit.cache.path(visit.server.url(path)) is None) == (failure is not None)
    if failure:
        assert failure.message.startswith(f"image {visit.server.url(path)}") and len(failure.message.splitlines()) == 1


def test_nothing_hangs(visit: Visit) -> None:
    """Each address has its 3 s; the rest is room for a busy machine."""
    assert visit.seconds < 2 * SECONDS + 4


def test_what_is_remembered_would_be_the_same_another_time(visit: Visit) -> None:
    remembered = {path for path in EXPECTED if visit.cache.failure(visit.server.url(path))}
    assert remembered == {"/404", "/410", "/html", "/svg", "/broken-head", "/cut", "/long"}


def test_only_whole_images_are_kept(visit: Visit) -> None:
    kept = {path.read_bytes() for path in (visit.cache.folder / "objects").rglob("*") if path.is_file()}
    assert kept == {JPEG, picture(7), picture(3)}
    assert visit.summary.total == visit.summary.downloaded + len(visit.summary.failures)
    assert visit.summary.bytes == 2 * len(JPEG) + len(picture(7)) + len(picture(3))
    assert sorted(path.name for path in visit.cache.folder.iterdir()) == ["objects", "urls"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/bomb", ": the server compresses it (gzip) although it was asked not to; save it as a file"),
        ("/drip", ": it takes longer than the 3 s that one address has; try again later"),
        ("/endless", ": it has more than 2,000,000 bytes; save a smaller file"),
        ("/short", f": {len(JPEG) - 40:,} of the {len(JPEG):,} bytes that the server announced arrived"),
        ("/html", ": a web page, no image; open the address in a browser, and name the image's own address"),
        (
            "/to-metadata",
            ": it is redirected to http://169.254.169.254/latest/meta-data: 169.254.169.254 is link-local, where "
            "clouds answer with their metadata; mend the address",
        ),
        ("/to-secret", ": it is redirected to http://127.0.0.1/: that address holds a user name or password"),
    ],
)
def test_a_message_says_what_and_the_way_out(path: str, words: str, visit: Visit) -> None:
    url = visit.server.url(path)
    assert visit.summary.failures[url].message == f"image {url}{words}"


def test_no_answer_is_too_broken_for_a_reason(tmp_path: Path) -> None:
    """500 answers with bytes changed, put in and left out: each is an image or a failure of one printable line."""
    limits = FetchLimits(seconds=4 * SECONDS, attempts=1, allow_hosts=("127.0.0.1",))  # on a busy machine too
    with image_server() as server:
        urls = [server.url(f"/mutated/{number}") for number in range(500)]
        summary = fetch_images(urls, ImageCache(tmp_path), limits)
    assert summary.total == 500 == summary.downloaded + len(summary.failures)
    assert all(failure.message.isprintable() for failure in summary.failures.values())
    assert len({failure.reason_code for failure in summary.failures.values()}) >= 5
    kept = {path.read_bytes() for path in (tmp_path / "objects").rglob("*") if path.is_file()}
    assert JPEG in kept


def test_no_server_and_no_such_name(tmp_path: Path) -> None:
    with image_server() as server:
        gone = server.url("/good/1.png")
    urls = [gone, "http://no-such-host.invalid/a.png"]
    failures = fetch_images(urls, ImageCache(tmp_path), LIMITS).failures
    assert [failures[url].reason_code for url in urls] == ["url_connect", "url_dns"]


def test_a_name_server_that_does_not_answer_ends_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: over.wait(30) and [])
    began = time.monotonic()
    failures = fetch_images(["http://slow.example/a.png"], ImageCache(tmp_path), FetchLimits(seconds=0.5)).failures
    over.set()
    assert [failure.reason_code for failure in failures.values()] == ["url_dns"]
    assert time.monotonic() - began < 5
