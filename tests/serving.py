"""A server for tests: `phi3v serve` in a process of its own, and requests to it.

`with running_server(TINY) as server: server.client.chat.completions.create(...)`. The client is OpenAI's own, without
its retries. `FakeBackend` stands for a worker where a test is about what is in front of it.
"""

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import phi3v.demo
from phi3v.loading import load_base, load_processor
from phi3v.serve.backend import Answer, Backend
from phi3v.serve.limits import Limits
from phi3v.serve.protocol import Refusal

TINY = Path(phi3v.demo.__file__).parent / "tiny"


def photo(number: int) -> bytes:
    """A PNG of its own: a coarse pattern of random colours, 64 to 160 pixels wide."""
    random = np.random.default_rng(number)
    blocks = random.integers(0, 256, (4, 5 + number % 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks.repeat(16, 0).repeat(16 + number % 5, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def asking(text: str, *images: bytes, **more: Any) -> dict[str, Any]:
    """The body of a request with one question."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in images]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}


def write_adapter(folder: Path, rank: int, noise: float) -> Path:
    """An adapter on the demo's model; with much noise its answers are long and mean nothing."""
    torch.manual_seed(rank)
    base = load_base(str(TINY), device="cpu")
    config = LoraConfig(r=rank, target_modules=["qkv_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=noise)
    tuned.peft_config["default"].base_model_name_or_path = str(TINY)
    tuned.save_pretrained(folder)
    load_processor(str(TINY)).save_pretrained(folder)
    return folder


class RunningServer:
    """One server. `answer` is the text of one request, `post` its whole response."""

    def __init__(self, process: subprocess.Popen[str], address: str, names: list[str], key: str | None) -> None:
        self.process, self.address, self.names = process, address, names
        self.root = address.removesuffix("/v1")
        self.client = openai.OpenAI(base_url=address, api_key=key or "none", max_retries=0, timeout=120)
        self.http = httpx.Client(base_url=self.root, timeout=120, trust_env=False)

    def post(self, body: dict[str, Any] | bytes) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})

    def answer(self, body: dict[str, Any]) -> str:
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def health(self) -> dict[str, Any]:
        return self.http.get("/health").json()

    def worker(self) -> int:
        """The process id of the worker, the only child of the server's only child."""
        children: dict[int, int] = {}
        for place in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, *_ = place.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if state != "Z":
                children[int(parent)] = int(place.parent.name)
        return children[children[self.process.pid]]

    def wait_until(self, holds: Any, seconds: float) -> float:
        """Seconds until something holds. Raises: AssertionError when that takes longer."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < seconds, self.health()
            time.sleep(0.005)
        return time.monotonic() - began

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running_server(
    target: Path | str, *options: str, environment: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server on a free port, which is ready; it is killed behind the context."""
    command = [
        sys.executable,
        "-m",
        "phi3v",
        "serve",
        str(target),
        "--port",
        "0",
        "--device",
        "cpu",
        "--json",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        told = json.loads(process.stdout.readline() or "{}")
        assert "address" in told, told
        yield RunningServer(process, told["address"], told["models"], environment.get("PHI3V_API_KEY"))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class FakeBackend(Backend):
    """A worker that is none: answers what a test puts in, and notes what it was asked.

    Attributes:
        asked: the messages of requests.
        script: events of each answer; None keeps it waiting.
        dropped: numbers of requests that nobody waits for any more.
    """

    def __init__(self, limits: Limits, script: list[dict[str, Any]] | None = None) -> None:
        super().__init__({}, limits)
        self.models, self.ready = [{"id": "tiny"}], True
        done = {"is": "done", "reason": "stop", "prompt_tokens": 3, "completion_tokens": 2}
        self.script = (
            [{"is": "piece", "text": "A hat"}, {"is": "piece", "text": "."}, done] if script is None else script
        )
        self.asked: list[dict[str, Any]] = []
        self.images: list[Any] = []
        self.dropped: list[int] = []

    def submit(self, message: Any, images: Any) -> Answer:
        if not self.ready:
            raise Refusal(503, "not_ready", "loading", retry_after=5)
        self.asked.append(dict(message))
        self.images.append(list(images))
        answer = Answer(self, len(self.asked))
        self._answers[answer.number] = answer
        for event in self.script:
            answer.events.put_nowait(event)
        return answer

    def forget(self, number: int, *, cancel: bool) -> None:
        if self._answers.pop(number, None) is not None and cancel:
            self.dropped.append(number)


def in_loop(coroutine: Any) -> Any:
    """Runs a coroutine to its end."""
    return asyncio.run(coroutine)
