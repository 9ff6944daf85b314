"""Downloads that are killed at any moment: the cache ends as that of an undisturbed one, and is sound in between."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from image_server import ImageServer, image_server

from phi3v.data.fetch import FetchLimits, fetch_images
from phi3v.data.image_cache import ImageCache

IMAGES = 200
# Imports once, then forks a download for each line it reads: a kill costs no second of imports. The pid stays the
# child's until the next line says that it was killed.
DOWNLOADS = """
import os, sys
from pathlib import Path
from phi3v.data.fetch import FetchLimits, fetch_images
from phi3v.data.image_cache import ImageCache
folder, *urls = sys.argv[1:]
while sys.stdin.readline():
    pid = os.fork()
    if not pid:
        fetch_images(urls, ImageCache(Path(folder)), FetchLimits(backoff=0.01, allow_hosts=("127.0.0.1",)))
        os._exit(0)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; folders that are empty too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def assert_sound(folder: Path) -> None:
    """Every object has its name's hash and every entry is one: no half file has a place."""
    for path in (folder / "objects").rglob("*"):
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    for path in (folder / "urls").rglob("*"):
        if path.is_file():
            assert set(json.loads(path.read_text())) in ({"bytes", "object"}, {"failure", "message"})


def killed_download(server: ImageServer, urls: list[str], folder: Path, kills: int, seconds: float) -> int:
    """Begins the download so many times and kills it after 0 to `seconds`. Returns: how many kills hit one running."""
    chance = random.Random(0)
    hits = 0
    command = [sys.executable, "-c", DOWNLOADS, str(folder), *urls]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as downloads:
        for _ in range(kills):
            print("begin", file=downloads.stdin, flush=True)
            pid = int(downloads.stdout.readline())
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            print("killed", file=downloads.stdin, flush=True)
            hits += int(downloads.stdout.readline()) == -signal.SIGKILL
            assert_sound(folder)
    return hits


def test_killed_twenty_times(tmp_path: Path) -> None:
    kills = 20
    undisturbed, killed = ImageCache(tmp_path / "undisturbed"), ImageCache(tmp_path / "killed")
    limits = FetchLimits(backoff=0.01, allow_hosts=("127.0.0.1",))
    with image_server(delay=0.02) as server:
        urls = [server.url(f"/good/{number}.png?token={number}") for number in range(IMAGES)]
        urls += [server.url("/404"), server.url("/html"), server.url("/cut")]
        began = time.monotonic()
        summary = fetch_images(urls, undisturbed, limits)
        seconds = time.monotonic() - began
        before = len(server.seen)
        hits = killed_download(server, urls, killed.folder, kills, 2 * seconds / kills)
        complete = fetch_images(urls, killed, limits)
        requests = len(server.seen) - before
    assert (summary.downloaded, list(summary.failures)) == (IMAGES, urls[IMAGES:])
    assert complete.failures == summary.failures
    assert tree(killed.folder) == tree(undisturbed.folder) and len(tree(killed.folder)) == 2 * IMAGES + 3
    assert hits >= kills // 2, "the kills came too late to prove anything"
    assert requests <= len(urls) + hits * limits.workers  # what was cached was not asked for again
