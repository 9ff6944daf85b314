"""Names that are nowhere, on a machine whose hub cannot be reached: one line, and no minutes of attempts."""

import os
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import PreTrainedConfig

from phi3v import hub_attempt
from phi3v.data import hub_card
from phi3v.data.opening import open_set
from phi3v.errors import CheckpointError, DataError
from phi3v.loading import load_config


@pytest.fixture
def closed_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


COMMANDS = """
from phi3v.cli import app
for words in (["ask", "nobody/nomodel", "a.png", "hi"], ["data", "check", "nosuch/set"]):
    try: app(words)
    except SystemExit as done: print(done.code)
"""


def test_a_target_and_a_set_that_are_nowhere_are_one_line_each(closed_port: int, tmp_path: Path) -> None:
    """In a process that is not told to stay offline; its hub is that port, and each command asks it anew."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port}", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.stdout == "1\n1\n"
    assert [line for line in done.stderr.splitlines() if line.strip()] == [
        "phi3v: nobody/nomodel is no folder here and could not be read from the hub (no connection to "
        "127.0.0.1: [Errno 111] Connection refused): check the name, the network, and HF_TOKEN for private models",
        "phi3v: data set nosuch/set cannot be read: Couldn't reach 'nosuch/set' on the Hub; it is no "
        "file or folder here, and was looked for on the hub: check the name and the network",
    ]


def test_after_an_answer_the_hub_has_its_own_patience(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    attempt = hub_attempt._OneAttempt()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        client = attempt.client()
        assert client.get(f"http://127.0.0.1:{server.getsockname()[1]}/").status_code == 404
        thread.join(10)
    with pytest.raises(Exception, match="refused") as error:
        attempt.client().get(f"http://127.0.0.1:{closed_port}/")
    assert type(error.value).__name__ == "ConnectError"

    unheard = hub_attempt._OneAttempt()
    for _ in range(2):
        with pytest.raises(OfflineModeIsEnabled, match="no connection to 127.0.0.1"):
            unheard.client().get(f"http://127.0.0.1:{closed_port}/")


def test_connecting_has_a_limit() -> None:
    timeout = {"connect": None, "read": 60.0}
    assert hub_attempt._impatient({"timeout": timeout}) == {"timeout": {"connect": 10.0, "read": 60.0}}
    assert hub_attempt._impatient({"timeout": {"connect": 3.0}}) == {"timeout": {"connect": 3.0}}


def answered(status: int, kind: str = "HfHubHTTPError") -> Exception:
    """An error as huggingface_hub raises it: the answer, in which the server repeats the token, hidden below."""
    response = SimpleNamespace(status_code=status)
    own = type(kind, (OSError,), {"response": response})("Client error for url ... you sent Bearer hf_secret1234")
    hidden = OSError("we cannot find the file")
    hidden.__cause__ = own
    return hidden


ANSWERS = {
    (401, "HfHubHTTPError"): "cannot be read: the hub wants to know who asks, .* hf auth login or set HF_TOKEN",
    (
        403,
        "HfHubHTTPError",
    ): "cannot be read: the hub forbids it .403.: ask for access .* hf auth login or set HF_TOKEN",
    (429, "HfHubHTTPError"): "cannot be read: the hub has had too many requests .429.: run the command again later",
    (503, "HfHubHTTPError"): "cannot be read: the hub has a fault of its own .503.: run the command again later",
    (403, "GatedRepoError"): "is gated on the hub: ask for access on its page, .* hf auth login or set HF_TOKEN",
    (401, "RepositoryNotFoundError"): "is no file or folder here, and the hub has none .*: check the name; .* HF_TOKEN",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_of_the_hub_is_no_fault_of_the_network(answer: tuple[int, str], hubs: list[Exception]) -> None:
    hubs.append(answered(*answer))
    with pytest.raises(DataError, match=f"^data set owner/name {ANSWERS[answer]}") as of_data:
        open_set("owner/name")
    with pytest.raises(CheckpointError, match=f"^model owner/name {ANSWERS[answer]}") as of_model:
        load_config("owner/name")
    for error in (of_data, of_model):
        assert "hf_secret" not in "".join(traceback.format_exception(error.value))
        assert "network" not in str(error.value)


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """A hub that gives the error put here for whatever it is asked."""
    found: list[Exception] = []

    def ask(*arguments: Any, **options: Any) -> Any:
        raise found[0]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_card, "hf_hub_download", ask)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", ask)
    return found
