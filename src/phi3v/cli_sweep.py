"""`phi3v sweep`: many trainings of one recipe, and the best of them. Parses, calls one function, prints.

phi3v sweep RECIPE [key=value ...]     what to try stands in the recipe's section `sweep`
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import typer

from phi3v.cli_command import AsJson, Debug, Overrides, RecipeFile, refuse_options
from phi3v.cli_session import printable, session
from phi3v.errors import MissingPackageError, install

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.sweep.run import SweepResult, TrialNews


def sweep(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Try a recipe with other values and rank what comes of it; the same command again goes on."""
    refuse_options(overrides)
    hint = "; the same command again goes on with the sweep"
    with session(debug or bool(context.obj), as_json, on_interrupt=hint) as here:
        if find_spec("optuna") is None:
            raise MissingPackageError(f"a sweep needs Optuna: {install('sweep')}")
        from phi3v.cli_screen import Screen
        from phi3v.recipe import Recipe
        from phi3v.sweep.run import sweep as sweep_recipe

        chosen = Recipe.load(recipe, overrides or [], name=f"{recipe.stem}_sweep")  # runs/shop is a run's
        with Screen(here.screen) as screen:

            def tell(news: TrialNews) -> None:
                if news.state == "running":
                    screen.say(trial_line(news))
                else:
                    here.screen.print(trial_line(news), markup=False, soft_wrap=True)
                    screen.on_progress("trials", news.ended, max(news.total, news.ended))

            def watch(event: Any) -> None:
                if event.kind in ("step", "metrics", "features", "look", "answers"):
                    screen.on_event(event)

            result = sweep_recipe(chosen, on_trial=tell, on_event=watch)
        show_sweep(here.screen, result)
        here.result(result.to_dict())


def trial_line(news: TrialNews) -> str:
    """A trial's news in one line.

    Example: "trial 7: complete, 0.4312 in 41 s; 8 of 20 done, best 0.4188 (trial 3)".
    """
    from phi3v.evaluation.figures import duration, short_number
    from phi3v.sweep.names import short

    single = [value if isinstance(value, dict) else {key: value} for key, value in news.values.items()]
    values = ", ".join(f"{key}={short(value)}" for one in single for key, value in one.items())
    if news.state == "running":
        return printable(f"trial {news.number}: {'goes on' if news.resumed else 'begins'} with {values}")
    told = {
        "complete": f"complete, {short_number(news.value)} in {duration(news.seconds)}"
        if news.value is not None
        else "",
        "pruned": f"pruned after {duration(news.seconds)}"
        + ("" if news.last is None else f", {short_number(news.last)} at its last validation"),
        "failed": f"failed: {news.error}",
    }[news.state]
    best = "" if news.best is None else f", best {short_number(news.best[1])} (trial {news.best[0]})"
    return printable(f"trial {news.number}: {told}; {news.ended} of {max(news.total, news.ended)} done{best}")


def show_sweep(console: Console, result: SweepResult) -> None:
    """The ranking's first ten beside the base, what they say, and where things lie."""
    from rich.table import Table
    from rich.text import Text

    from phi3v.evaluation.figures import counted, ends, short_number
    from phi3v.sweep.names import short_names

    ranking = result.ranking
    keys = list(ranking["search"])
    table = Table("", "trial", ranking["metric"], "95 %", title_justify="left", box=None, title="the best trials")
    if beside := ranking["metric"] != "eval_loss":  # it decides among trials of equal value
        table.add_column("held-out loss")
    for key in keys:
        table.add_column(Text(key.rpartition(".")[2]))
    best = [line for line in ranking["trials"] if line["state"] == "complete"][:10]
    names = [short_names([line["values"].get(key) for line in best]) for key in keys]
    for row, line in enumerate(best):
        cells = [Text(column[row]) for column in names]
        if beside:
            cells.insert(0, Text(short_number(line.get("loss"))))
        table.add_row(str(line["rank"]), str(line["trial"]), short_number(line["value"]), ends(line, "number"), *cells)
    if ranking["base"] and "error" not in ranking["base"]:
        table.add_row("", "base", short_number(ranking["base"]["value"]), ends(ranking["base"], "number"))
    console.print(table)
    for line in ranking["remarks"]:
        console.print(printable(line), markup=False, soft_wrap=True)
    states = ", ".join(f"{count} {name}" for name, count in ranking["states"].items())
    told = {
        "finished": "was finished before; ask for more with sweep.trials to go on",
        "complete": "is finished",
        "stopped": "is not finished yet, the time is up or other processes are at it; the same command goes on",
    }[result.status]
    console.print(
        f"sweep {result.folder} {told}: {counted(len(ranking['trials']), 'trial')} ({states})",
        markup=False,
        soft_wrap=True,
    )
    if result.best_recipe is not None:
        console.print(f"best recipe: {result.best_recipe}", markup=False, soft_wrap=True)
