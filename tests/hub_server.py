"""A hub on the loopback interface with one data set: its small files, and 404 for everything else.

`with hub_server({"README.md": "..."}) as server:` answers for owner/name what huggingface_hub and `datasets` ask for;
`server.asked` holds the paths.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves some files of owner/name at any revision."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {name: text.encode() for name, text in files.items()}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: HubServer

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        start = "/datasets/owner/name/resolve/"
        name = path.removeprefix(start).partition("/")[2] if path.startswith(start) else ""
        body = self.server.files.get(name)
        if path.startswith("/api/datasets/owner/name"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            told = (
                []
                if "/paths-info/" in path or "/tree/" in path
                else {"id": "owner/name", "sha": COMMIT, "siblings": []}
            )
            body = json.dumps(told).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body or b"")))
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@contextmanager
def hub_server(files: Mapping[str, str]) -> Iterator[HubServer]:
    """A server for the time of a `with`."""
    server = HubServer(files)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
