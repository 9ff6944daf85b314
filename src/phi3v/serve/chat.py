"""`serve_chat`: the page of `phi3v chat` on a socket of this machine, from loading the target to taking all away again.

In come a TARGET, a host and a port; it goes on until it is told to stop. Knows nothing of what the page looks like.
"""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from phi3v.data.templates import Template
from phi3v.errors import ConfigError
from phi3v.generate import ChatModel
from phi3v.serve.names import model_name
from phi3v.serve.run import LEAST_KEY, is_loopback, shown_address
from phi3v.serve.side_by_side import BASE, TUNED, SideBySide
from phi3v.serve.ui import ChatPage, chat_app
from phi3v.targets import resolve_target, run_of

PORT = 7860
PASSWORD = "PHI3V_CHAT_PASSWORD"
"""The environment variable that holds what has to be typed before the page is shown."""
QUESTION = "What is shown in this image?"
_GRACE = 3  # seconds that requests have to end when the server stops


def serve_chat(
    target: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    password: str | None = None,
    on_ready: Callable[[str, tuple[str, ...]], None],
    **options: Any,
) -> None:
    """Shows the page until SIGINT or SIGTERM.

    Args:
        target: run, adapter, model folder or hub id.
        host: address to listen at.
        port: port, 0 for any that is free.
        password: what has to be typed first.
        on_ready: called with the page's address and its columns once it can be opened.
        **options: of `ChatModel.from_target`.

    Raises:
        ConfigError: a host beyond this machine without a password of enough characters, an address that cannot be had;
            before anything is loaded. CheckpointError, DeviceError: as loading raises them.
    """
    place = resolve_target(target)
    if not is_loopback(host) and len(password or "") < LEAST_KEY:
        raise ConfigError(
            f"--host {host} lets other machines in: set {PASSWORD} to a password of {LEAST_KEY} characters or more "
            "that they have to type (openssl rand -hex 16), or leave --host out"
        )
    with _listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="phi3v-chat-") as folder:
        model = ChatModel.from_target(target, **options)
        side = SideBySide(model)
        names = {TUNED: model_name(str(target)), BASE: model_name(place.base)}  # as `serve` tells: no paths
        with _environment(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False"):
            page = ChatPage(side, Path(folder), names, example_question(target))
            hosts = {"127.0.0.1", "localhost", "[::1]", host} if is_loopback(host) else None
            app = chat_app(page, hosts, password)
            quiet: dict[str, Any] = {"log_level": "critical", "access_log": False}
            # an address that a header claims would have its own count of wrong passwords, a new one for each claim
            config = uvicorn.Config(app, **quiet, proxy_headers=False, timeout_graceful_shutdown=_GRACE)
            on_ready(f"{shown_address(host, listener.getsockname()[1])}/", side.columns)
            uvicorn.Server(config).run(sockets=[listener])


def example_question(target: str | Path) -> str:
    """The question that a run was tuned with, where it is the same for every row; else a general one."""
    run = run_of(target)
    if run is None:
        return QUESTION
    template = Template(run.read_recipe().data.prompt, "prompt")
    return QUESTION if template.columns else template.render({})


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that connections wait at. Raises: ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        plain = os.strerror(error.errno) if type(error) is OSError and error.errno else None
        reason = plain or getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at {host}, port {port} ({reason}): choose others with --host and --port"
        ) from error
    with listener:
        yield listener


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables, which are the only way to tell Gradio some things, as they were again afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
