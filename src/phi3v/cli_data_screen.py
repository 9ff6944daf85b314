"""What a person sees of a checked data set: counts, problems, lengths, prices, steps. Draws with rich, decides nothing.

Text of a data set is printed as it is, never read as markup, and control characters in it are made visible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from phi3v.cli_screen import align
from phi3v.evaluation.figures import counted, duration, percent, short_number

if TYPE_CHECKING:
    from phi3v.data.check import Report
    from phi3v.data.not_read import NotRead
    from phi3v.data.show import ShownRow

SHOWN_PROBLEMS = 3
"""Rows of each reason that are printed one by one; `--json` has all."""
ALL_PROBLEMS = 20
"""So many rows that are left out are all printed."""

_STYLES = {"system": "magenta", "user": "blue", "assistant": "green", "control": "dim", "image": "cyan"}

_BAR = 30  # characters of the longest bar


def show_check(console: Console, report: Report) -> None:
    """The whole report."""
    _say(console, headline(report), style="bold")
    for line in [*set_lines(report), *not_read_lines(report)]:
        _say(console, line)
    _say(console, image_line(report))
    for line in part_lines(report):
        _say(console, line)
    _show_problems(console, report)
    for line in duplicate_lines(report):
        _say(console, line)
    _show_lengths(console, report)
    _show_prices(console, report)
    for line in outlook_lines(report):
        _say(console, line)
    _say(console, verdict(report), style="bold")


def headline(report: Report) -> str:
    """The counts: "shop.csv: 40 rows, 38 usable: 34 to train on, 4 held out (split off)"."""
    origins = {"split": "split off", "validation": "a set of their own", "none": ""}
    held_out = (
        f", {report.validation} held out ({origins.get(report.origin, report.origin)})" if report.validation else ""
    )
    used = f"{report.train} to train on{held_out or ', none held out'}"
    first = "the first " if report.sampled else ""
    stream = " of a stream" if report.sampled else ""
    return f"{report.source}: {first}{counted(report.rows, 'row')}{stream}, {report.usable} usable: {used}"


def set_lines(report: Report) -> Iterator[str]:
    """What an epoch holds of each set, where that is not every row once.

    Example: "w1.jsonl: 60 of its 100 rows in an epoch, 40 left out (weights, data.max_rows)" and "w2.jsonl: all of its
    20 rows in an epoch, 60 with those that come again".
    """
    if all(0 < one.epoch == one.rows and not one.left_out for one in report.sets):
        return
    for one in report.sets:
        if not one.rows:
            yield f"{one.source}: no row to train on"
            continue
        different = one.rows - one.left_out
        held = "all" if not one.left_out else short_number(different)
        line = f"{one.source}: {held} of its {counted(one.rows, 'row')} in an epoch"
        line += f", {short_number(one.epoch)} with those that come again" if one.epoch > different else ""
        yield line + (f", {short_number(one.left_out)} left out (weights, data.max_rows)" if one.left_out else "")


def not_read_lines(report: Report) -> Iterator[str]:
    """Files of the set that are not read: how many for each reason, and the first ones.

    Example: "2 not read, its name tells no split, and the names of others do: more.csv, old.csv".
    """
    reasons: dict[str, list[NotRead]] = {}
    for one in report.not_read:
        reasons.setdefault(one.reason, []).append(one)
    for reason, found in reasons.items():
        number = sum(one.files for one in found)
        more = number - sum(one.files for one in found[:SHOWN_PROBLEMS])
        named = ", ".join(one.file for one in found[:SHOWN_PROBLEMS]) + (f" and {more} more" if more else "")
        yield f"not read, {reason}: {named}" if number == 1 else f"{number} not read, {reason}: {named}"


def image_line(report: Report) -> str:
    """Images, and how closely they were looked at; of a row that waits for a download none is opened.

    Example: "0 images of different content, each decoded; 5 from the web, 0 in the cache, 5 not yet (--fetch downloads
    them)".
    """
    images = report.images
    missing = len(images.not_cached)
    looked = "each decoded" if report.decoded else "headers read, none decoded"
    if missing and report.decoded:
        looked = "decoded where nothing of the row is still to be downloaded"
    if report.part is not None:
        number, count = report.part.shard
        looked = f"those of part {number}/{count} {'decoded' if report.decoded else 'by their headers'}"
    line = f"{counted(images.count - missing, 'image')} of different content, {looked}"
    if images.from_web:
        line += f"; {images.from_web} from the web, {images.from_web - missing} in the cache, {missing} not yet"
        line += " (--fetch downloads them)" if missing else ""
    if images.beyond:
        line += f"; --fetch downloads {images.beyond} more, of rows that data.max_rows or weights leave out"
    return line


def part_lines(report: Report) -> Iterator[str]:
    """What came of the images of one part, and each address that did not."""
    part = report.part
    if part is None:
        return
    number, count = part.shard
    before = f"{part.cached} in the cache before, " if part.cached else ""
    came = f"{before}{part.downloaded} came, {len(part.failures)} did not"
    yield f"part {number}/{count}: {counted(part.total, 'image')}, {came}"
    for failure in part.failures:
        yield f"  {failure['reason_code']}: {failure['message']}"
    yield "lengths, prices and repeated rows are those of this part; without --shard all rows are looked at"


def _show_problems(console: Console, report: Report) -> None:
    """The reasons with their counts and ways out, then the rows one by one; of many the first of each reason."""
    if not report.problems:
        return
    ways = Counter((problem["reason_code"], problem["fix"]) for problem in report.problems)
    table = Table("rows", "reason", "what to do", title="left out", title_justify="left", box=None)
    for (code, fix), count in ways.most_common():
        table.add_row(str(count), Text(code), Text(fix))
    console.print(table)
    shown = None if len(report.problems) <= ALL_PROBLEMS else SHOWN_PROBLEMS
    for code, count in report.reasons.items():
        named = [problem for problem in report.problems if problem["reason_code"] == code][:shown]
        for problem in named:
            _say(console, f"  {problem['source']}, row {problem['row']}: {problem['message']}")
        if count > len(named):
            _say(console, f"  and {counted(count - len(named), 'more row')} with {code}; --json names all of them")


def duplicate_lines(report: Report) -> Iterator[str]:
    """What is there twice, with the first places."""
    found = report.duplicates
    counts = {
        "held-out row is in the training rows as well, so its score says nothing": found.rows_in_both,
        "held-out row has an image of a training row, so its score says little": found.images_in_both
        - found.rows_in_both,
        "held-out row repeats another": found.rows_in_validation,
        "training row repeats another": found.rows_in_train,
        "training row has the images of another": found.images_in_train - found.rows_in_train,
    }
    several = {"row is": "rows are", "its score says": "their scores say", "row has": "rows have"}
    several |= {"row repeats": "rows repeat"}
    for words, count in counts.items():
        if count > 0:
            for one, many in several.items() if count > 1 else ():
                words = words.replace(one, many)
            yield f"{count} {words}"
    for kind, places in found.examples[:5]:
        named = ", ".join(f"{source} row {row}" for source, row in places[:4])
        yield f"  the same {kind}: {named}" + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _show_lengths(console: Console, report: Report) -> None:
    """The spreads as a table, and the total as a histogram."""
    if report.model is None:
        _say(console, "tokens of texts are not counted: no model is named (model=microsoft/Phi-3.5-vision-instruct)")
        return
    if report.lengths["total"] is None:
        why = "no row can be used" if not report.usable else "the images are not here yet (--fetch downloads them)"
        _say(console, f"length of a row: not known, {why}")
        return
    table = Table("tokens", title="length of a row", title_justify="left", box=None)
    for name in ("least", "median", "95 % below", "most", "all rows"):
        table.add_column(name)
    for name, found in report.lengths.items():
        if found is not None:
            figures = (found.least, found.median, found.p95, found.most, found.total)
            table.add_row({"total": "all"}.get(name, name), *map(short_number, figures))
    align(table)
    _print_whole(console, table)
    for name in ("image", "text", "trained"):
        if (found := report.lengths[name]) is not None and len(found.bars) > 1:
            _show_bars(console, f"{name} tokens", found.bars)
    limits = [f"{report.beyond_rope} beyond the {short_number(report.rope_limit)} that the short rope factors reach"]
    made_to_fit = report.beyond_context - report.reasons.get("too_long", 0)
    how = f" ({made_to_fit} made to fit: {report.on_too_long})" if made_to_fit else ""
    limits += [f"{report.beyond_context} beyond the limit of {short_number(report.limit)}{how}"]
    _say(console, f"rows {', '.join(limits)}")


def _show_bars(console: Console, name: str, bars: Sequence[tuple[int, int, int]]) -> None:
    """A histogram with a bar for each range."""
    table = Table(name, "rows", "", box=None)
    most = max(count for _, _, count in bars)
    for low, high, count in bars:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        table.add_row(f"{low:,} to {high:,}" if high > low else f"{low:,}", str(count), bar)
    table.columns[0].justify = table.columns[1].justify = "right"
    console.print(table)


def _show_prices(console: Console, report: Report) -> None:
    """What images cost at other numbers of crops."""
    if not report.crops:
        return
    table = Table("num_crops", "max_tokens", "square image", "mean", "all rows", title="what images cost", box=None)
    counted_texts = report.crops[0].longest_row is not None
    if counted_texts:
        table.add_column("longest row")
        table.add_column("too long")
    table.title_justify = "left"
    for price in report.crops:
        cells = [short_number(value) for value in (price.square, round(price.mean), price.total)]
        if counted_texts:
            cells += [short_number(price.longest_row), str(price.beyond_context)]
        name = f"{price.num_crops} (chosen)" if price.chosen else str(price.num_crops)
        table.add_row(name, short_number(price.max_tokens), *cells, style="bold" if price.chosen else "")
    align(table)
    _print_whole(console, table)
    if report.crops_told is not None:
        _say(console, report.crops_told)
    _say(console, "the grid of crops decides, not the pixels: a square image costs the same at 64x64 and at 2000x2000")


def outlook_lines(report: Report) -> Iterator[str]:
    """Steps, arithmetic and time, and what they rest on."""
    found: dict[str, Any] | None = report.outlook
    if found is None:
        return
    from phi3v.training.outlook import STATED_RATE

    samples = counted(found["samples_per_step"], "sample")
    if found["steps_per_epoch"] is None:
        yield f"steps: {found['steps']} of {samples} in all"
    else:
        yield f"steps: {counted(found['steps_per_epoch'], 'step')} of {samples} an epoch, {found['steps']} in all"
    if found["operations"] is None:
        return
    how = "packed" if found["packed"] else "padded"
    mean, largest = short_number(found["micro_batches"]), short_number(found["largest"])
    yield f"micro-batches: {mean} a step, {how}, of at most {largest} tokens"
    work = f"{short_number(found['tokens'])} tokens, {found['operations']:.2g} floating-point operations"
    stated = found["operations"] / STATED_RATE
    at_that_rate = f": {duration(stated)} at {STATED_RATE / 1e12:.0f} TFLOP/s" if stated >= 60 else ""
    yield f"work: {work}, counted from the model's sizes{at_that_rate}"
    if found["rate"] is not None:
        told = "may be faster or slower" if found["machine"].startswith("CPU") else "reaches a part of that"
        yield (
            f"time: about {duration(found['operations'] / found['rate'])} here, an estimate: {found['machine']} "
            f"multiplies matrices at {found['rate'] / 1e12:.3g} TFLOP/s, measured just now; training {told}"
        )


def verdict(report: Report) -> str:
    """The last line: whether `phi3v train` would take it."""
    share = f"{percent(report.skipped_share)} of the rows are left out"
    if report.uncounted:
        share = (
            f"{share} beside {counted(report.uncounted, 'row')} with a held-out image, which a stream does not count"
        )
    if report.trouble is not None:
        return f"{share}; phi3v train refuses them: {report.trouble}"
    if report.part is not None and report.part.trouble is not None:
        return report.part.trouble
    return "no row is left out" if not report.problems else f"{share}, {percent(report.max_skipped)} may be"


def show_rows(console: Console, rows: Sequence[ShownRow]) -> None:
    """Rows token by token: coloured by role, what is trained between ⟦ and ⟧."""
    legend = Text.assemble(*((f"{role} ", style) for role, style in _STYLES.items()), "⟦trained⟧")
    console.print(legend)
    for row in rows:
        console.print()
        _say(console, f"{row.source}, row {row.row}", style="bold")
        if row.problem is not None:
            _say(console, f"  left out: {row.problem}")
            continue
        for image in row.images:
            size = f"{image.width}x{image.height} pixels, {image.rows} x {image.columns} crops"
            _say(console, f"  {image.name}: {size}, {short_number(image.tokens)} tokens")
        images, trained = row.count(role="image"), row.count(trained=True)
        _say(console, f"  {short_number(row.count())} tokens, {short_number(images)} for images, {trained} trained")
        console.print(token_text(row), soft_wrap=True)


def token_text(row: ShownRow) -> Text:
    """The tokens of a row as coloured text, a line for each newline in it.

    Example: "<s><|user|> ↵", "Hi?<|end|> ↵", "<|assistant|>⟦ Hi<|end|> ↵", "<|endoftext|>⟧".
    """
    from phi3v.data.show_page import visible

    text, trained = Text(), False
    for token in row.tokens:
        if token.trained != trained:
            text.append("⟦" if token.trained else "⟧")
            trained = token.trained
        piece = visible(token.text)
        text.append(piece, style=_STYLES[token.role] + (" underline" if token.trained else ""))
        if piece == "↵":
            text.append("\n")
    return text.append("⟧") if trained else text


def _print_whole(console: Console, table: Table) -> None:
    """A table of figures, none of them cut: where the screen is too narrow, its lines go over the edge."""
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, crop=False)


def _say(console: Console, line: str, style: str = "") -> None:
    """A line as it is; what would steer a terminal is shown as an escape."""
    safe = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    console.print(Text(safe, style=style), soft_wrap=True)
