"""What stands in front of the worker: key, hosts, sizes, queue, deadlines, clients that leave; without a model."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from serving import FakeBackend, asking, in_loop, photo
from serving_trials import send_made_up

from phi3v.errors import ConfigError
from phi3v.serve.api import build_app
from phi3v.serve.guard import Guard
from phi3v.serve.images import ImageSource
from phi3v.serve.limits import Limits
from phi3v.serve.run import ServeOptions, for_others, read_key, shown_address

KEY = "k" * 20
SMALL = Limits(batch=1, queue=1, seconds=0.3, body_bytes=4000, held_bytes=6000, images=2)
DONE = {"is": "done", "reason": "length", "prompt_tokens": 3, "completion_tokens": 2}
HI = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
Use = Callable[[httpx.AsyncClient, FakeBackend, Guard], Awaitable[Any]]


def with_app(
    use: Use, limits: Limits = SMALL, *, script: Any = None, key: str | None = None, any_host: bool = False
) -> Any:
    """Runs something against an application of its own."""

    async def run() -> Any:
        backend = FakeBackend(limits, script)
        images = ImageSource(seconds=1, max_bytes=10**6)
        app = build_app(backend, limits, images, key=key, any_host=any_host)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await use(client, backend, app)

    return in_loop(run())


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    """An error in OpenAI's form that shows nothing of this machine."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
    assert not re.search(
        r"/|0x|Traceback|File |\.py|\n", error["message"].replace("/v1/models", "").replace("application/json", "")
    )


def test_an_answer_whole_and_in_pieces() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        body = asking("What?", photo(1), temperature=0.5, seed=3, stop="x")
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        assert whole["choices"][0]["message"]["content"] == "A hat." and whole["object"] == "chat.completion"
        assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        stream = await client.post("/v1/chat/completions", json=body)
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.text.strip().split("\n\n")
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        deltas = [one["choices"][0]["delta"] for one in events[:-1]]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "A hat"}, {"content": "."}, {}]
        assert events[-2]["choices"][0]["finish_reason"] == "stop" and events[-1]["choices"] == []
        assert events[-1]["usage"]["total_tokens"] == 5
        message = {"turns": [{"role": "user", "parts": [0, "What?"]}], "max_tokens": 12, "model": "tiny"}
        message |= {"temperature": 0.5, "top_p": 1.0, "seed": 3, "stop": ["x"]}
        assert backend.asked == [message] * 2 and backend.images == [[photo(1)]] * 2
        assert (await client.get("/health")).json() == {"status": "ok", "requests": 0, "rows": 0}
        (one,) = (await client.get("/v1/models")).json()["data"]
        assert one["id"] == "tiny" and (await client.get("/v1/models/tiny")).json() == one
        assert_error(await client.get("/v1/models/owner/none"), 404, "model_not_found")

    with_app(use, Limits())


def scope_of(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """A request as uvicorn hands it over: `path` as it was sent, and decoded."""
    raw, _, query = path.partition("?")
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": method, "path": unquote(raw)}
    scope |= {"raw_path": raw.encode(), "query_string": query.encode(), "headers": headers, "http_version": "1.1"}
    return scope | {"scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "root_path": ""}


SPELLINGS = """
/v1/models /v1/models/ //v1/models /v1//models /V1/MODELS /v1/models?x=/health /v1/models#/health /%761/models
/v1/%6dodels /health/../v1/models /health/%2e%2e/v1/models /health/..%2fv1/models /./v1/models /v1/models;/health
/health/ //health /%68ealth /health%00 /health/v1/models /HEALTH /openapi.json /docs /redoc /
""".split()


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_spelling_of_a_path_comes_round_the_key(path: str) -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        hosts = [b"localhost", b"evil.example", b"127.0.0.1:8000, evil.example", b"", b"/health", b"x" * 5000]
        for host in hosts:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "BREW"):
                for given in ([], [b"Bearer wrong"], [KEY.encode()], [b"Bearer wrong", b"Bearer " + KEY.encode()]):
                    heads = [(b"host", host), (b"x-forwarded-host", b"localhost"), (b"x-original-url", b"/health")]
                    heads += [(b"content-type", b"application/json"), *((b"authorization", one) for one in given)]
                    statuses: list[int] = []

                    async def receive() -> dict[str, Any]:
                        return {"type": "http.request", "body": json.dumps(HI).encode()}

                    async def send(message: Any, statuses: list[int] = statuses) -> None:
                        statuses.append(message.get("status", 0))

                    await app(scope_of(method, path, heads), receive, send)
                    assert statuses[0] == 401, (method, host, given)
        assert backend.asked == []

    with_app(use, key=KEY, any_host=True)


def test_the_key_opens_every_route_and_health_needs_none() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        assert (await client.get("/health")).status_code == 200
        refused = await client.post("/v1/chat/completions", json=HI)
        assert_error(refused, 401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
        client.headers["authorization"] = f"Bearer {KEY}"
        assert (await client.post("/v1/chat/completions", json=HI)).status_code == 200
        assert (await client.get("/openapi.json")).status_code == 200
        assert_error(await client.get("/v1/nothing"), 404, "not_found")
        unknown = await client.get("/v1/chat/completions")
        assert_error(unknown, 405, "method_not_allowed")
        assert unknown.headers["allow"] == "POST"
        for lost in ("/docs", "/redoc", "/v1/models/"):
            assert (await client.get(lost)).status_code == 404
        preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        allowed = await client.options("/v1/chat/completions", headers=preflight)
        answer = await client.post("/v1/chat/completions", json=HI, headers=preflight)
        assert not [name for name in [*allowed.headers, *answer.headers] if name.startswith("access-control")]

    with_app(use, key=KEY, any_host=True)


def test_without_a_key_only_names_of_this_machine_are_answered() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.0.0.2:8000", "[::1]:8000"):
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil@localhost",
            "127.0.0.evil",
            "",
            "10.0.0.1",
        ):
            assert_error(await client.post("/v1/chat/completions", json=HI, headers={"host": host}), 421, "wrong_host")
        twice = httpx.Headers([("host", "localhost"), ("host", "evil.example")])
        request = client.build_request("GET", "/v1/models")
        request.headers = twice
        assert (await client.send(request)).status_code == 421
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            sent = await client.post("/v1/chat/completions", content=json.dumps(HI), headers={"content-type": kind})
            assert_error(sent, 415, "invalid_request")
        assert backend.asked == []

    with_app(use)


def test_bodies_have_a_size_and_a_time() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        async def pieces(count: int, wait: float) -> Any:
            for _ in range(count):
                await asyncio.sleep(wait)
                yield b" " * 100

        heads = {"content-type": "application/json"}
        big = await client.post("/v1/chat/completions", content=b" " * 4001, headers=heads)
        assert_error(big, 413, "too_large")
        assert_error(await client.post("/v1/chat/completions", content=pieces(50, 0), headers=heads), 413, "too_large")
        assert_error(
            await client.post("/v1/chat/completions", content=pieces(20, 0.05), headers=heads), 408, "too_slow"
        )
        assert_error(await client.post("/v1/chat/completions", json=HI | {"model": "x"}), 404, "model_not_found")
        many = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}] * 3,
        }
        assert_error(await client.post("/v1/chat/completions", json={**HI, "messages": [many]}), 400, "too_many_images")
        assert (await client.get("/health")).json()["requests"] == 0

    with_app(use)


def test_the_queue_is_bounded_and_waiting_ends() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        posts = [client.post("/v1/chat/completions", json=HI) for _ in range(4)]
        found = await asyncio.gather(*posts)
        assert sorted(one.status_code for one in found) == [429, 429, 503, 503]
        for one in found:
            assert int(one.headers["retry-after"]) > 0
            assert_error(one, one.status_code, {429: "queue_full", 503: "overloaded"}[one.status_code])
        assert sorted(backend.dropped) == [1, 2]
        assert (await client.get("/health")).json() == {"status": "ok", "requests": 0, "rows": 0}
        backend.script = [{"is": "piece", "text": "A"}]  # begins, and goes on for ever
        assert_error(await client.post("/v1/chat/completions", json=HI), 504, "too_slow")
        stream = await client.post("/v1/chat/completions", json=HI | {"stream": True})
        assert stream.status_code == 200 and '"too_slow"' in stream.text and "[DONE]" not in stream.text
        assert backend.dropped[2:] == [3, 4]
        backend.ready = False
        loading = await client.post("/v1/chat/completions", json=HI)
        assert_error(loading, 503, "not_ready")
        assert (await client.get("/health")).status_code == 503

    with_app(use, script=[])


def test_bytes_of_all_requests_together_are_bounded() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        padded = json.dumps(HI).encode() + b" " * 3500
        heads = {"content-type": "application/json"}
        posts = [client.post("/v1/chat/completions", content=padded, headers=heads) for _ in range(2)]
        assert sorted(one.status_code for one in await asyncio.gather(*posts)) == [429, 503]

    with_app(use, script=[])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("events", [0, 1])
def test_a_client_that_leaves_ends_its_request(stream: bool, events: int) -> None:
    """Before the first piece and behind it: the worker is told, and the place is free at once."""

    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        gone = asyncio.Event()
        waiting = [{"type": "http.request", "body": json.dumps(HI | {"stream": stream}).encode()}]

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if gone.is_set() and stream:
                raise OSError

        heads = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = scope_of("POST", "/v1/chat/completions", heads)
        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.1)
        assert not task.done() and (await client.get("/health")).json()["requests"] == 1
        gone.set()
        await asyncio.wait({task}, timeout=2)
        assert task.done() and backend.dropped == [1]
        assert (await client.get("/health")).json()["requests"] == 0

    with_app(use, Limits(), script=[{"is": "piece", "text": "A"}] * events)


def test_a_client_that_leaves_while_it_sends_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Half a body and then nothing: the place is free, and no stack goes into the log."""

    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        sent = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]
        answered: list[Any] = []

        async def receive() -> dict[str, Any]:
            return sent.pop()

        async def send(message: Any) -> None:
            answered.append(message)

        heads = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        await app(scope_of("POST", "/v1/chat/completions", heads), receive, send)
        assert answered[0]["status"] == 499 and not sent
        assert (await client.get("/health")).json()["requests"] == 0

    with_app(use)
    assert not caplog.records


def test_a_fault_tells_nothing() -> None:
    async def use(client: httpx.AsyncClient, backend: FakeBackend, app: Guard) -> None:
        backend.script = [{"is": "fault"}]
        assert_error(await client.post("/v1/chat/completions", json=HI), 500, "server_error")
        backend.script = [{"is": "lost"}]
        lost = await client.post("/v1/chat/completions", json=HI)
        assert_error(lost, 503, "worker_lost")
        assert lost.headers["retry-after"]
        backend.script = [{"is": "piece", "text": "A"}, {"is": "lost"}]
        cut = await client.post("/v1/chat/completions", json=HI | {"stream": True})
        assert '"worker_lost"' in cut.text
        backend.script = 3  # a fault of ours
        assert_error(await client.post("/v1/chat/completions", json=HI), 500, "server_error")
        assert (await client.get("/health")).json()["requests"] == 0

    with_app(use)


def test_an_open_address_needs_a_key(tmp_path: Any) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "shop.example", ""):
        with pytest.raises(ConfigError, match="open to other machines"):
            ServeOptions(host=host)
        ServeOptions(host=host, key=KEY)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        ServeOptions(host=host)
    for key in ("short", "k" * 19 + "\n", "ü" * 20):
        with pytest.raises(ConfigError, match="at least 16 printable"):
            ServeOptions(key=key)
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(file, {})
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_key(file, {})
    file.write_text(f"{KEY}\nmore")
    assert read_key(file, {"PHI3V_API_KEY": "other"}) == KEY
    file.write_text(f"\ufeff{KEY}\r\n", encoding="utf-8")  # as an editor of Windows saves it
    assert read_key(file, {}) == KEY
    file.write_text(KEY, encoding="utf-16")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        read_key(file, {})
    assert read_key(None, {"PHI3V_API_KEY": KEY}) == KEY and read_key(None, {"PHI3V_API_KEY": ""}) is None


def test_the_address_that_is_told_opens_here() -> None:
    assert [shown_address(host, 80) for host in ("0.0.0.0", "::", "::1", "10.0.0.1", "shop.example")] == [
        "http://127.0.0.1:80",
        "http://[::1]:80",
        "http://[::1]:80",
        "http://10.0.0.1:80",
        "http://shop.example:80",
    ]
    assert [bool(for_others(host)) for host in ("0.0.0.0", "::", "127.0.0.1", "10.0.0.1")] == [True, True, False, False]


def test_requests_made_from_the_openapi_are_never_a_fault() -> None:
    """Those that fit it are answered, those that do not are refused; in full in `make torture`, with a model."""
    limits = Limits(seconds=5)
    app = build_app(FakeBackend(limits), limits, ImageSource(seconds=1, max_bytes=10**6), key=None, any_host=True)
    found = send_made_up("", 60, app)
    assert sum(found.values()) >= 60 and found[200] and found[400], found
