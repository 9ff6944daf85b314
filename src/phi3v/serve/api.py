"""The routes: chat completions, the models, and whether the server is well. The one file that knows FastAPI.

In come requests that passed `guard`; out come answers and errors in OpenAI's form. An error is a status, a code and a
line of our own: nothing of a path, an address or a stack is ever in it. Knows no model.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from phi3v import __version__
from phi3v.serve.backend import Answer, Backend
from phi3v.serve.guard import Doorway, Guard, Place, Receive, Scope, Send
from phi3v.serve.images import ImageSource
from phi3v.serve.limits import Limits
from phi3v.serve.protocol import ChatRequest, Refusal, chunk, completion, parse_request, usage

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        }
    },
}
_STATUSES = {400: "refused", 401: "no key", 404: "no such model", 408: "too slow", 413: "too large", 415: "no JSON"}
_STATUSES |= {421: "wrong host", 429: "queue full", 500: "fault", 503: "not ready, or waited too long", 504: "too slow"}


_GRACE = 5
"""Seconds behind its deadline in which a stream may still be read."""


class _Counted(StreamingResponse):
    """A stream that does something when it ends, however it ends, even before its first piece.

    It ends a little behind its deadline at the latest: a client that does not read would keep its place for ever.
    """

    def __init__(self, pieces: AsyncIterator[str], deadline: float, at_end: Callable[[], None]) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._deadline, self._at_end = deadline, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._deadline + _GRACE):
                    await super().__call__(scope, receive, send)
        finally:
            self._at_end()


class _Chat:
    """How a request for a chat completion is worked off."""

    def __init__(self, backend: Backend, limits: Limits, images: ImageSource, doorway: Doorway) -> None:
        self.backend, self.limits, self.images, self.doorway = backend, limits, images, doorway

    async def answer(self, request: Request) -> Response:
        """The response to a request. Raises: Refusal."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        place = self.doorway.enter()
        answer: Answer | None = None
        handed_over = False
        try:
            body = await self._body(request, place, deadline)
            asked = await asyncio.to_thread(
                parse_request, body, most_images=self.limits.images, most_messages=self.limits.messages
            )
            if asked.model not in [one["id"] for one in self.backend.models]:
                raise Refusal(404, "model_not_found", "there is no such model here: GET /v1/models names them")
            del body
            blobs = await asyncio.to_thread(self.images.bytes_of, asked.images) if asked.images else []
            answer = self.backend.submit(_message(asked), blobs)
            del blobs
            name = f"chatcmpl-{uuid.uuid4().hex}"
            if not asked.stream:
                return await self._whole(request, answer, name, asked, deadline)
            first = await self._next(request, answer, deadline, began=False)
            listening = answer

            def at_end() -> None:
                listening.close()
                place.leave()

            response = _Counted(self._stream(listening, first, name, asked, deadline), deadline, at_end)
            handed_over = True
            return response
        finally:
            if not handed_over:
                if answer is not None:
                    answer.close()
                place.leave()

    async def _body(self, request: Request, place: Place, deadline: float) -> bytes:
        """The body of a request, within its limits."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another origin cannot send without being asked first
            raise Refusal(415, "invalid_request", "send the body as Content-Type: application/json")
        most = self.limits.body_bytes
        too_large = Refusal(413, "too_large", f"the body has more than {most} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + 30)):
                async for piece in request.stream():
                    place.take(len(piece))
                    body += piece
                    if len(body) > most:
                        raise too_large
        except ClientDisconnect as error:
            raise _Gone from error
        except TimeoutError as error:
            raise Refusal(408, "too_slow", "the body did not arrive in time") from error
        return bytes(body)

    async def _next(self, request: Request, answer: Answer, deadline: float, *, began: bool) -> dict[str, Any]:
        """The next event. Raises: Refusal at the deadline; CancelledError where the client has gone."""
        event = asyncio.ensure_future(anext(answer))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait({event, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if event in done:
                return event.result()
            raise _Gone if gone in done else _late(began)
        finally:
            for task in (event, gone):
                task.cancel()
            await asyncio.gather(event, gone, return_exceptions=True)

    async def _whole(
        self, request: Request, answer: Answer, name: str, asked: ChatRequest, deadline: float
    ) -> Response:
        """The answer in one piece."""
        text: list[str] = []
        while True:
            event = await self._next(request, answer, deadline, began=bool(text))
            if event["is"] == "done":
                return JSONResponse(completion(name, asked.model, "".join(text), event))
            text.append(event["text"])

    async def _stream(
        self, answer: Answer, first: dict[str, Any], name: str, asked: ChatRequest, deadline: float
    ) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        yield _event(chunk(name, asked.model, {"role": "assistant", "content": ""}))
        event: dict[str, Any] = first
        try:
            while event["is"] != "done":
                yield _event(chunk(name, asked.model, {"content": event["text"]}))
                async with asyncio.timeout_at(deadline):
                    event = await anext(answer)
        except (TimeoutError, Refusal) as error:
            yield _event((error if isinstance(error, Refusal) else _late(True)).body)
            return
        yield _event(chunk(name, asked.model, {}, event["reason"]))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event({**chunk(name, asked.model, None), "usage": usage(event)})
        yield "data: [DONE]\n\n"


class _Gone(Exception):
    """The client has closed the connection: nobody reads what is answered."""


def _late(began: bool) -> Refusal:
    """What the deadline says: 504 where the answer had begun, 503 where the request still waited."""
    if began:
        return Refusal(504, "too_slow", "the answer took longer than this server lets it: ask for fewer tokens")
    return Refusal(503, "overloaded", "the request waited too long: try again later", retry_after=5)


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _message(asked: ChatRequest) -> dict[str, Any]:
    """A request as the worker takes it."""
    sampled = asked.temperature is not None or asked.top_p is not None
    temperature = asked.temperature if asked.temperature is not None else 1.0 if sampled else 0.0
    return {
        "model": asked.model,
        "turns": asked.turns,
        "max_tokens": asked.max_completion_tokens or asked.max_tokens,
        "temperature": temperature,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "seed": asked.seed,
        "stop": asked.stops,
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _response(refusal: Refusal) -> JSONResponse:
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    return JSONResponse(refusal.body, refusal.status, headers)


def build_app(backend: Backend, limits: Limits, images: ImageSource, *, key: str | None, any_host: bool) -> Guard:
    """The server as an ASGI application.

    Args:
        backend: what answers; started and stopped by the caller.
        limits: of requests.
        images: where images may come from.
        key: that requests must bring.
        any_host: whether requests may name any host, see `Guard`.
    """
    doorway = Doorway(limits)
    chat = _Chat(backend, limits, images, doorway)
    app = FastAPI(title="phi3v", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": words, "content": {"application/json": {"schema": _ERROR}}}
        for status, words in _STATUSES.items()
    }
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @app.post("/v1/chat/completions", responses=errors, openapi_extra={"requestBody": body})
    async def chat_completions(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        return await chat.answer(request)

    @app.get("/v1/models", responses={401: errors[401], 421: errors[421]})
    async def models() -> dict[str, Any]:
        """The names that can be asked."""
        found = [{"id": one["id"], "object": "model", "created": 0, "owned_by": "phi3v"} for one in backend.models]
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}", responses={code: errors[code] for code in (401, 404, 421)})
    async def model(name: str) -> dict[str, Any]:
        """One of the names."""
        for one in (await models())["data"]:
            if one["id"] == name:
                return dict(one)
        raise Refusal(404, "model_not_found", "there is no such model here: GET /v1/models names them")

    @app.get("/health", responses={421: errors[421], 503: {"description": "not ready"}})
    async def health() -> JSONResponse:
        """Whether the model is loaded, and how many requests are in the server and with the model."""
        state = "ok" if backend.ready else "loading"
        told = {"status": state, "requests": doorway.requests, "rows": backend.rows}
        return JSONResponse(told) if backend.ready else JSONResponse(told, 503, {"Retry-After": "5"})

    _say_errors(app)
    plain = app.openapi

    def with_parts() -> dict[str, Any]:
        schema["properties"]["model"]["enum"] = [one["id"] for one in backend.models]
        found = plain()
        found.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        return found

    app.openapi = with_parts  # type: ignore[method-assign]
    return Guard(app, key=key, any_host=any_host)


def _say_errors(app: FastAPI) -> None:
    """Has every error told in OpenAI's form."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        with contextlib.suppress(Exception):
            await _read_away(request)
        return _response(error)

    def plain(status: int, code: str, words: str) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def said(request: Request, error: Exception) -> Response:
            return JSONResponse(Refusal(status, code, words).body, status, getattr(error, "headers", None))

        return said

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    async def fault(request: Request, error: Exception) -> Response:
        return _response(Refusal(500, "server_error", "this request could not be answered"))

    app.add_exception_handler(404, plain(404, "not_found", "there is no such route"))
    app.add_exception_handler(405, plain(405, "method_not_allowed", "this route has no such method"))
    app.add_exception_handler(400, plain(400, "invalid_request", "the request cannot be understood"))
    for kind, handler in ((Refusal, refused), (_Gone, gone), (Exception, fault)):
        app.add_exception_handler(kind, handler)


async def _read_away(request: Request, most: int = 20_000_000) -> None:
    """Reads what is left of a body that was refused, so that a client that is still sending gets to read the answer."""
    async with asyncio.timeout(5):
        async for piece in request.stream():
            most -= len(piece)
            if most < 0:
                return
