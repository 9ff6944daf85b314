"""The command line: parses, calls one function of the library, prints what it returns.

    phi3v train RECIPE [key=value ...]      data -> LoRA -> training with evaluation -> adapter and report
    phi3v evaluate TARGET [--against ...]   scores on held-out rows, beside the base or another TARGET
    phi3v predict TARGET --data ... --out F answers for images without labels, as a file
    phi3v compare RUN RUN ...               several evaluated runs on one page, each tested against the first
    phi3v ask TARGET IMAGE... "question"    the answer, streamed
    phi3v export TARGET --to ... --out DIR  what was tuned, as other programs read it
    phi3v chat TARGET                       a page in the browser to try it, its base beside it
    phi3v serve TARGET                      a small server in the form of OpenAI's chat completions
    phi3v data check RECIPE|DATASET         what is in a data set, what is wrong with it, what it costs
    phi3v data show RECIPE                  some rows as the model sees them
    phi3v plan RECIPE [key=value ...]       memory, steps and time before anything is loaded
    phi3v doctor RECIPE [key=value ...]     whether a training would teach what its rows say
    phi3v profile RECIPE [key=value ...]    where time and memory of a training go
    phi3v sweep RECIPE [key=value ...]      many trainings with other values, ranked; the best recipe
    phi3v demo                              all of it on the model and the products that come with the package

TARGET is a run, an adapter, a model folder or a hub id; `ask` also takes a folder of ONNX graphs. Every command takes
`--json` (one object on standard output) and `--debug` (tracebacks). Nothing heavy is imported before a command needs
it, so `--help` is quick, and so is what is wrong with a recipe or a target.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from phi3v import __version__
from phi3v.cli_chat import chat
from phi3v.cli_command import (
    AsJson,
    Command,
    Debug,
    Device,
    EvaluationFolder,
    MaxPixels,
    Overrides,
    Program,
    RecipeFile,
    Target,
    read_metrics,
    read_path,
    refuse_empty,
    refuse_options,
)
from phi3v.cli_compare import compare
from phi3v.cli_data import data_app
from phi3v.cli_doctor import doctor
from phi3v.cli_export import export
from phi3v.cli_plan import plan
from phi3v.cli_predict import predict
from phi3v.cli_profile import profile
from phi3v.cli_serve import serve
from phi3v.cli_session import session
from phi3v.cli_sweep import sweep

_PHOTO_NAME = re.compile(
    r"(?:https?://|file://|data:image/|~?/|\.\.?/)\S*|.*\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif)", re.IGNORECASE
)
"""What an image is called and a question is not: phto.png, ./photos/scarf, https://shop.example/1."""


class Runtime(StrEnum):
    """What `ask --runtime` takes."""

    torch = "torch"
    onnx = "onnx"


app = typer.Typer(
    name="phi3v",
    cls=Program,
    help="Tune Microsoft's Phi-3-Vision and Phi-3.5-Vision to your own images: from photo to answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(data_app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phi3v {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    context.obj = debug


@app.command(cls=Command, short_help="Tune a model as a recipe says, or go on with a run.")
def train(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune a model as a recipe says; the same command again resumes, or says that the run is finished."""
    refuse_options(overrides)
    hint = "; the same command again goes on with the run"
    with session(debug or context.obj, as_json, on_interrupt=hint) as here:
        from phi3v.recipe import Recipe

        chosen = Recipe.load(recipe, overrides or [])  # its slips are told before seconds of imports

        from phi3v.cli_screen import Screen, show_run
        from phi3v.evaluation.report_run import NEEDED
        from phi3v.run_folder import RunFolder
        from phi3v.training.train import train as train_run

        answered = RunFolder(chosen.output).evaluation.is_file()
        with Screen(here.screen) as screen:
            result = train_run(chosen, on_event=screen.on_event)
        run = RunFolder(result.folder)
        summary = {
            **result.to_dict(),
            "evaluation": run.read_evaluation(needed=NEEDED) if run.evaluation.is_file() else None,
            "report": str(run.report) if run.report.is_file() else None,
        }
        show_run(here.screen, summary, added=run.evaluation.is_file() and not answered)
        here.result(summary)


@app.command(cls=Command, short_help="Score answers to held-out rows, beside the base's or another model's.")
def evaluate(
    context: typer.Context,
    target: Target,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A recipe, whose held-out rows are used, or data to read with the run's templates.",
            callback=refuse_empty,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(metavar="TARGET", help="What answers beside it: base, none or a TARGET.", callback=refuse_empty),
    ] = "base",
    metrics: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Metrics; else those of the recipe or of the answers' kind."),
    ] = None,
    checks: Annotated[
        bool, typer.Option("--checks", help="Make every check; else those of the recipe, or the usual ones.")
    ] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows only.")] = None,
    out: EvaluationFolder = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer held-out rows with a model and with its base or another model, and score both."""
    named = read_metrics(metrics)
    refuse_options(overrides)
    with session(debug or context.obj, as_json) as here:
        from phi3v.targets import resolve_target

        resolve_target(target)  # a target that is not there is told before seconds of imports

        from phi3v.cli_screen import Screen, show_evaluation
        from phi3v.evaluation.checks import ALL
        from phi3v.evaluation.run import evaluate as evaluate_target

        with Screen(here.screen) as screen:
            evaluation = evaluate_target(
                target,
                data,
                against=against,
                metrics=named,
                checks=ALL if checks else None,
                rows=rows,
                out=out,
                overrides=overrides or (),
                device=device,
                on_progress=screen.on_progress,
            ).to_dict()
        show_evaluation(here.screen, evaluation)
        if out is not None:
            here.screen.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)
        here.result(evaluation)


app.command(cls=Command, short_help="Answer images without labels, into a file.")(predict)
app.command(cls=Command, short_help="Put several evaluated runs on one page.")(compare)
app.command(cls=Command, short_help="Write what was tuned in a form that other programs read.")(export)


@app.command(cls=Command, short_help="Ask a question about images.")
def ask(
    context: typer.Context,
    target: Target,
    images_and_question: Annotated[
        list[str],
        typer.Argument(metavar='IMAGE... "question"', help="Image files, then the question in quotes."),
    ],
    runtime: Annotated[
        Runtime | None, typer.Option(help="What answers; where nothing is said, onnx for ONNX graphs, else torch.")
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ask a question about images; the answer is printed as it is made."""
    *images, question = images_and_question
    if not question.strip():
        raise typer.BadParameter("the question is empty; put it last, in quotes", param_hint="question")
    if not question.isascii() and question.encode(errors="replace").decode() != question:
        raise typer.BadParameter(
            "the question is not UTF-8; write it in the encoding of the terminal, or in UTF-8", param_hint="question"
        )
    if not all(image.strip() for image in images):
        raise typer.BadParameter("an image is empty; name a file", param_hint="IMAGE")
    if os.path.isfile(question):  # which a question longer than any name is not; Path's own would raise
        raise typer.BadParameter(f"{question} is a file; put the question after it, in quotes", param_hint="question")
    if not images and _PHOTO_NAME.fullmatch(question.strip()):
        raise typer.BadParameter(
            f"{question} looks like the name of an image, and no such file is here; name a file, then the question in "
            "quotes (a question about no image that ends so needs a mark behind it)",
            param_hint="question",
        )
    with session(debug or context.obj, as_json) as here:
        from phi3v.targets import graphs_of, holds_graphs, resolve_target

        by_graphs = runtime is Runtime.onnx or (runtime is None and holds_graphs(target))
        # A target that is not there is told before seconds of imports.
        graphs_of(target) if by_graphs else resolve_target(target)
        if by_graphs and device not in (None, "auto", "cpu"):
            raise typer.BadParameter("ONNX graphs run on the CPU here", param_hint="--device")

        def show(text: str) -> None:
            here.answers.write(text)
            here.answers.flush()

        stream = None if as_json else show
        if by_graphs:
            from phi3v.export.onnx_runtime import OnnxChatModel

            answer = OnnxChatModel.from_target(target, max_pixels=max_pixels).ask(images, question, stream=stream)
        else:
            from phi3v.generate import ask as ask_target

            answer = ask_target(target, images, question, device=device, max_pixels=max_pixels, stream=stream)
        if not as_json:
            show("\n")
        here.result({"target": target, "images": images, "question": question, "answer": answer})


app.command(cls=Command, short_help="Try a model in the browser, beside its base.")(chat)


@app.command(cls=Command, short_help="See it learn, on a small model that comes with phi3v.")
def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for all that it writes.", parser=read_path)
    ] = Path("runs/demo"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune the model that comes with the package on generated product photos, with controls; a few minutes on a CPU."""
    with session(debug or context.obj, as_json) as here:
        from phi3v.cli_screen import Screen, show_demo
        from phi3v.demo.run import run_demo

        with Screen(here.screen) as screen:
            story = run_demo(output, on_event=screen.on_event, on_progress=screen.on_progress, say=screen.say)
        show_demo(here.screen, story)
        here.result(story)


app.command(cls=Command, short_help="Count what a training will take: memory, steps, time.")(plan)
app.command(cls=Command, short_help="Show on a real batch that a training is right.")(doctor)
app.command(cls=Command, short_help="Try a recipe with other values, and rank them.")(sweep)
app.command(cls=Command, short_help="See where the time of a training goes.")(profile)
app.command(cls=Command, short_help="Serve a model and its adapters over HTTP.")(serve)


def main() -> None:
    """Entry point of the `phi3v` command."""
    app()
