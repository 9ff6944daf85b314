"""`phi3v data`: look at a data set before it is trained on. Parses, calls one function of the library, prints.

phi3v data check RECIPE|DATASET [key=value ...]     counts, problems, lengths, prices, steps and time
phi3v data show RECIPE|DATASET [key=value ...]      some rows as people and as the model see them
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3v.cli_command import AsJson, Command, Debug, Overrides, read_path, refuse_empty, refuse_options
from phi3v.cli_session import FAILED, printable, session

if TYPE_CHECKING:
    from phi3v.recipe import Recipe

data_app = typer.Typer(
    name="data",
    help="Look at a data set before it is trained on.",
    short_help="Look at a data set before it is trained on.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|DATASET",
        help="A recipe (YAML), or a data set: a file, a folder or a hub id.",
        callback=refuse_empty,
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Read headers of images and decode none.")]
STAND_IN = "no model"


@data_app.command(cls=Command, short_help="Count rows, name every problem, measure lengths.")
def check(
    context: typer.Context,
    source: Source,
    overrides: Overrides = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download images that are not in the cache.")] = False,
    shard: Annotated[str, typer.Option(metavar="i/n", help="With --fetch, the i-th of n parts alone, from 0.")] = "0/1",
    quick: Quick = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a data set holds, what is wrong with it and what training on it takes; exit code 1 if it will not do."""
    refuse_options(overrides)
    part = _read_shard(shard, fetch)
    with session(debug or _debug(context), as_json) as here:
        recipe = read_source(source, overrides or [])  # its slips are told before seconds of imports

        from phi3v.cli_data_screen import show_check
        from phi3v.cli_screen import Screen
        from phi3v.training.data_check import check_recipe

        with Screen(here.screen) as screen:
            report = check_recipe(
                recipe,
                model=recipe.model.name != STAND_IN,
                decode=not quick,
                fetch=fetch,
                shard=part,
                on_progress=screen.on_progress,
            )
        show_check(here.screen, report)
        here.result(report.to_dict())
        if not report.passed:
            raise typer.Exit(FAILED)


@data_app.command(cls=Command, short_help="See some rows as the model sees them.")
def show(
    context: typer.Context,
    source: Source,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show, evenly spaced.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="The page; NAME-rows.html where nothing is said.", parser=read_path),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print tokens here and write no page.")] = False,
    quick: Quick = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a page with some rows: each image and its crops, each token with its role, trained ones marked."""
    refuse_options(overrides)
    with session(debug or _debug(context), as_json) as here:
        from phi3v.errors import ConfigError

        if out is not None and out.is_dir():
            raise ConfigError(f"--out {out} is a folder: name the page, {out / 'rows.html'} for instance")
        recipe = read_source(source, overrides or [])
        if recipe.model.name == STAND_IN:
            raise ConfigError(f"nothing says whose tokens to show {source} with: add model=NAME, a model folder or id")

        from phi3v.cli_data_screen import show_rows
        from phi3v.cli_screen import Screen
        from phi3v.data.show_page import PAGE_MARK
        from phi3v.whole_files import refuse_foreign, replace_file

        page = None if text else out or Path(f"{Path(source).stem}-rows.html")
        if page is not None:
            refuse_foreign("--out", page, PAGE_MARK, "page of phi3v data show")

        from phi3v.training.data_show import show_recipe

        with Screen(here.screen) as screen:
            found = show_recipe(recipe, rows=rows, decode=not quick, on_progress=screen.on_progress)
        if found.trouble is not None:
            here.screen.print(printable(found.trouble), markup=False, soft_wrap=True)
            here.result({**found.to_dict(), "page": None})
            raise typer.Exit(FAILED)
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
            replace_file(page, found.page())
        opened = page is not None and not as_json and open_page(page)
        if not opened:
            show_rows(here.screen, found.shown)
        if page is not None:
            here.screen.print(f"page: {page}", markup=False, soft_wrap=True)
        here.result({**found.to_dict(), "page": page})


def open_page(page: Path) -> bool:
    """Opens a page in the browser where a person sits in front of one; says whether it did."""
    import os
    import sys
    import webbrowser

    if not sys.stdout.isatty():
        return False
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        return webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        return False


def read_source(source: str, overrides: list[str]) -> Recipe:
    """The recipe of a YAML file, or one made for a data set alone, whose model is `model=...` or none."""
    from phi3v.recipe import Recipe

    if Path(source).suffix.lower() in (".yaml", ".yml"):
        return Recipe.load(source, overrides)
    values = {"model": STAND_IN, "data": {"train": source}}
    return Recipe.from_dict(values, overrides, name=Path(source).stem or "data")


def _read_shard(text: str, fetch: bool) -> tuple[int, int]:
    """The part that --shard names: "2/8" -> (2, 8). Raises: BadParameter."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise typer.BadParameter(f"{text!r} is not i/n with i from 0 to n-1, 0/8 for instance", param_hint="--shard")
    if int(count) > 1 and not fetch:
        raise typer.BadParameter("only downloads come in parts: add --fetch", param_hint="--shard")
    return int(number), int(count)


def _debug(context: typer.Context) -> bool:
    """Whether `phi3v --debug` was typed in front of the command."""
    return bool(context.find_root().obj)
