"""`phi3v export`: what was tuned, as others read it. Parses, calls one function of the library, prints.

phi3v export TARGET --to merged --out FOLDER     Microsoft's layout, weights merged: transformers, vLLM, ONNX tools
phi3v export TARGET --to adapter --out FOLDER    the adapter alone, for PEFT
phi3v export TARGET --to onnx --out FOLDER       graphs for onnxruntime-genai
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3v.cli_command import AsJson, Debug, Target, read_path
from phi3v.cli_session import session

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.export.run import Exported


class Format(StrEnum):
    """What `--to` takes."""

    merged = "merged"
    adapter = "adapter"
    onnx = "onnx"


class Precision(StrEnum):
    """What `--precision` takes."""

    fp32 = "fp32"
    fp16 = "fp16"
    int4 = "int4"


def export(
    context: typer.Context,
    target: Target,
    to: Annotated[Format, typer.Option(help="The format.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder, new or empty.", parser=read_path)],
    precision: Annotated[
        Precision | None, typer.Option(help="With --to onnx: fp32 where nothing is said; int4 is the decoder's alone.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write what was tuned in the form that other programs read."""
    if precision is not None and to is not Format.onnx:
        raise typer.BadParameter("it goes with --to onnx alone", param_hint="--precision")
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.export.run import export as export_target

        found = export_target(target, out, to=to.value, precision=(precision or Precision.fp32).value)
        show_export(here.screen, found)
        here.result(found.to_dict())


def show_export(console: Console, found: Exported) -> None:
    """Where it lies and how large it is."""
    console.print(f"{found.out}: {found.to}, {found.bytes / 2**20:,.1f} MiB", markup=False, soft_wrap=True)
