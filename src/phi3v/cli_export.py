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

from phi3v.cli_command import AsJson, Debug, Target, read_path, refuse_empty
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


class NumberType(StrEnum):
    """What `--dtype` takes."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


def export(
    context: typer.Context,
    target: Target,
    to: Annotated[Format, typer.Option(help="The format.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder, new or empty.", parser=read_path)],
    dtype: Annotated[
        NumberType | None, typer.Option(help="With --to merged: type of the weights; else that of the base.")
    ] = None,
    shard_size: Annotated[
        float | None, typer.Option(metavar="GB", min=0.001, help="With --to merged: a file of weights at most; else 2.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="With --to onnx: else fp32; int4 is the decoder's alone.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="ID", help="OWNER/NAME of the base, where it is a folder.", callback=refuse_empty),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Send it to the hub, private where REPO is new.", callback=refuse_empty),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everybody to see.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write what was tuned in the form that other programs read, with a model card and digests."""
    for option, given, wanted in (
        ("--dtype", dtype, Format.merged),
        ("--shard-size", shard_size, Format.merged),
        ("--precision", precision, Format.onnx),
    ):
        if given is not None and to is not wanted:
            raise typer.BadParameter(f"it goes with --to {wanted.value} alone", param_hint=option)
    if public and push is None:
        raise typer.BadParameter("it goes with --push alone", param_hint="--public")
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.targets import resolve_target

        resolve_target(target)  # a target that is not there is told before seconds of imports

        from phi3v.export.run import SHARD_BYTES
        from phi3v.export.run import export as export_target

        found = export_target(
            target,
            out,
            to=to.value,
            dtype=None if dtype is None else dtype.value,
            shard_bytes=SHARD_BYTES if shard_size is None else int(shard_size * 10**9),
            precision=(precision or Precision.fp32).value,
            base=base,
            push=push,
            public=public,
        )
        show_export(here.screen, found)
        here.result(found.to_dict())


def show_export(console: Console, found: Exported) -> None:
    """Where it lies, how large it is, the command of vLLM or why there is none, notes, where it was sent."""
    from phi3v.export.vllm import OTHER_TOWER, version_note

    facts = ", ".join(f"{name} {value}" for name, value in found.facts.items())
    line = f"{found.out}: {found.to}, {found.bytes / 10**9:.3g} GB, {facts}"
    console.print(line, markup=False, soft_wrap=True)
    if found.to == "merged":
        command = f"{found.vllm.command(str(found.out))}   # {version_note()}" if found.vllm else OTHER_TOWER
        console.print(command, markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if found.pushed:
        console.print(f"sent: {found.pushed}", markup=False, soft_wrap=True)
