"""`phi3v plan`: memory, steps and time of a training before anything is loaded. Parses, calls, prints.

phi3v plan RECIPE [key=value ...]     a line for each kind of memory, whether it fits, what to change, steps and time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from phi3v.cli_command import AsJson, Debug, Overrides, PhotoSize, RecipeFile, read_size, refuse_options
from phi3v.cli_session import FAILED, session

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.training.memory_plan import Plan


def plan(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Plan for a GPU of so much memory, 24GiB for instance.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many rows with a photo instead of the recipe's.")
    ] = None,
    image: PhotoSize = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a training will take, whether it fits, and how long it is; exit code 1 if it does not fit."""
    refuse_options(overrides)
    size = read_size(image, rows)
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.recipe import Recipe

        chosen = Recipe.load(recipe, overrides or [])  # its slips are told before seconds of imports

        from phi3v.cli_screen import Screen
        from phi3v.training.memory_plan import plan_recipe

        with Screen(here.screen) as screen:
            found = plan_recipe(chosen, memory=memory, rows=rows, image=size, on_progress=screen.on_progress)
        show_plan(here.screen, found)
        here.result(found.to_dict())
        if found.fits is False:
            raise typer.Exit(FAILED)


def show_plan(console: Console, found: Plan) -> None:
    """The table of memory, and the lines below it."""
    from rich.table import Table

    table = Table(f"fullest moment of a step ({found.device})", "GiB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in found.memory.lines.items():
        table.add_row(name, gib(size))
    table.add_row("together", gib(found.memory.step), style="bold")
    if found.memory.answering:
        table.add_row("answering held-out rows, at the end", gib(found.memory.answering))
    console.print(table)
    for line in plan_lines(found):
        console.print(line, markup=False, soft_wrap=True)


def plan_lines(found: Plan) -> Iterator[str]:
    """Whether it fits, what to change, what was chosen, steps and time."""
    from phi3v.evaluation.figures import counted, duration, short_number
    from phi3v.training.outlook import STATED_RATE

    for key, value in found.chosen.items():
        yield f"chosen: {key}={str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}"
    yield verdict(found)
    for change in found.changes:
        fits = found.available is not None and change.peak <= found.available
        reason = "fits too and is faster" if found.fits else "then it fits" if fits else "not enough yet"
        yield f"change: {change.override} ({gib(change.peak)} GiB, {reason})"
    if found.sharded:
        yield "training.fsdp: counted whole, as for one rank; of weights, gradients and optimiser N ranks hold 1/N each"
    if found.unknown_images:
        rows = counted(found.unknown_images, "row")
        yield f"{rows} whose images are not here yet are counted at the price of the dearest image"
    steps = found.outlook
    samples = counted(steps.samples_per_step, "sample")
    epoch = "" if steps.steps_per_epoch is None else f", {steps.steps_per_epoch} an epoch"
    yield f"steps: {steps.steps} of {samples}{epoch}; the largest micro-batch has {short_number(found.largest)} tokens"
    if steps.operations is None:
        return
    work = f"{short_number(steps.tokens)} tokens, {steps.operations:.2g} floating-point operations"
    yield f"time: {work}: {duration(steps.operations / STATED_RATE)} at {STATED_RATE / 1e12:.0f} TFLOP/s"
    if steps.rate is not None and steps.machine is not None and steps.machine.startswith("CPU") != on_gpu(found):
        yield f"      about {duration(steps.operations / steps.rate)} here, by what {steps.machine} multiplies just now"


def on_gpu(found: Plan) -> bool:
    """Whether it was planned for a GPU."""
    return found.device.startswith("GPU")


def verdict(found: Plan) -> str:
    """Whether it fits: "fits into 24.0 GiB: 9.1 of 22.2 GiB that tensors may take are left" for instance."""
    if found.total is None or found.available is None:
        return "nothing says how much memory there is: name it, --memory 24GiB"
    left = found.available - found.memory.peak
    room = f"of {gib(found.available)} GiB that tensors may take there"
    if left >= 0:
        return f"fits into {gib(found.total)} GiB: {gib(left)} {room} are left"
    what = "the answers to held-out rows take" if found.memory.step <= found.available else "a step takes"
    there = f"the {gib(found.available)} GiB that tensors may take there"
    return f"does not fit into {gib(found.total)} GiB: {what} {gib(-left)} GiB more than {there}"


def gib(size: int) -> str:
    """Bytes in GiB: 1610612736 -> "1.50"; of more than 100 without decimals."""
    return f"{size / 2**30:,.2f}" if size < 100 * 2**30 else f"{size / 2**30:,.0f}"
