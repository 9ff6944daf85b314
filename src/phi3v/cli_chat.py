"""`phi3v chat`: a page in the browser to try a model, its base beside it. Parses, calls one function, prints.

phi3v chat TARGET     photos and questions in, answers of the tuned model and of its base side by side
"""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated

import typer

from phi3v.cli_command import AsJson, Debug, Device, Target, refuse_empty
from phi3v.cli_session import session
from phi3v.errors import MissingPackageError, install


def chat(
    context: typer.Context,
    target: Target,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; one beyond this machine needs a password in PHI3V_CHAT_PASSWORD.",
            callback=refuse_empty,
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes any that is free.")] = 7860,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a page to drop photos into and to ask about them, the tuned model beside its base; Ctrl-C ends it."""
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.targets import resolve_target

        resolve_target(target)  # a target that is not there is told before seconds of imports
        if importlib.util.find_spec("gradio") is None:
            raise MissingPackageError(f"phi3v chat needs gradio, which is not installed: {install('chat')}")

        from phi3v.serve.chat import PASSWORD, serve_chat
        from phi3v.serve.run import for_others

        def ready(url: str, columns: tuple[str, ...]) -> None:
            beside = " beside its base" if len(columns) > 1 else ""
            here.screen.print(
                f"{target}{beside}: open {url} in a browser{for_others(host)}; Ctrl-C ends it",
                markup=False,
                soft_wrap=True,
            )
            here.result({"target": target, "url": url, "columns": list(columns)})

        loading = {} if device is None else {"device": device}
        try:
            serve_chat(
                target, host=host, port=port, password=os.environ.get(PASSWORD) or None, on_ready=ready, **loading
            )
        except KeyboardInterrupt:  # how it ends; what was uploaded is gone by now
            here.screen.print("ended")
