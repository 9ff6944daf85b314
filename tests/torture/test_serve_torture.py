"""`phi3v serve` under everything at once: bad images, made-up requests, crowds, clients that leave, killed workers.

Short forms are in tests/serve/test_server.py. Each test prints what it counted.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import TINY, RunningServer, asking, running_server, write_adapter
from serving_trials import (
    answered_as_alone,
    drop_streams,
    kill_worker,
    overload,
    scenes,
    send_bad_images,
    send_made_up,
    stop_while_answering,
)

pytestmark = [pytest.mark.torture, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    noisy = write_adapter(tmp_path_factory.mktemp("noisy"), 6, 1.0)
    with running_server(TINY, "--adapter", f"noisy={noisy}") as running:
        yield running


def test_all_bad_images(server: RunningServer, shared: Path) -> None:
    files = sorted((shared / "badimages" / "files").glob("*"))
    assert len(files) >= 616
    print("bad images:", dict(send_bad_images(server, [path.read_bytes() for path in files])))


def test_made_up_requests(server: RunningServer) -> None:
    found = send_made_up(server.root, 600)
    assert sum(found.values()) >= 500
    print("made-up requests:", dict(found))


def test_64_at_once_are_answered_as_alone(server: RunningServer) -> None:
    differing = answered_as_alone(server, scenes(64))
    print("64 at once: differing answers", differing)
    assert differing == []


def test_a_million_tags_cost_little(server: RunningServer) -> None:
    for tag in ("<|image_1|>", "<|end|>", "</s>", "\ufdd0", "\n", "\U0001f600"):
        body, taken = asking(tag * (1_000_000 // len(tag))), []
        for _ in range(3):  # the quickest is the server's own time, whatever else the machine does
            began = time.monotonic()
            assert server.post(body).status_code == 400
            taken.append(time.monotonic() - began)
        print(f"1 MB of {tag!r}: 400 in {min(taken):.2f} to {max(taken):.2f} s")
        assert min(taken) < 1


def test_200_dropped_streams(server: RunningServer) -> None:
    print(f"200 dropped streams: nothing in flight after {drop_streams(server, 200):.2f} s")


def test_ten_times_the_capacity_for_a_minute() -> None:
    with running_server(TINY, "--batch-size", "4", "--queue", "4") as small:
        overload(small, 5, 80)  # what is loaded, kept and compiled once is there now
        found = overload(small, float(os.environ.get("PHI3V_OVERLOAD", "60")), 80)
        print("overload:", found)
        assert found["statuses"][200] > 50 and found["statuses"][429] and found["slowest look"] < 2
        for name, before in found["before"].items():
            assert found["after"][name] < before + 50_000_000, name


def test_killed_workers_and_the_end(server: RunningServer) -> None:
    """The second death comes while the next spare still imports, as docs/serving.md says; the third finds one again."""
    for rest, most in ((0, 15), (0, 40), (20, 15)):
        time.sleep(rest)
        statuses, seconds = kill_worker(server)
        print(f"killed worker: {statuses}, ready again after {seconds:.1f} s")
        assert statuses == [503] * 3 and seconds < most
    _, code = stop_while_answering(server)
    assert code == 0
