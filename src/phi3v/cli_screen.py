"""What a person sees while a command works and when it is done: bars, tables, sample answers.

Takes what the library returns or reports and draws it with rich; decides nothing and computes no score. Text of models
and data is printed as it is, never read as markup. Without a terminal there are no bars but now and then a line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from phi3v.cli_session import printable
from phi3v.evaluation.figures import (
    counted,
    duration,
    ending,
    ends,
    figure,
    gain,
    gain_ends,
    interval,
    p_value,
    percent,
    rows_about,
    short_number,
)
from phi3v.evaluation.headline import beside_constant, column_names, out_of_form, row_label

if TYPE_CHECKING:
    from phi3v.first_look import RowUse
    from phi3v.training.callbacks import TrainingEvent
    from phi3v.tuning import TrainableReport


class Screen:
    """Progress of one command: a bar per stage, what trains, the losses.

    Is a context manager. `on_event` watches a training, `on_progress(stage, done, total)` anything that counts rows.
    """

    def __init__(self, console: Console) -> None:
        """Draw on this console."""
        self.console = console
        self._losses: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}
        whole = Column(no_wrap=True)
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # what a narrow terminal cuts is the note alone
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(table_column=whole),
            TextColumn("left"),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[note]}", markup=False, table_column=rest),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bars down; what they showed last stays."""
        self._bars.stop()

    def on_event(self, event: TrainingEvent) -> None:
        """Show an event of a training."""
        if event.kind == "start":
            self._began["training"] = (time.monotonic(), event.step)
            if event.trainable is not None:
                show_trainable(self.console, event.trainable)
            if event.resumed_from is not None:
                self.console.print(f"going on from the checkpoint of step {event.resumed_from}")
        elif event.kind == "features":
            self.on_progress("looking at the images", event.step, event.total)
        elif event.kind in ("kept", "way"):
            self.console.print(printable(event.line), markup=False, soft_wrap=True)
        elif event.kind == "rows" and event.rows is not None:
            self.console.print(printable(rows_line(event.rows)), markup=False, soft_wrap=True)
            if event.rows.repeated:
                self.console.print(repeated_line(event.rows), markup=False, soft_wrap=True)
        elif event.kind in ("look", "answers"):
            self.on_progress(event.stage, event.step, event.total)
        elif event.kind == "metrics":
            self._losses.update({name: event.metrics[name] for name in ("loss", "eval_loss") if name in event.metrics})
        elif event.kind == "samples":
            self._show_answers(event)
        self._rates = event.rates or self._rates
        if event.kind in ("step", "metrics"):
            self.on_progress("training", event.step, event.total, self._note())

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of a stage; without a terminal print a line for every tenth of the way.

        Example of such a line: "training: 40 of 400, 2 min 6 s left, loss 0.71, 9.3 samples/s".
        """
        if self._bars.disable:
            began, first = self._began.setdefault(stage, (time.monotonic(), done))
            tenth = 10 * done // total if total else 10
            if tenth > self._tenths.get(stage, 0):
                self._tenths[stage] = tenth
                parts = [f"{stage}: {done} of {total}"]
                if first < done < total:
                    parts.append(f"{duration((time.monotonic() - began) / (done - first) * (total - done))} left")
                self.console.print(", ".join([*parts, *filter(None, [note])]), markup=False, soft_wrap=True)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, note=note)
        self._bars.update(self._tasks[stage], completed=done, total=total, note=note)

    def say(self, line: str) -> None:
        """Print a line above the bars; what follows is a new chapter with bars of its own."""
        self._tasks.clear()
        self._tenths.clear()
        self._began.clear()
        self._losses.clear()
        self.console.print(line, markup=False, soft_wrap=True)

    def _note(self) -> str:
        names = {"loss": "loss", "eval_loss": "held-out loss"}
        parts = [f"{names[name]} {short_number(value)}" for name, value in self._losses.items()]
        units = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s", "memory_gib": "GiB"}
        units["left_out"] = "steps left out"  # of the loss that stands here, none of them has a part
        return ", ".join([*parts, *(f"{short_number(self._rates[name])} {units[name]}" for name in self._rates)])

    def _show_answers(self, event: TrainingEvent) -> None:
        """Answers to a few held-out rows, one line each."""
        for found in event.answers:
            said, wanted = printable(found["answer"])[:100], printable(found["expected"])[:100]
            line = f"step {event.step}, row {found['row']}: {said!r}" + ("" if said == wanted else f", not {wanted!r}")
            self.console.print(line, markup=False, soft_wrap=True)


def rows_line(rows: RowUse) -> str:
    """What a run trains on: "38 rows to train on, 4 held out; 2 rows are left out (2 missing_value): ..."."""
    line = f"{counted(rows.train, 'row')} to train on, {rows.held_out} held out"
    if rows.not_drawn:
        line += f"; {counted(rows.not_drawn, 'good row')} in no epoch (weights, data.max_rows; phi3v data check RECIPE)"
    if not rows.left_out:
        return line
    reasons = ", ".join(f"{count} {code}" for code, count in rows.reasons.items())
    left_out = f"{counted(rows.left_out, 'row')} {'is' if rows.left_out == 1 else 'are'} left out ({reasons})"
    return f"{line}; {left_out}: problems.jsonl in the run names each, phi3v data check RECIPE says what to do"


def repeated_line(rows: RowUse) -> str:
    """What fills up an epoch: "an epoch is 1 step of 100 samples: 8 rows, and rows once more for the other 92"."""
    steps = counted((rows.train + rows.repeated) // rows.samples_per_step, "step")
    return (
        f"an epoch is {steps} of {counted(rows.samples_per_step, 'sample')} (training.samples_per_step): "
        f"{counted(rows.train, 'row')}, and rows once more for the other {rows.repeated:,}"
    )


def show_trainable(console: Console, report: TrainableReport) -> None:
    """What trains: weights and share per part of the model."""
    table = Table("part", "weights", "trained", "share", title="what trains", title_justify="left", box=None)
    for part, count in report.parts.items():
        share = percent(count.trainable / count.total) if count.total else "–"
        table.add_row(part, short_number(count.total), short_number(count.trainable), share)
    table.add_row(
        "all", short_number(report.total), short_number(report.trainable), percent(report.share), style="bold"
    )
    align(table)
    console.print(table)


def show_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Every metric of the target and of what stands beside it, from `Evaluation.to_dict()`."""
    names, metrics = column_names(evaluation), evaluation["metrics"].values()
    table = Table("", title=rows_about(evaluation, "held-out row"), title_justify="left", box=None)
    for name in names.values():
        table.add_column(Text(name))
    table.add_column("best single answer")
    for one in metrics:
        values = [figure(one[who]["value"], one["unit"]) if one[who] else "–" for who in names]
        constant = "none" if one["constant"] is None else figure(one["constant"], one["unit"])
        table.add_row(Text(row_label(one)), *values, constant)
        table.add_row("  95 % interval", *(ends(one[who], one["unit"]) if one[who] else "–" for who in names))
        if one["metric"] == "absolute_error" and one["field"] is not None:
            fields = [evaluation["scores"][who]["fields"].get(one["field"], {}) for who in names]
            missing = [field.get("not_numbers") for field in fields]
            if None not in missing and f"field_accuracy.{one['field']}" in evaluation["metrics"]:
                table.add_row("  answers without a number at its place", *map(short_number, missing))
        if elsewhere := out_of_form(evaluation, one):
            table.add_row("  value there, answer out of form", *(short_number(elsewhere[who]) for who in names))
    align(table)
    console.print(table)
    compared = [one for one in metrics if one["p"] is not None]
    if compared:
        title = f"{names['tuned']} minus {names['base']}"
        gaps = Table("", "difference", "95 % interval", "p", "won", "lost", title=title, title_justify="left", box=None)
        for one in compared:
            gap, unit = one["difference"], one["unit"]
            told = [
                gain(gap["value"], unit),
                gain_ends(gap, unit),
                p_value(one["p"]),
                str(one["won"]),
                str(one["lost"]),
            ]
            gaps.add_row(Text(row_label(one)), *told)
        align(gaps)
        console.print(gaps)
    kind = evaluation["kind"]
    chosen = ", ".join(dict.fromkeys(one["label"] for one in evaluation["metrics"].values() if one["field"] is None))
    line = f"scored as {kind['name'].replace('_', ' ')} answers ({kind['why']}): {chosen}"
    console.print(line, markup=False, soft_wrap=True)
    for line in evaluation["notes"]:
        console.print(line, markup=False, soft_wrap=True)
    if (line := beside_constant(evaluation)) and "constant" not in evaluation.get("checks", {}):
        console.print(printable(line), markup=False, soft_wrap=True, style="bold red")
    for name, check in evaluation.get("checks", {}).items():
        line = f"check {name}: {check['verdict']}: {printable(check['line'])}"
        console.print(line, markup=False, soft_wrap=True, style="bold red" if check["verdict"] == "fail" else None)
    for line in evaluation["problems"][:5]:
        console.print(f"left out: {printable(line)}", markup=False, soft_wrap=True)
    if len(evaluation["problems"]) > 5:
        console.print(f"left out: {counted(len(evaluation['problems']) - 5, 'more row')}")


def show_run(console: Console, summary: Mapping[str, Any], added: bool = False) -> None:
    """The end of `phi3v train`: the scores, the time, and where things lie.

    Args:
        console: where it is shown.
        summary: what `phi3v train --json` prints.
        added: whether the answers were not there before, of a sweep's best trial for instance.
    """
    if summary["evaluation"]:
        show_evaluation(console, summary["evaluation"])
    steps = counted(summary["steps"], "step")
    left_out, changed = summary.get("left_out", 0), summary["steps"] - summary.get("left_out", 0)
    note = (
        f"; {left_out} of them left out, their loss or gradient being no number (left_out in metrics.jsonl): "
        f"{counted(changed, 'update')} made these weights"
    )
    done = {
        "trained": f"is finished: {steps} in {duration(summary['seconds'])}",
        "resumed": f"went on from step {summary['resumed_from']} and is finished: {steps}",
        "finished": f"was finished before: {steps}; "
        + ("answers and report were added; " if added else "")
        + "give another output to train again",
    }
    line = f"run {summary['folder']} {done[summary['status']]}{note if left_out else ''}"
    console.print(line, markup=False, soft_wrap=True)
    if line := ending(summary):
        console.print(line, markup=False, soft_wrap=True)
    if summary["report"]:
        console.print(f"report: {summary['report']}", markup=False, soft_wrap=True)


def show_demo(console: Console, story: Mapping[str, Any]) -> None:
    """The end of `phi3v demo`: scores, controls, a few answers, where to look and what to try."""
    show_evaluation(console, story["evaluation"])
    table = Table("control", "exact match", "95 % interval", title="controls", title_justify="left", box=None)
    for name, share in story["controls"].items():
        table.add_row(Text(name), percent(share["value"]), interval(share))
    align(table)
    console.print(table)
    for sample in story["samples"]:
        console.print(f"\nrow {sample['row']}: {printable(sample['question'])}", markup=False)
        for name in ("expected", "base", "tuned"):
            console.print(f"  {name:<9}{sample[name]}", markup=False, soft_wrap=True)
    console.print(f"\nreport: {story['report']}", markup=False, soft_wrap=True)
    console.print(f"time: {duration(story['seconds'])}; now ask it yourself:", markup=False)
    console.print(f"  {story['try']}", markup=False, soft_wrap=True)


def align(table: Table) -> None:
    """Names to the left, figures to the right."""
    for column in table.columns[1:]:
        column.justify = "right"
