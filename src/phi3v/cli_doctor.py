"""`phi3v doctor`: whether a training would teach what its rows say, shown on a real batch. Parses, calls, prints.

phi3v doctor RECIPE [key=value ...]     one line for each thing that was looked at
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from phi3v.cli_command import AsJson, Debug, Overrides, RecipeFile, refuse_options
from phi3v.cli_session import FAILED, printable, session

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.training.doctor import Diagnosis


def doctor(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show on a real batch that a training will teach what its rows say; exit code 1 if something is wrong."""
    refuse_options(overrides)
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.recipe import Recipe

        chosen = Recipe.load(recipe, overrides or [])  # its slips are told before seconds of imports

        from phi3v.cli_screen import Screen
        from phi3v.training.doctor import examine

        with Screen(here.screen) as screen:
            found = examine(chosen, on_progress=screen.on_progress)
        show_diagnosis(here.screen, found)
        here.result(found.to_dict())
        if not found.passed:
            raise typer.Exit(FAILED)


def show_diagnosis(console: Console, found: Diagnosis) -> None:
    """A line for each check, one for each fault below it, and one for each note."""
    from phi3v.evaluation.figures import counted

    console.print(f"on {counted(found.rows, 'row')} of this recipe:", markup=False)
    for check in found.checks:
        console.print(
            f"  {'wrong' if check.faults else 'ok   '}  {printable(check.name)}", markup=False, soft_wrap=True
        )
        for fault in check.faults:
            console.print(f"           {printable(fault)}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"  note   {printable(note)}", markup=False, soft_wrap=True)
