"""How many requests a second a CPU answers, and how soon the first text comes: a loop, ours, transformers serve.

    python benchmarks/serve.py --out benchmarks/serve [--requests 48] [--clients 1 8 32] [--threads 1]

The tiny model that comes with phi3v is asked about scenes of the kind that it was pretrained on, each in a request of
its own, as a PNG in a data URL; of each scene the question with the longest answer, two to forty tokens:

    loop                  `ChatModel.ask`, one photo after the other: the model's own `generate`, no HTTP
    phi3v serve           so many clients at once, each with its next request when its last one is answered; streams
    transformers serve    with these model classes registered: the same clients, the same requests

Both servers are processes of their own, with as many threads for the model as the loop. The first answers of each warm
up. Answers must be the loop's; a tie (margin under 1e-4 between the two likeliest tokens) is listed, anything else is
an error. No image comes twice, since ours would keep its features. `--without-others` leaves transformers serve out.

    python benchmarks/serve.py --full FOLDER --requests 24 --out benchmarks/serve_full

On a GPU at full size: FOLDER holds the published config.json, tokenizer and processor files; the weights are random, in
bfloat16, and answers have 40 tokens. There a batch rounds other than a row alone: answers that differ are counted.
"""

import argparse
import base64
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from results import to_write

import phi3v.demo
from phi3v.demo.scenes import scene
from phi3v.generate import ChatModel

TINY = Path(phi3v.demo.__file__).parent / "tiny"
SEED, TOKENS, LEAST_GAIN = 77, 40, 2.0
SPARE_READY = 20
"""Seconds in which our spare worker has imported everything, which takes a core of a server that has just begun."""
OTHERS = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[3]))
import phi3v
phi3v.register()
from transformers import AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
for kind in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT"):
    getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")["phi3_v"] = "Phi3VForCausalLM"
AutoModelForMultimodalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
from transformers.cli.serve import Serve
Serve(force_model=sys.argv[1], device="cpu", dtype="float32", port=int(sys.argv[2]), log_level="error")
"""
"""transformers' server needs the classes in three registries."""


def questions(count: int, first: int) -> list[tuple[bytes, str]]:
    """Scenes from a number on, each as PNG with the question of its longest answer."""
    found = []
    for index in range(first, first + count):
        one, buffer = scene(SEED, index), io.BytesIO()
        one.image.save(buffer, "PNG")
        found.append((buffer.getvalue(), max(one.turns, key=lambda turn: len(turn[1]))[0]))
    return found


class Loop:
    """The model's own `generate`, one request after the other."""

    def __init__(self, target: Path, how: dict[str, str]) -> None:
        self.chat = ChatModel.from_target(target, **how)

    def ask(self, asked: tuple[bytes, str]) -> tuple[str, float]:
        """The answer and the seconds to its first piece."""
        began, first = time.perf_counter(), []
        text = self.chat.ask(
            _photo(asked[0]),
            asked[1],
            max_new_tokens=TOKENS,
            stream=lambda piece: first.append(time.perf_counter() - began),
        )
        return text, first[0] if first else time.perf_counter() - began

    def margin(self, asked: tuple[bytes, str], other: str) -> float:
        """Margin between the two likeliest tokens where the loop's answer begins to differ from another one."""
        from evaluate import margin_of

        from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart

        turn = Message("user", (ImagePart(0), TextPart(asked[1])))
        return margin_of(self.chat, Row((turn,), (ImageRef(data=asked[0]),), {}, "scene", 0), other, TOKENS)


def _photo(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


class Server:
    """A server in a process of its own, asked by streams."""

    def __init__(self, command: list[str], address: str | None, model: str, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.model = model
        self.address = address or json.loads(self.process.stdout.readline())["address"]
        self.http = httpx.Client(timeout=300, trust_env=False, limits=httpx.Limits(max_connections=100))
        until = time.monotonic() + 120
        while True:
            try:
                if self.http.get(self.address.removesuffix("/v1") + "/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command[:4]} does not answer")
            time.sleep(0.2)

    def ask(self, asked: tuple[bytes, str]) -> tuple[str, float]:
        """The answer and the seconds to its first piece."""
        url = "data:image/png;base64," + base64.b64encode(asked[0]).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": asked[1]}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        began, first, pieces = time.perf_counter(), None, []
        with self.http.stream("POST", f"{self.address}/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                raise SystemExit(response.read().decode())
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    piece = choices[0]["delta"].get("content") if choices else None
                    if piece:
                        first = first or time.perf_counter() - began
                        pieces.append(piece)
        return "".join(pieces), first or time.perf_counter() - began

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def clocked(ask: Callable[[tuple[bytes, str]], tuple[str, float]], asked: list, clients: int) -> tuple[list[str], dict]:
    """The answers of so many clients, and what they took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, asked))
    seconds = time.perf_counter() - began
    firsts = sorted(first for _, first in found)
    return [text for text, _ in found], {
        "clients": clients,
        "requests a second": round(len(asked) / seconds, 2),
        "first text, median s": round(statistics.median(firsts), 3),
        "first text, 95 % s": round(firsts[int(0.95 * (len(firsts) - 1))], 3),
    }


def full_size(files: Path, folder: Path) -> Path:
    """The published size with random weights, from the folder of its configuration, tokenizer and processor."""
    from sizes import build

    from phi3v.model.configuration_phi3_v import Phi3VConfig
    from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

    config = Phi3VConfig.from_pretrained(files)
    model = build(Phi3VForCausalLM, config, device="cuda", dtype=torch.bfloat16, attention="sdpa")
    model.save_pretrained(folder)
    for file in files.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, folder)
    del model
    torch.cuda.empty_cache()
    return folder


def compare(loop: Loop, asked: list, expected: list[str], texts: list[str]) -> list[dict]:
    """Answers that differ from the loop's, each with its margin. Raises: SystemExit where one is no tie."""
    pairs = zip(asked, expected, texts, strict=True)
    ties = [
        {"loop": wanted, "served": text, "margin": loop.margin(one, text)}
        for one, wanted, text in pairs
        if text != wanted
    ]
    if any(tie["margin"] > 1e-4 for tie in ties):
        raise SystemExit(f"answers differ: {ties}")
    return ties


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--without-others", action="store_true", help="leave transformers serve out")
    parser.add_argument("--full", type=Path, help="folder of the published model's files: full size, on a GPU")
    parser.add_argument("--out", type=to_write, default=Path("serve"), help="name of the .json")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    place = tempfile.TemporaryDirectory()
    target = full_size(given.full, Path(place.name) / "tiny") if given.full else TINY
    how = {"device": "cuda", "dtype": "bfloat16"} if given.full else {"device": "cpu", "dtype": "float32"}
    loop, rows, ties, differing, ours_differ = Loop(target, how), [], [], 0, 0
    ours = [sys.executable, "-m", "phi3v", "serve", str(target), "--port", "0", "--device", how["device"], "--json"]
    servers = {"phi3v serve": Server([*ours, "--batch-size", str(given.batch)], None, "tiny", given.threads)}
    if not given.without_others and not given.full:
        port, model = "8931", f"{TINY}"
        command = [sys.executable, "-c", OTHERS, model, port, str(given.threads)]
        servers["transformers serve"] = Server(command, f"http://127.0.0.1:{port}/v1", model, given.threads)
    for server in [loop, *servers.values()]:
        for one in questions(3, 0):
            server.ask(one)
    time.sleep(SPARE_READY)
    for turn, clients in enumerate(given.clients):
        asked = questions(given.requests, 1000 * (turn + 1))
        expected, told = clocked(loop.ask, asked, 1)
        rows.append({"way": "loop", **told, "beside": clients})
        for name, server in servers.items():
            texts, told = clocked(server.ask, asked, clients)
            gain = told["requests a second"] / rows[-1 if name == "phi3v serve" else -2]["requests a second"]
            rows.append({"way": name, **told, "times the loop": round(gain, 2)})
            if name == "phi3v serve" and given.full:
                ours_differ += sum(one != other for one, other in zip(expected, texts, strict=True))
            elif name == "phi3v serve":
                ties += compare(loop, asked, expected, texts)
            else:
                differing += sum(one != other for one, other in zip(expected, texts, strict=True))
        for row in rows[-1 - len(servers) :]:
            print(row, flush=True)
    for server in servers.values():
        server.stop()
    place.cleanup()
    machine = torch.cuda.get_device_name() if given.full else platform.processor() or platform.machine()
    about = {"machine": machine, "torch": torch.__version__, **vars(given), "full": given.full is not None}
    result = {
        "about": {**about, "out": None},
        "rows": rows,
        "ties": ties,
        "answers that differ, transformers": differing,
        "answers that differ, phi3v serve in bfloat16": ours_differ,
    }
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"ties: {len(ties)}; answers that differ: transformers serve {differing}, ours in bfloat16 {ours_differ}")
    at_eight = [row["times the loop"] for row in rows if row["way"] == "phi3v serve" and row["clients"] == 8]
    if not given.full and at_eight and min(at_eight) < LEAST_GAIN:
        raise SystemExit(f"at 8 clients {min(at_eight)} times the loop, less than {LEAST_GAIN}")


if __name__ == "__main__":
    main()
