"""`phi3v predict`: answers for images without labels, as a file. Parses, calls one function of the library, prints.

phi3v predict TARGET --data DATA --out answers.csv     a row for each image: its answer, or why there is none
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3v.cli_command import (
    AsJson,
    Debug,
    Device,
    MaxPixels,
    Overrides,
    Target,
    read_path,
    refuse_empty,
    refuse_options,
)
from phi3v.cli_session import printable, session

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.evaluation.predict import Prediction


def predict(
    context: typer.Context,
    target: Target,
    data: Annotated[
        str,
        typer.Option(
            help="Photos in a folder, a CSV, JSONL, JSON or Parquet file, a hub id; or a recipe's held-out rows.",
            callback=refuse_empty,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="What is written: .parquet, .csv or .jsonl.", parser=read_path)
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="The question, which may name {columns}; else that of the run.", callback=refuse_empty),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows only.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows that are answered at once; else as the recipe says.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; else as the recipe says.")
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
    overrides: Overrides = None,
) -> None:
    """Answer images that have no labels, and write the answers to a file; the same command again goes on."""
    refuse_options(overrides)
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.cli_screen import Screen
        from phi3v.evaluation.predict import predict as predict_rows

        with Screen(here.screen) as screen:
            found = predict_rows(
                target,
                data,
                out,
                prompt=prompt,
                rows=rows,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                device=device,
                max_pixels=max_pixels,
                overrides=overrides or (),
                on_progress=screen.on_progress,
            )
        show_prediction(here.screen, found)
        here.result(found.to_dict())


def show_prediction(console: Console, found: Prediction) -> None:
    """How many answers there are, the first rows without one, and where they lie."""
    from phi3v.evaluation.figures import counted, duration

    for line in found.problems[:5]:
        console.print(f"no answer: {printable(line)}", markup=False, soft_wrap=True)
    if len(found.problems) > 5:
        console.print(f"no answer: {counted(len(found.problems) - 5, 'more row')}, named in the file")
    line = f"{found.answered} of {counted(found.rows, 'row')} answered"
    if found.well_formed is not None:
        line += f", {found.well_formed} in the form of the run's answers"
    if found.status == "finished":
        line = f"was finished before: {line}; name another file to answer again"
    else:
        line += f", in {duration(found.seconds)}"
    console.print(f"{found.out}: {line}", markup=False, soft_wrap=True)
