"""Downloads into the cache: what is asked, how often, when, and what is known afterwards."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from image_server import image_server, picture

from phi3v.data.fetch import FetchLimits, FetchSummary, fetch_images
from phi3v.data.image_cache import FetchFailure, ImageCache
from phi3v.errors import ConfigError, DataError

EXAMPLE = Path(__file__).parents[2] / "examples" / "fetch_ray.py"
LIMITS = FetchLimits(seconds=10, backoff=0.01, allow_hosts=("127.0.0.1",))


def test_images_come_once_and_are_counted(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    progress: list[tuple[int, int]] = []
    with image_server() as server:
        urls = [server.url(f"/good/{number}.png") for number in (0, 1, 2, 1, 0)]
        urls[3] = f" {urls[1]} "  # blanks around it are no part of an address
        first = fetch_images(urls, cache, LIMITS, on_progress=lambda done, total: progress.append((done, total)))
        again = fetch_images([*urls, server.url("/good/3.png")], cache, LIMITS)
        requests = len(server.seen)
        changed = cache.path(urls[0])
        changed.write_bytes(bytes(changed.stat().st_size))  # as long, and no longer the image
        assert fetch_images(urls, cache, LIMITS).downloaded == 1
    size = sum(len(picture(number)) for number in range(3))
    assert first == FetchSummary(total=3, cached=0, downloaded=3, failures={}, bytes=size)
    assert again == FetchSummary(total=4, cached=3, downloaded=1, failures={}, bytes=len(picture(3)))
    assert (requests, progress) == (4, [(0, 3), (1, 3), (2, 3), (3, 3)])
    assert [cache.path(url).read_bytes() for url in urls[:3]] == [picture(number) for number in range(3)]


def test_lasting_failures_are_remembered_and_passing_ones_asked_again(tmp_path: Path) -> None:
    lasting = ["/404", "/410", "/html", "/svg", "/cut"]
    passing = ["/403", "/500", "/empty", "/too-large"]
    with image_server() as server:
        urls = [server.url(path) for path in lasting + passing]
        limits = FetchLimits(attempts=1, allow_hosts=("127.0.0.1",))
        first = fetch_images(urls, ImageCache(tmp_path), limits)
        assert fetch_images(urls, ImageCache(tmp_path), limits) == first
        assert [server.count(path) for path in lasting + passing] == [1] * 5 + [2] * 4
        assert ImageCache(tmp_path).failure(urls[0]) == FetchFailure(
            "url_not_found",
            f"image {urls[0]}: the server answers 404, there is no such file; mend the address or drop the row",
        )


def test_a_failure_gives_way_to_an_image(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    with image_server() as server:
        url = server.url("/good/1.png")
        with cache.writing() as writer:
            writer.remember(url, FetchFailure("url_gone", "it was taken away"))
        assert fetch_images([url], cache, LIMITS).failures == {url: FetchFailure("url_gone", "it was taken away")}
        (entry,) = (path for path in (tmp_path / "urls").rglob("*") if path.is_file())
        entry.unlink()  # as docs/data.md says
        assert fetch_images([url], cache, LIMITS).downloaded == 1
        assert (cache.failure(url), cache.path(url).read_bytes()) == (None, picture(1))


def test_shards_are_parts(tmp_path: Path) -> None:
    with image_server() as server:
        urls = [server.url(f"/good/{number}.png") for number in range(40)]
        sizes = []
        for number in range(3):
            given = urls if number else urls[::-1]  # the order does not matter
            sizes.append(fetch_images(given, ImageCache(tmp_path), LIMITS, shard=(number, 3)).total)
        assert len(server.seen) == sum(sizes) == 40 and min(sizes) >= 5
        assert fetch_images(urls, ImageCache(tmp_path), LIMITS).cached == 40


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3), (0, 0)])
def test_a_shard_that_is_none_is_refused(shard: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"shard {shard[0]}/{shard[1]} is none: parts of n count from 0 to n-1"):
        fetch_images([], ImageCache(tmp_path), shard=shard)


def test_a_pause_that_a_server_asks_for_is_kept_by_all_workers(tmp_path: Path) -> None:
    with image_server() as server:
        urls = [server.url("/busy-once"), *(server.url(f"/good/{number}.png") for number in range(6))]
        limits = FetchLimits(workers=1, attempts=2, backoff=0.01, allow_hosts=("127.0.0.1",))
        assert fetch_images(urls, ImageCache(tmp_path), limits).downloaded == 7
        times = [when for when, _ in server.seen]
    assert server.count("/busy-once") == 2
    assert min(times[1:]) - times[0] >= 0.95  # Retry-After: 1, less what the clocks of two threads may differ


def test_a_server_that_fails_once_is_asked_again(tmp_path: Path) -> None:
    with image_server() as server:
        assert fetch_images([server.url("/fails-once")], ImageCache(tmp_path), LIMITS).downloaded == 1
        assert server.count("/fails-once") == 2


@pytest.mark.parametrize(("path", "told"), [("/429-hour", "3,600"), ("/429-never", "1,000,000,000")])
def test_a_server_that_asks_for_a_long_pause_is_left_alone(path: str, told: str, tmp_path: Path) -> None:
    with image_server() as server, image_server() as other:
        urls = [server.url(path), *(server.url(f"/good/{number}.png?key=1") for number in range(40))]
        limits = FetchLimits(workers=1, backoff=0.01, allow_hosts=("127.0.0.1",))
        found = fetch_images([*urls, other.url("/good/1.png")], ImageCache(tmp_path), limits)
        assert (len(server.seen), len(other.seen), found.downloaded) == (1, 1, 1)
        assert [found.failures[url].reason_code for url in urls] == ["url_busy"] * 41
        assert found.failures[urls[1]].message == (
            f"image {server.url('/good/0.png')}?...: not asked: its server has just asked for a pause of {told} s; "
            "run the command again later"
        )
        assert fetch_images(urls[1:3], ImageCache(tmp_path), limits).downloaded == 2  # the next command asks again


def test_a_server_behind_redirects_gets_the_pause_that_it_asks_for(tmp_path: Path) -> None:
    """Only the server that asked is spared: the one that redirects to it goes on answering for others."""
    with image_server() as first, image_server() as busy:
        behind = [first.url(f"/elsewhere/{busy.port}{path}") for path in ("/busy-once", "/good/0.png", "/good/1.png")]
        limits = FetchLimits(workers=1, attempts=2, backoff=0.01, allow_hosts=("127.0.0.1",))
        assert fetch_images([*behind, first.url("/good/2.png")], ImageCache(tmp_path), limits).downloaded == 4
        times = [when for when, _ in busy.seen]
        own = next(when for when, head in first.seen if b"/good/2.png " in head)
    assert (busy.count("/busy-once"), len(busy.seen)) == (2, 4)
    assert min(times[1:]) - times[0] >= 0.95
    assert own < times[1]
    assert len(first.seen) <= 4 + 3  # each address behind it once in vain, and then when its turn has come


def test_a_server_behind_redirects_that_asks_for_a_long_pause_is_left_alone(tmp_path: Path) -> None:
    with image_server() as first, image_server() as busy:
        behind = [first.url(f"/elsewhere/{busy.port}{path}") for path in ("/429-hour", "/good/0.png", "/good/1.png")]
        limits = FetchLimits(workers=1, backoff=0.01, allow_hosts=("127.0.0.1",))
        found = fetch_images([*behind, first.url("/good/2.png")], ImageCache(tmp_path), limits)
        assert (len(busy.seen), len(first.seen), found.downloaded) == (1, 4, 1)
        assert [found.failures[url].reason_code for url in behind] == ["url_busy"] * 3
        assert found.failures[behind[1]].message == (
            f"image {behind[1]}: it is redirected to {busy.url('/good/0.png')}: not asked: its server has just asked "
            "for a pause of 3,600 s; run the command again later"
        )
        assert fetch_images(behind[1:], ImageCache(tmp_path), limits).downloaded == 2  # the next command asks again


def test_requests_on_their_way_are_all_that_a_server_gets_that_wants_none(tmp_path: Path) -> None:
    with image_server() as server:
        urls = [server.url(f"/429-hour?{number}") for number in range(40)]
        limits = FetchLimits(workers=4, attempts=1, allow_hosts=("127.0.0.1",))
        failures = fetch_images(urls, ImageCache(tmp_path), limits).failures
        assert (len(failures), len(server.seen) <= 4) == (40, True)


def test_nothing_of_the_environment_and_no_secret_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No proxy, no .netrc, no token, no cookie; and what is said about an address does not hold its query."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret-1\n")
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / (".netrc" if name == "NETRC" else "")))
    monkeypatch.setenv("HF_TOKEN", "secret-2")
    with image_server() as server, image_server() as proxy, caplog.at_level("INFO"):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        monkeypatch.setenv("NO_PROXY", "")
        urls = [server.url("/cookie"), server.url("/good/1.png"), server.url("/404?key=secret-3")]
        failures = fetch_images(urls, ImageCache(tmp_path / "cache"), LIMITS).failures
        names = {line.partition(b":")[0] for _, head in server.seen for line in head.split(b"\r\n")[1:] if line}
    (failure,) = failures.values()
    assert failure.message.startswith(f"image {server.url('/404')}?...: the server answers 404, there is no such file")
    assert (names, proxy.connections) == ({b"Host", b"User-Agent", b"Accept", b"Accept-Encoding"}, 0)
    assert server.count("/good/3.png") == 1  # where the cookie would have gone
    written = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert b"secret" not in written and "secret" not in caplog.text


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        image_server() as server,
        pytest.raises(DataError, match=r"cannot be written \(No space left on device\): free"),
    ):
        fetch_images([server.url("/good/1.png")], ImageCache(tmp_path), LIMITS)
    assert not list((tmp_path / "tmp").rglob("*"))


def test_the_example_for_ray_downloads_as_one_machine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Ray makes one batch of all; a blank behind an address makes no other one of it."""

    class Table(list[dict[str, str]]):
        def map_batches(self, function: Any, *, batch_size: int, fn_kwargs: dict[str, Any]) -> "Table":
            columns = function({"url": [row["url"] for row in self]}, **fn_kwargs)
            return Table(dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))

        def take_all(self) -> "Table":
            return self

    ray = ModuleType("ray")
    monkeypatch.setattr(ray, "data", SimpleNamespace(from_items=Table), raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    example = runpy.run_path(str(EXAMPLE))
    fetch_batch = example["fetch_batch"]
    (tmp_path / "addresses").write_text("http://10.0.0.1/a.png\nhttp://10.0.0.1/a.png \r\n\n")
    assert example["main"](tmp_path / "addresses", tmp_path / "other", LIMITS) == {"url_private": 1}
    with image_server() as server:
        batch = {"url": [server.url("/good/1.png"), server.url("/404?token=abc")]}
        answers = fetch_batch(batch, ImageCache(tmp_path), LIMITS)
    assert answers["reason"] == ["url_not_found"] and "token" not in answers["message"][0]
    assert ImageCache(tmp_path).path(batch["url"][0]).read_bytes() == picture(1)


def test_the_example_for_slurm_asks_for_the_part_that_its_task_is(tmp_path: Path) -> None:
    """Of a task that is started again alone (--array=3) Slurm says COUNT=1, MIN=3 and MAX=3."""
    (tmp_path / "phi3v").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "phi3v").chmod(0o755)
    script = Path(__file__).resolve().parents[2] / "examples" / "fetch_slurm.sh"
    slurm = {
        f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "3"), ("COUNT", "1"), ("MIN", "3"), ("MAX", "3"))
    }

    def started(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        found = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **variables}
        return subprocess.run(["bash", str(script), *arguments], env=found, capture_output=True, text=True, check=False)

    done = started("my shop.yaml", "16", **slurm)
    assert (done.returncode, done.stdout) == (0, "data check my shop.yaml --fetch --shard 3/16\n")
    for arguments, variables in ((["shop.yaml"], slurm), ([], slurm), (["shop.yaml", "16"], {})):
        wrong = started(*arguments, **variables)
        assert wrong.returncode != 0 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


def test_connections_are_kept(tmp_path: Path) -> None:
    with image_server() as server:
        urls = [server.url(f"/good/{number}.png") for number in range(30)]
        fetch_images(urls, ImageCache(tmp_path), FetchLimits(workers=3, allow_hosts=("127.0.0.1",)))
        assert (len(server.seen), server.connections) == (30, 3)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        image_server() as server,
        pytest.raises(DataError, match=r"^image cache .*file cannot be written \(.*data\.im"),
    ):
        fetch_images([server.url("/good/1.png")], ImageCache(tmp_path / "file"), LIMITS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_error_in_the_progress_bar_ends_the_call(error: type[BaseException], tmp_path: Path) -> None:
    """What the caller's function raises comes back as it is, and the workers end."""

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise error

    with image_server(delay=0.02) as server:
        urls = [server.url(f"/good/{number}.png") for number in range(100)]
        with pytest.raises(error):
            fetch_images(urls, ImageCache(tmp_path), LIMITS, on_progress=stop)
        assert not (tmp_path / "tmp").exists() or not list((tmp_path / "tmp").iterdir())
        assert fetch_images(urls, ImageCache(tmp_path), LIMITS).failures == {}
    assert sorted(os.listdir(tmp_path)) == ["objects", "urls"]
