"""`phi3v profile`: where time and memory of a training go. Parses, calls one function of the library, prints.

phi3v profile RECIPE [key=value ...]     a few steps, a table of their parts, the one setting to change
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3v.cli_command import AsJson, Debug, Overrides, RecipeFile, read_path, read_size, refuse_options
from phi3v.cli_session import session

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.training.profile import Profile


def profile(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are watched, after two that warm up.")] = 5,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Train on so many generated rows instead of the recipe's.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="WxH,...", help="With --rows, photos' sizes in turn, WxH+WxH for two in one row; else 1200x1600."
        ),
    ] = None,
    words: Annotated[int | None, typer.Option(min=1, help="With --rows, words of an answer, else 60.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what ran, for Perfetto.", parser=read_path)
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a few steps of a training and say where their time and memory go; the recipe's own run is not touched."""
    refuse_options(overrides)
    given = [[None]] if image is None else [row.split("+") for row in image.split(",")]
    sizes = [[read_size(one, rows) for one in row] for row in given]
    if words is not None and rows is None:
        raise typer.BadParameter("the recipe's own answers have their lengths: add --rows", param_hint="--words")
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.recipe import Recipe

        chosen = Recipe.load(recipe, overrides or [])  # its slips are told before seconds of imports

        from phi3v.cli_screen import Screen
        from phi3v.training.profile import profile as profile_recipe

        with Screen(here.screen) as screen:
            found = profile_recipe(
                chosen, steps=steps, rows=rows, images=sizes, words=words or 60, trace=trace, on_event=screen.on_event
            )
        show_profile(here.screen, found)
        here.result(found.to_dict())


def show_profile(console: Console, found: Profile) -> None:
    """The table, the floor and the advice."""
    from rich.table import Table

    counts = f"{found.steps} steps of {found.samples_per_step} samples in {found.micro_batches:.1f} micro-batches"
    line = f"{found.device}: {counts}, {found.tokens:,.0f} tokens and {found.padding:.0%} padding"
    console.print(line, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    counted = any(part.gib for part in found.parts)  # by torch's allocator, which a CPU has none of
    for title in ("part", "ms a step", "share", *(["most GiB"] if counted else [])):
        table.add_column(title, justify="left" if title == "part" else "right")
    for part in found.parts:
        if part.name == "tower backward" and not part.seconds:
            continue  # nothing of the tower is trained
        gib = [f"{part.gib:.1f}" if part.gib else ""] if counted else []
        table.add_row(part.name, f"{1000 * part.seconds:,.1f}", f"{found.share(part.name):.0%}", *gib)
    weights = [f"{found.weights_gib:.1f} weights"] if counted else []
    table.add_row("all", f"{1000 * found.seconds:,.1f}", "", *weights)
    console.print(table)
    for line in lines_of(found):
        console.print(line, markup=False, soft_wrap=True)


def lines_of(found: Profile) -> list[str]:
    """What stands below the table."""
    rate = found.samples_per_step / found.seconds if found.seconds else 0.0
    lines = [f"{rate:,.2f} samples/s"]
    if found.floor_share is not None:
        lines[0] += f", {found.floor_share:.0%} of what {found.rate / 1e12:,.2f}e12 operations a second would allow"
    if found.decode_seconds is not None:
        lines.append(f"a sample takes {1000 * found.decode_seconds:,.1f} ms of one core from its files to tensors")
    if found.device_idle is not None:
        lines.append(f"the GPU is idle in {found.device_idle:.1%} of the time")
    if found.trace:
        lines.append(f"{found.trace}: open it at ui.perfetto.dev")
    if found.advice is None:
        lines.append("no setting stands out")
    else:
        lines.append(f"change first: {found.advice.key}={found.advice.value} ({found.advice.reason})")
    return lines
