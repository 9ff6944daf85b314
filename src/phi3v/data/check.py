"""What can be said of a data set before it is trained on: counts, problems and their way out, lengths, prices.

In come the facts and problems of its rows (`survey`); out come plain values that a machine can read and a screen can
show. Opens nothing and counts no token itself. Knows no recipes, models or devices.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from phi3v.data.address_guard import shorten
from phi3v.data.advice import advice
from phi3v.data.duplicates import Duplicates
from phi3v.data.fact_table import digest_array
from phi3v.data.fetch import FetchSummary
from phi3v.data.judging import most_allowed, uncounted
from phi3v.data.mixing import SetUse
from phi3v.data.not_read import NotRead
from phi3v.data.schema import RowProblem
from phi3v.data.survey import RowFacts, address_digest
from phi3v.errors import ImageError
from phi3v.image_tokens import crops_within, num_image_tokens

BARS = 8
"""Bars of a histogram at most."""


@dataclass(frozen=True)
class Spread:
    """How a figure is spread over the rows.

    Example: spread([10, 20, 20, 1000]).bars -> [(0, 199, 3), (200, 399, 0), ..., (1000, 1199, 1)].

    Attributes:
        least: the smallest.
        median: the middle one, rounded down.
        p95: 95 % of the rows have at most so many.
        most: the largest.
        total: the sum.
        bars: (from, to, rows) in steps of a round number, both ends counted in.
    """

    least: int
    median: int
    p95: int
    most: int
    total: int
    bars: list[tuple[int, int, int]]


@dataclass(frozen=True)
class CropPrice:
    """What the images of a set cost at a number of crops.

    Attributes:
        num_crops: most crops of an image.
        max_tokens: the budget of an image that it comes from; None for none.
        square: tokens of any square image, whatever its pixels.
        mean: image tokens of an image on average.
        total: image tokens of all rows.
        longest_row: tokens of the longest row; None where texts were not counted.
        beyond_context: rows longer than the limit; None where texts were not counted.
        chosen: whether this is what the recipe says.
    """

    num_crops: int
    max_tokens: int | None
    square: int
    mean: float
    total: int
    longest_row: int | None
    beyond_context: int | None
    chosen: bool


def spread(values: Sequence[int]) -> Spread | None:
    """How values are spread; None for none.

    The steps are 1, 2 or 5 times a power of ten, the smallest that gives at most `BARS` bars.
    """
    if not values:
        return None
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    step = 1
    while high // step - low // step >= BARS:
        step = _next_step(step)
    counts = Counter(value // step for value in ordered)
    first = low // step
    bars = [(at * step, at * step + step - 1, counts[at]) for at in range(first, high // step + 1)]
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Spread(low, int(median(ordered)), p95, high, sum(ordered), bars)


def _next_step(step: int) -> int:
    """1 -> 2 -> 5 -> 10 -> 20 -> ..."""
    return step * 5 // 2 if str(step)[0] == "2" else step * 2


def length_spreads(facts: Sequence[RowFacts]) -> dict[str, Spread | None]:
    """Spreads of total, image, text and trained tokens of the rows whose length is known."""
    found = {name: array("q") for name in ("total", "image", "text", "trained")}
    for fact in facts:
        if fact.length is not None:
            for name, values in found.items():
                values.append(getattr(fact.length, name))
    return {name: spread(values) for name, values in found.items()}


def crop_prices(
    facts: Sequence[RowFacts], *, num_crops: int | None, max_tokens: int | None = None, context: int | None = None
) -> list[CropPrice]:
    """What the images cost as the recipe says, at 16, 4 and 1 crops, and with a budget of 1,000 tokens an image.

    Args:
        facts: of the rows.
        num_crops: most crops of an image by the recipe and the model; None where nobody says.
        max_tokens: the recipe's budget of an image, told where the number of crops comes from it; None for none.
        context: most tokens of a row.
    Example: one 64x64 photo costs 2509 at 16 crops, 757 at 4, 313 at 1, and 757 with the budget, which allows 5 crops.
    """
    if not any(fact.sizes for fact in facts):
        return []
    wanted = [(16, None), (4, None), (1, None), (crops_within(1000), 1000)]
    if max_tokens is not None and num_crops != crops_within(max_tokens):
        max_tokens = None
    chosen = (num_crops, max_tokens)
    if num_crops is not None and chosen not in wanted:
        wanted.insert(0, (num_crops, max_tokens))
    return [_price(facts, crops, budget, context, (crops, budget) == chosen) for crops, budget in wanted]


def told_of_budget(num_crops: int | None, max_tokens: int | None) -> str | None:
    """Which of a recipe's two limits of an image has no effect; None where one alone is given, or both agree.

    Example: 4 and 1561 -> "image.num_crops: 4 counts: image.max_tokens: 1561 would allow 9".
    """
    within = None if max_tokens is None else crops_within(max_tokens)
    if num_crops is None or within is None or num_crops == within:
        return None
    crops, budget = f"image.num_crops: {num_crops}", f"image.max_tokens: {max_tokens}"
    if num_crops < within:
        return f"{crops} counts: {budget} would allow {within}"
    return f"{budget} counts, which allows {within}: {crops} has no effect"


def _price(
    facts: Sequence[RowFacts], num_crops: int, max_tokens: int | None, context: int | None, chosen: bool
) -> CropPrice:
    """One line of the table of prices."""
    known: dict[tuple[int, int], int] = {}

    def cost(size: tuple[int, int]) -> int:
        if size not in known:
            known[size] = _tokens_or_none(*size, num_crops)
        return known[size]

    images, total, whole = 0, 0, array("q")
    for fact in facts:
        tokens = sum(map(cost, fact.sizes))
        images, total = images + len(fact.sizes), total + tokens
        if fact.length is not None:
            whole.append(tokens + fact.length.text)
    return CropPrice(
        num_crops,
        max_tokens,
        cost((336, 336)),
        total / images,
        total,
        max(whole, default=None),
        sum(length > context for length in whole) if whole and context is not None else None,
        chosen,
    )


def _tokens_or_none(width: int, height: int, num_crops: int) -> int:
    """The price of an image; 0 for one that is too narrow for so few crops, whose row would be left out."""
    try:
        return num_image_tokens(width, height, num_crops)
    except ImageError:
        return 0


@dataclass(frozen=True)
class Images:
    """Images of a set.

    Attributes:
        count: distinct contents; addresses, for those that are still to be downloaded.
        from_web: images that come from web addresses, each once.
        not_cached: those of them that are not in the cache, as messages call them: without their queries.
        beyond: further addresses that are not in the cache and are downloaded too, of rows that `data.max_rows` or
            weights leave out.
    """

    count: int
    from_web: int
    not_cached: list[str]
    beyond: int = 0

    @classmethod
    def of(cls, facts: Sequence[RowFacts], not_cached: Sequence[str]) -> Images:
        """From the facts of rows, and all addresses of their sets that are not in the cache.

        Example: 2 rows of 3, and the addresses of the second and third are not cached -> from_web=2, not_cached=[the
        second], beyond=1.
        """
        named = {address for fact in facts for address in fact.web} if not_cached else set()
        here = [shorten(url) for url in not_cached if address_digest(url) in named]
        return cls(count_images(facts), count_addresses(facts), here, len(not_cached) - len(here))


@dataclass(frozen=True)
class FetchedPart:
    """What the download of one part of the images gave.

    Attributes:
        shard: (i, n): the i-th of n parts, from 0.
        total: addresses of this part.
        cached: those that were in the cache before.
        downloaded: those that came now.
        failures: the others, each with url, reason_code, message and fix.
        trouble: why too few came, by the limit for rows; None when enough did.
    """

    shard: tuple[int, int]
    total: int
    cached: int
    downloaded: int
    failures: list[dict[str, str]]
    trouble: str | None

    @classmethod
    def of(
        cls, shard: tuple[int, int], found: FetchSummary | None, *, max_skipped: float, on_problem: str
    ) -> FetchedPart:
        """From what `fetch_images` says of all addresses of the part; None where there are none.

        Example: 40 addresses, 30 of which were cached and 3 fail, max_skipped 0.05 -> trouble "part 0/2: 3 of 40 images
        did not come, and 5 % may be missing (data.max_skipped, data.on_problem)".
        """
        if found is None:
            return cls(shard, 0, 0, 0, [], None)
        failures = [
            {"url": shorten(url), **asdict(why), "fix": advice(why.reason_code, why.message)}
            for url, why in found.failures.items()
        ]
        allowed = 0.0 if on_problem == "stop" else max_skipped
        trouble = None
        if len(failures) > most_allowed(allowed, found.total):
            trouble = (
                f"part {shard[0]}/{shard[1]}: {len(failures)} of {found.total} images did not come, and "
                f"{100 * allowed:.3g} % may be missing (data.max_skipped, data.on_problem)"
            )
        return cls(shard, found.total, found.cached, found.downloaded, failures, trouble)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `phi3v data check` knows. `rows` is `usable` and the rows of `problems` together.

    Attributes:
        source: the set.
        rows: rows read, train and validation.
        usable: rows that can be used.
        train: training rows of an epoch.
        validation: rows held out.
        origin: where they come from, see `LoadedData`.
        problems: rows that are left out, each with its source, number, reason code, message and way out.
        reasons: reason code -> rows, the most frequent first.
        max_skipped: share of rows that may be left out.
        on_problem: "skip", or "stop" for none.
        trouble: why `phi3v train` would refuse the rows, in one line; None when it would not.
        part: what the download of one part of the images gave; None where all were asked for, or none.
        sampled: whether these are the first rows of a stream, and not all.
        decoded: whether every image was decoded, or headers were taken for enough.
        images: how many, and which are still to be downloaded.
        model: whose tokens were counted; None where no model was named, and then there are no lengths.
        num_crops: most crops of an image.
        lengths: "total", "image", "text", "trained" -> how they are spread over the rows.
        context: the longest row that the model takes, in tokens; None where no model was named.
        limit: the longest row that is allowed, in tokens: `data.max_length` or `context`, whichever is less.
        beyond_context: rows that are longer than the limit, those among them that are made to fit.
        on_too_long: what is done about them, see `fit`; those that still do not fit are among the problems.
        rope_limit: rows beyond it are read with the model's long factors.
        beyond_rope: rows that are longer than that.
        duplicates: rows and images that are there more than once.
        crops: what images cost at other numbers of crops.
        crops_told: which of `image.num_crops` and `image.max_tokens` has no effect, in one line; None for neither.
        not_read: files, folders and splits of the set that are not read, each with its reason, see `not_read.NotRead`.
        sets: what an epoch holds of each set of training rows, by headers, see `mixing.SetUse`; none for a stream.
        outlook: steps and time of a run, see `training.outlook`; None where no recipe was given.
    """

    source: str
    rows: int
    usable: int
    train: int
    validation: int
    origin: str
    problems: list[dict[str, Any]]
    reasons: dict[str, int]
    max_skipped: float
    on_problem: str
    trouble: str | None
    sampled: bool
    decoded: bool
    images: Images
    model: str | None
    num_crops: int | None
    lengths: dict[str, Spread | None]
    context: int | None
    limit: int | None
    beyond_context: int
    on_too_long: str
    rope_limit: int | None
    beyond_rope: int
    duplicates: Duplicates
    crops: list[CropPrice]
    crops_told: str | None = None
    sets: Sequence[SetUse] = ()
    not_read: Sequence[NotRead] = ()
    outlook: dict[str, Any] | None = None
    part: FetchedPart | None = None

    @property
    def skipped_share(self) -> float:
        """Rows that are left out and count, see `judging`, over rows read: 2 of 40 -> 0.05."""
        return (len(self.problems) - self.uncounted) / self.rows if self.rows else 0.0

    @property
    def uncounted(self) -> int:
        """Rows of a stream that are left out for a held-out image, which no limit counts."""
        return uncounted(self.reasons, streamed=self.sampled)

    @property
    def passed(self) -> bool:
        """Whether `phi3v train` would take the set as it is, and enough of a part's downloads came."""
        return self.trouble is None and (self.part is None or self.part.trouble is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "skipped_share": self.skipped_share, "passed": self.passed}


def listed(problems: Sequence[RowProblem]) -> list[dict[str, Any]]:
    """Problems as plain values with the way out.

    Example: [{"source": "shop.csv", "row": 3, "reason_code": "missing_value", "message": "column 'title' is empty",
    "fix": "fill the cell, or take the column out of the template"}].
    """
    return [{**asdict(problem), "fix": advice(problem.reason_code, problem.message)} for problem in problems]


def count_reasons(problems: Sequence[RowProblem]) -> dict[str, int]:
    """Reason code -> rows, the most frequent first."""
    return dict(Counter(problem.reason_code for problem in problems).most_common())


def count_images(facts: Sequence[RowFacts]) -> int:
    """Distinct contents of images: the same picture under two names is one."""
    return len(np.unique(digest_array(image for fact in facts for image in fact.images)))


def count_addresses(facts: Sequence[RowFacts]) -> int:
    """Distinct web addresses of images."""
    return len(np.unique(digest_array(address for fact in facts for address in fact.web)))


def rows_beyond(facts: Sequence[RowFacts], tokens: int | None) -> int:
    """Rows that are longer than so many tokens; 0 where there is no limit."""
    return sum(fact.length is not None and tokens is not None and fact.length.total > tokens for fact in facts)
