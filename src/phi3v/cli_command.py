"""What the commands share as typed: how their help looks, the options that all of them take, words of key=value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from phi3v.cli_session import slips_as_json


class Command(TyperCommand):
    """A command whose help shows arguments as they are typed: `phi3v train RECIPE [key=value ...]`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the name of the command in the usage line."""
        return [*(words for words, _ in self._arguments(ctx)), "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments by their names alone, options as typer shows them."""
        options = [param.get_help_record(ctx) for param in self.get_params(ctx) if param.param_type_name == "option"]
        for title, lines in (("Arguments", self._arguments(ctx)), ("Options", [line for line in options if line])):
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)

    def _arguments(self, ctx: Any) -> list[tuple[str, str]]:
        """Name and help of each argument."""
        found: list[Any] = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return [(str(param.metavar), str(param.help)) for param in found]


class Program(TyperGroup):
    """All commands; wherever in the command line a slip is seen, `--json` has it told as JSON as well."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Reads the words in front of the command."""
        words = list(args)
        with slips_as_json(words):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta["phi3v.words"] = words
        return context

    def invoke(self, ctx: Any) -> Any:
        """Reads the rest of the words and runs the command."""
        with slips_as_json(ctx.meta["phi3v.words"]):
            return super().invoke(ctx)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error and what the libraries say.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Replace values, e.g. training.learning_rate=1e-4."),
]


def refuse_options(overrides: list[str] | None) -> None:
    """Words after the recipe are key=value; anything else is a slip that must not be taken for a value."""
    for word in overrides or []:
        key, equals, _ = word.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            told = f"{word!r} is not key=value, e.g. training.epochs=1"
            if os.path.exists(word):
                told = (
                    f"{word!r} is a second file: put quotes around a pattern ('shards/*.tar'), which the shell fills in"
                )
            raise typer.BadParameter(told, param_hint="key=value")


def read_path(value: str | Path) -> Path:
    """A path as typed; the empty one is refused as `refuse_empty` does, since `Path("")` is the current folder."""
    refuse_empty(str(value))
    return Path(value)


def refuse_empty(value: str | None) -> str | None:
    """Refuses "" where a place is named: it would be taken for the current folder, a shell's unset variable often."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty; name something, or check the variable that it comes from")
    return value


def read_metrics(text: str | None) -> list[str] | None:
    """ "anls, rouge_l" -> ["anls", "rouge_l"], None where nothing is said. Raises: BadParameter for another name."""
    if text is None:
        return None
    from phi3v.recipe_report import MetricName

    known, named = get_args(MetricName), [name.strip() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is no metric; there are {', '.join(known)}", param_hint="--metrics")
    return named


def read_size(text: str | None, rows: int | None) -> tuple[int, int]:
    """ "1200x1600" -> (1200, 1600), the size where none is given. Raises: BadParameter, also for one without `rows`."""
    if text is None:
        return _PHOTO_SIZE
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        slip = repr(text) if text else "nothing (beside a comma or +, say)"
        raise typer.BadParameter(f"{slip} is no size, 1200x1600 for instance is", param_hint="--image")
    if rows is None:
        raise typer.BadParameter("the recipe's own photos have their sizes: add --rows", param_hint="--image")
    return int(width), int(height)


_PHOTO_SIZE = (1200, 1600)
PhotoSize = Annotated[str | None, typer.Option(metavar="WxH", help="With --rows, the photos' size, else 1200x1600.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", parser=read_path)]
MaxPixels = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Larger images are refused; else as the recipe says, or 20 million."),
]
EvaluationFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where it is written; else into a run, for its own rows.", parser=read_path),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model runs: auto, cpu, cuda; where nothing is said, as its recipe says.", callback=refuse_empty
    ),
]
Target = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A run, an adapter, a model folder or a hub id.", callback=refuse_empty),
]
