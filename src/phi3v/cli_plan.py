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

    table = Table(f"fullest moment of a step ({found.device})", "memory", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in found.memory.lines.items():
        table.add_row(name, memory_size(size))
    table.add_row("together", memory_size(found.memory.step), style="bold")
    if found.memory.answering:
        table.add_row("answering held-out rows, at the end", memory_size(found.memory.answering))
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
        yield f"change: {change.override} ({memory_size(change.peak)}, {reason})"
    if found.fits is False and all(change.peak > (found.available or 0) for change in found.changes):
        yield "nothing here makes it fit: take a larger GPU, a smaller model, or shorter samples (data.max_length)"
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
    """Whether it fits: "fits into 24.00 GiB: 9.10 GiB of 22.20 GiB that tensors may take there are left", say."""
    if found.total is None or found.available is None:
        return "nothing says how much memory there is: name it, --memory 24GiB"
    left = found.available - found.memory.peak
    room = f"{memory_size(found.available)} that tensors may take there"
    if left >= 0:
        return f"fits into {memory_size(found.total)}: {memory_size(left)} of {room} are left"
    what = "the answers to held-out rows take" if found.memory.step <= found.available else "a step takes"
    return f"does not fit into {memory_size(found.total)}: {what} {memory_size(-left)} more than the {room}"


def memory_size(size: int) -> str:
    """Bytes in GiB: 1610612736 -> "1.50 GiB"; from 100 on without decimals, below 0.1 in MiB, "9.44 MiB"."""
    unit, name = (2**30, "GiB") if size >= 2**30 / 10 else (2**20, "MiB")
    return f"{size / unit:,.{2 if size < 100 * unit else 0}f} {name}"
