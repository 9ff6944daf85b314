"""`phi3v compare`: several evaluated runs on one page. Parses, calls one function of the library, prints.

phi3v compare RUN RUN ... --out compare.html     scores, tests against the first run, curves, what differs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3v.cli_command import AsJson, Debug, read_path
from phi3v.cli_session import session

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v.evaluation.compare import Comparison


def compare(
    context: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Evaluated runs, two or more.", parser=read_path)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page that is written.", parser=read_path)] = Path(
        "compare.html"
    ),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put several runs on one page: their scores, each tested against the first, and what differs in their recipes."""
    with session(debug or bool(context.obj), as_json) as here:
        from phi3v.evaluation.compare import compare as compare_runs

        found = compare_runs(runs, out)
        show_comparison(here.screen, found)
        here.result(found.to_dict())


def show_comparison(console: Console, found: Comparison) -> None:
    """The primary metric of each run, and its test against the first."""
    from rich.table import Table
    from rich.text import Text

    from phi3v.cli_screen import align
    from phi3v.cli_session import printable
    from phi3v.evaluation.figures import counted, ends, figure, gain, p_value, rows_about

    label = found.runs[0]["metrics"][found.primary]["label"]
    table = Table("", label, "95 % interval", "base", "best single", "minus first", "p", "won", "lost", box=None)
    for run in found.runs:
        one, gap = run["metrics"].get(found.primary), run["beside_first"].get(found.primary)
        value = ["–"] * 4
        if one:
            unit, base = one["unit"], one["base"]
            value = [figure(one["value"], unit), ends(one, unit), figure(base["value"], unit) if base else "–"]
            value.append(figure(one["constant"], unit))
        beside = ["–"] * 4
        if gap:
            beside = [
                gain(gap["difference"]["value"], gap["unit"]),
                p_value(gap["p"]),
                str(gap["won"]),
                str(gap["lost"]),
            ]
        table.add_row(Text(run["name"]), *value, *beside)
    align(table)
    console.print(table)
    for run in found.runs:
        if " about " in (about := rows_about(run, "row")):
            console.print(f"{run['name']}: {about}, which are taken together", markup=False, soft_wrap=True)
        if run["why_not"] or run["tested_on"]:
            console.print(f"{run['name']}: {_rows_of_test(run, found.primary)}", markup=False, soft_wrap=True)
        for name, check in run["checks"].items():
            if check["verdict"] == "fail":
                line = f"{run['name']}: check {name} failed: {printable(check['line'])}"
                console.print(line, markup=False, soft_wrap=True, style="bold red")
    rows, keys = counted(len(found.disagreements), "row"), counted(len(found.recipes), "setting")
    console.print(f"{found.out}: {rows} they disagree on, {keys} that differ", markup=False, soft_wrap=True)


def _rows_of_test(run: Mapping[str, Any], primary: str) -> str:
    """Why there is no test of a run, or which rows its test is on and what both runs get there."""
    from phi3v.evaluation.figures import figure

    if run["why_not"]:
        return str(run["why_not"])
    line, gap = f"tested on {run['tested_on']}", run["beside_first"].get(primary)
    return (
        f"{line}: {figure(gap['own'], gap['unit'])} beside {figure(gap['first'], gap['unit'])} there" if gap else line
    )
