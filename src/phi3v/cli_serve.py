"""`phi3v serve`: a small server in OpenAI's form. Parses, calls one function of the library, prints the address.

phi3v serve TARGET                              the TARGET and its base, by name, on 127.0.0.1:8000
phi3v serve TARGET --adapter name=path          more adapters of the same base
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from phi3v.cli_command import AsJson, Debug, Device, Target, read_path, refuse_empty
from phi3v.cli_session import session


def serve(
    context: typer.Context,
    target: Target,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="One more adapter of the same base; may be repeated.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind; beyond loopback it needs a key.", callback=refuse_empty)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its first line is the key; else PHI3V_API_KEY.", parser=read_path),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Host whose https images may be fetched; may be repeated.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; the next one gets 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds from a request to the end of its answer.")] = 120,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer; else 32768 or what the model has.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve a model and its adapters by OpenAI's chat completions; SIGTERM and Ctrl-C end it in order."""
    adapters = read_adapters(adapter or [])
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.serve.limits import Limits
        from phi3v.serve.names import named_targets
        from phi3v.serve.run import ServeOptions, for_others, read_key
        from phi3v.serve.run import serve as serve_target
        from phi3v.targets import resolve_target

        limits = Limits(batch=batch_size, queue=queue, seconds=timeout, context=max_context)
        key = read_key(api_key_file, os.environ)
        options = ServeOptions(host, port, key, tuple(allow_host or ()), limits)
        named_targets(resolve_target(target), adapters)  # what is wrong with them is told before seconds of imports

        def on_ready(address: str, names: list[str]) -> None:
            line = f"serving {', '.join(names)} at {address}{for_others(host)} (Ctrl-C ends it)"
            here.screen.print(line, markup=False, soft_wrap=True)
            here.result({"address": address, "models": names})

        serve_target(target, adapters, options, device=device, on_ready=on_ready)


def read_adapters(words: list[str]) -> dict[str, str]:
    """["hats=runs/hats"] -> {"hats": "runs/hats"}. Raises: BadParameter for another form, and for a name twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or not name.strip() or not place.strip():
            raise typer.BadParameter(f"{word!r} is not name=path, hats=runs/hats for instance", param_hint="--adapter")
        if name in found:
            raise typer.BadParameter(f"{name!r} is named twice", param_hint="--adapter")
        found[name] = place
    return found
