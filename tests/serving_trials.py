"""What a server must survive, as often as the caller says: a few times in `make test`, in full in `make torture`."""

import io
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from serving import RunningServer, asking, photo

from phi3v.demo.scenes import scene

QUESTION = "What is shown in this image?"


def scenes(count: int, *models: str) -> list[dict[str, Any]]:
    """Requests about scenes of the demo, each with its question of the longest answer; of the models in turn."""
    bodies = []
    for index in range(count):
        found, models = scene(77, index), models or ("tiny",)
        buffer = io.BytesIO()
        found.image.save(buffer, "PNG")
        question = max(found.turns, key=lambda turn: len(turn[1]))[0]
        bodies.append(asking(question, buffer.getvalue(), model=models[index % len(models)], max_tokens=40))
    return bodies


def endless(server: RunningServer, tokens: int, **more: Any) -> dict[str, Any]:
    """A request with a long answer, up to so many tokens: of the last model of the server the longest of some seeds."""
    longest: tuple[int, dict[str, Any]] = (0, {})
    for number in range(40):
        body = asking(
            "Tell me everything.", photo(3), model=server.names[-1], max_tokens=tokens, temperature=2, seed=number
        )
        length = server.post(body).json()["usage"]["completion_tokens"]
        longest = max(longest, (length, body), key=lambda found: found[0])
        if length == tokens:
            break
    assert longest[0] > 20, longest[0]
    return longest[1] | more


def known_answer(server: RunningServer) -> str:
    """The answer to a prompt that never changes."""
    return server.answer(asking(QUESTION, photo(0)))


def send_bad_images(server: RunningServer, files: Sequence[bytes], every: int = 50) -> Counter[int]:
    """Sends each file as an image: none is a fault of the server, and the known prompt answers the same after some.

    Returns: how many answers had which status.
    """
    expected, worker, found = known_answer(server), server.worker(), Counter[int]()
    for number, data in enumerate(files):
        response = server.post(asking(QUESTION, data, max_tokens=2))
        found[response.status_code] += 1
        assert response.status_code in (200, 400, 413), (number, response.text)
        if response.status_code != 200:
            assert_shows_nothing(response.json()["error"]["message"])
        if number % every == every - 1:
            assert known_answer(server) == expected
    assert known_answer(server) == expected and server.worker() == worker, "it was started again"
    return found


def assert_shows_nothing(message: str) -> None:
    """No path, no address in memory, no stack."""
    assert (
        not re.search("0x[0-9a-f]{5}", message)
        and "Traceback" not in message
        and ".py" not in message
        and len(message) < 400
    ), message
    assert not any(one in message for one in ("/tmp", "/home", "/usr", "/root", "site-packages", "<_io")), message


def at_once(server: RunningServer, bodies: Sequence[dict[str, Any]], clients: int) -> list[httpx.Response]:
    """Responses to requests that come at once, in their order."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(server.post, bodies))


def answered_as_alone(server: RunningServer, bodies: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Asks one by one and then all at once. Returns: the pairs of answers that differ."""
    alone = [server.answer(body) for body in bodies]
    together = [one.json()["choices"][0]["message"]["content"] for one in at_once(server, bodies, len(bodies))]
    assert len(set(alone)) > len(bodies) // 4, "the answers are all alike"
    return [pair for pair in zip(alone, together, strict=True) if pair[0] != pair[1]]


def drop_streams(server: RunningServer, count: int, clients: int = 16) -> float:
    """Opens streams and leaves each behind its first chunk. Returns: seconds until nothing is in the server."""
    body = asking(
        "Tell me everything about this picture.", photo(3), max_tokens=400, stream=True, temperature=2, seed=1
    )
    address = (httpx.URL(server.root).host, httpx.URL(server.root).port)
    content = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""])
    statuses: Counter[bytes] = Counter()

    def one(_: int) -> None:
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(head.encode() + content)
            received = b""
            while b"data: " not in received and (piece := connection.recv(4096)):
                received += piece
            statuses[received[9:12]] += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(count)))
    assert statuses == {b"200": count}, statuses
    return server.wait_until(lambda: server.health() == {"status": "ok", "requests": 0, "rows": 0}, 2)


def resident(process: int) -> int:
    """Bytes in memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def children(process: int) -> list[int]:
    """Processes that a process started and that still run."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(one) for file in files for one in file.read_text().split()]


def memory_of(server: RunningServer) -> dict[str, int]:
    """Bytes in memory of the server, of its worker, and of the process that prepares the worker's requests."""
    worker = server.worker()
    beside = sum(resident(one) for one in children(worker))
    return {"server": resident(server.process.pid), "worker": resident(worker), "beside the worker": beside}


def overload(server: RunningServer, seconds: float, clients: int) -> dict[str, Any]:
    """Asks without pause from many clients. Returns: statuses, the slowest look at its health, memory in bytes."""
    bodies, found, looks = scenes(8), Counter[int](), []
    memory = memory_of(server)
    until = time.monotonic() + seconds

    def ask(number: int) -> None:
        mine = random.Random(number)
        with httpx.Client(base_url=server.root, timeout=120, trust_env=False) as client:
            while time.monotonic() < until:
                response = client.post("/v1/chat/completions", json=mine.choice(bodies))
                found[response.status_code] += 1
                if response.status_code == 200:
                    assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")
                else:
                    assert response.status_code in (429, 503) and int(response.headers["retry-after"]) > 0, (
                        response.text
                    )
                    time.sleep(0.05)

    def look() -> None:
        with httpx.Client(base_url=server.root, timeout=30, trust_env=False) as client:
            while time.monotonic() < until:
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                looks.append(time.monotonic() - began)
                time.sleep(0.2)

    with ThreadPoolExecutor(clients + 1) as pool:
        for job in [pool.submit(look), *(pool.submit(ask, number) for number in range(clients))]:
            job.result()
    server.wait_until(lambda: server.health()["requests"] == 0, 30)
    return {"statuses": dict(found), "slowest look": max(looks), "before": memory, "after": memory_of(server)}


def kill_worker(server: RunningServer) -> tuple[list[int], float]:
    """Kills the worker while it answers. Returns: the statuses of what it had, seconds until there is another one."""
    body = endless(server, 300)
    expected, worker = known_answer(server), server.worker()
    found: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: found.append(server.post(body))) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.wait_until(lambda: server.health()["rows"] == 3, 20)
    beside = children(worker)
    os.kill(worker, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert all(one.headers.get("retry-after") for one in found), [one.text for one in found]
    down = server.post(asking("Hi"))
    health = server.http.get("/health")
    assert (down.status_code, health.status_code) == (503, 503)
    assert down.headers["retry-after"] and health.headers["retry-after"]
    seconds = server.wait_until(lambda: server.health()["status"] == "ok", 120)
    assert known_answer(server) == expected and server.worker() != worker
    assert not any(Path(f"/proc/{one}").exists() for one in beside), "what prepared for the worker is still there"
    return [one.status_code for one in found], seconds


def stop_while_answering(server: RunningServer) -> tuple[str, int]:
    """SIGTERM while an answer is given. Returns: that answer, and the exit code."""
    found: list[httpx.Response] = []
    body = endless(server, 150)
    thread = threading.Thread(target=lambda: found.append(server.post(body)))
    thread.start()
    server.wait_until(lambda: server.health()["rows"] == 1, 20)
    code = server.stop()
    thread.join()
    assert found[0].status_code == 200, found[0].text
    return found[0].json()["choices"][0]["message"]["content"], code


def send_made_up(address: str, count: int, app: Any = None) -> Counter[int]:
    """Requests made from the server's own OpenAPI, by half of its rules and by half against them.

    Returns: how many answers had which status, none of them a fault of the server.
    """
    load = schemathesis.openapi
    schema = load.from_url(f"{address}/openapi.json") if app is None else load.from_asgi("/openapi.json", app)
    found: Counter[int] = Counter()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @settings(max_examples=count // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @seed(0)
        @given(case=schema.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            status = case.call().status_code
            found[status] += 1
            assert status < 500, case.as_curl_command()

        send()
    return found
