"""Intervals that hold what they promise, and p values that are those of the tests they are named after."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from phi3v.evaluation.constant import constant_columns
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.headline import in_words
from phi3v.evaluation.intervals import _resampled_sums, bootstrap_intervals, estimate, mean, newcombe_interval
from phi3v.evaluation.kinds import choose_scoring
from phi3v.evaluation.metric_table import metric_table, remarks
from phi3v.evaluation.paired import FEW_ROWS, mcnemar_p, paired_test, rows_to_show, sign_flip_p
from phi3v.evaluation.row_scores import Column, score_rows
from phi3v.evaluation.shares import wilson_interval


def column(values, metric="exact_match", weights=None) -> Column:
    return Column(
        metric, None, np.array(values, np.float64), None if weights is None else np.array(weights, np.float64)
    )


def interval(values, metric="exact_match", weights=None, seed=0):
    return estimate([column(values, metric, weights)], seed=seed)[0][0]


def test_resampled_sums_are_sums_over_drawn_rows():
    numbers, random = np.array([[1.0, 5.0], [10.0, 0.0], [100.0, 1.0]]), np.random.default_rng(3)
    drawn = np.random.default_rng(3).integers(0, 3, (40, 3), dtype=np.int32)
    np.testing.assert_array_equal(_resampled_sums(numbers, 40, random), numbers[drawn].sum(axis=1))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_bootstrap_is_the_known_one(weighted):
    """scipy's BCa with other draws, 20,000 of them: ends agree to a twentieth of the interval; and the studentized one
    by the book, without what widens spreads by half a row's, which is more than that wider where rows are few."""
    bootstrap = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn").bootstrap
    random = np.random.default_rng(1)
    values, weights = random.lognormal(0, 1, 60), random.integers(1, 30, 60).astype(float)
    weights = weights if weighted else np.ones(60)
    ((mine, other),) = bootstrap_intervals([(values * weights, weights)])
    options = {"paired": True, "n_resamples": 20_000, "method": "BCa", "vectorized": True}
    known = bootstrap((values * weights, weights), lambda a, b, axis: a.sum(axis) / b.sum(axis), **options, rng=0)
    low, high = known.confidence_interval
    assert abs(mine - low) < 0.05 * (high - low) and abs(other - high) < 0.05 * (high - low)
    found = interval(values, "loss", weights)
    assert found.interval == "studentized"
    assert found.value == pytest.approx((values * weights).sum() / weights.sum())
    assert found.high - found.value > 1.2 * (found.value - found.low)  # skewed as the errors are
    drawn = np.random.default_rng(7).integers(0, 60, (20_000, 60))
    tops, below = (values * weights)[drawn], weights[drawn]
    ratios = tops.sum(1) / below.sum(1)
    errors = np.sqrt(((tops - ratios[:, None] * below) ** 2).sum(1)) / below.sum(1)
    error = math.sqrt(((values - found.value) ** 2 * weights**2).sum()) / weights.sum()
    far, near = found.value - error * np.quantile((ratios - found.value) / errors, (0.975, 0.025))
    assert abs(found.low - far) < 0.05 * (near - far) and abs(found.high - near) < 0.08 * (near - far)


COVERED = {  # what rows are drawn from -> the true mean, rows, the least share of intervals that hold it
    "half": (0.5, 60, 0.92, "exact_match", lambda random, n: random.random(n) < 0.5),
    "almost all": (0.97, 150, 0.92, "exact_match", lambda random, n: random.random(n) < 0.97),
    "mostly right": (0.975, 80, 0.92, "anls", lambda random, n: np.where(random.random(n) < 0.95, 1, random.random(n))),
    "errors": (math.exp(0.5), 100, 0.91, "absolute_error", lambda random, n: random.lognormal(0, 1, n)),
    "few errors": (math.exp(0.5), 12, 0.84, "absolute_error", lambda random, n: random.lognormal(0, 1, n)),
    "some errors": (1.0, 8, 0.91, "absolute_error", lambda random, n: random.exponential(1, n)),
}


@pytest.mark.parametrize("name", COVERED)
def test_19_of_20_intervals_hold_the_truth(name):
    """Of 200 samples: two standard errors of 95 % are 3 points. For errors as skewed as these 100 rows are few."""
    truth, rows, least, metric, draw = COVERED[name]
    random, held = np.random.default_rng(5), 0
    for _ in range(200):
        found = interval(draw(random, rows), metric)
        held += found.low <= truth <= found.high
    assert least <= held / 200


def test_rows_about_one_photo_are_no_news():
    """Each row ten times over, as rows of one group: every figure is that of the rows once; without groups none is."""
    random = np.random.default_rng(8)
    right, errors = random.random((2, 30)) < 0.6, random.lognormal(0, 1, (2, 30))
    right[:, :3] = right[:, 3:4]
    for values, metric in (
        (right, "exact_match"),
        (right | True, "anls"),
        (random.random((2, 30)), "anls"),
        (errors, "absolute_error"),
    ):
        once = [column(one, metric) for one in values]
        alone = [replace(one, groups=np.arange(30) * 2) for one in once]
        often = [column(np.repeat(one, 10), metric) for one in values]
        together = [replace(one, groups=np.repeat(np.arange(30), 10)) for one in often]
        figures = [estimate([one], [(one, other)]) for one, other in (once, alone, together, often)]
        assert figures[0] == figures[1], "groups of one row change nothing"
        for found in (0, 1):
            (mine,), (wanted,), (naive,) = (figures[place][found] for place in (2, 0, 3))
            assert mine.rows == 300 and mine.interval == wanted.interval
            assert (mine.value, mine.low, mine.high) == pytest.approx((wanted.value, wanted.low, wanted.high), abs=1e-9)
            assert naive.high - naive.low < 0.6 * (mine.high - mine.low)
        tests = [paired_test(*one) for one in (once, alone, together)]
        assert tests[0] == tests[1] and tests[2].p == pytest.approx(tests[0].p, abs=1e-12)
        assert (tests[2].won, tests[2].lost) == (10 * tests[0].won, 10 * tests[0].lost)


def test_rows_of_a_photo_that_are_alike_by_more_than_chance():
    """20 photos with 10 questions each, which a model gets mostly right or mostly wrong: drawn by rows 3 in 5 hold."""
    random, held, naive, alarms = np.random.default_rng(9), 0, 0, 0
    groups = np.repeat(np.arange(20), 10)
    for _ in range(60):
        one, other = (
            replace(column(random.random(200) < np.repeat(random.beta(0.5, 0.5, 20), 10)), groups=groups) for _ in "ab"
        )
        found, rows = estimate([one])[0][0], estimate([replace(one, groups=None)])[0][0]
        held, naive = held + (found.low <= 0.5 <= found.high), naive + (rows.low <= 0.5 <= rows.high)
        alarms += paired_test(one, other).p < 0.05
    assert held >= 0.88 * 60 and naive <= 0.75 * 60 and alarms <= 0.15 * 60


def test_few_photos_are_told_as_few():
    """All right: of 20 photos as of 20 rows; of 100 about one photo and 9 about others not even as of 10."""
    one = replace(column([1] * 200), groups=np.repeat(np.arange(20), 10))
    assert estimate([one])[0][0].low == pytest.approx(wilson_interval(20, 20)[0])
    uneven = replace(column([1] * 109), groups=np.maximum(np.arange(109) - 99, 0))
    assert estimate([uneven])[0][0].low == pytest.approx(wilson_interval(1.187, 1.187)[0], abs=1e-3)
    only = replace(column([1, 0] * 20), groups=np.zeros(40, int))
    assert estimate([only])[0][0].high - estimate([only])[0][0].low > 0.85


def test_19_of_20_intervals_hold_the_difference():
    """Two models that agree on most rows: 90 % and 80 % right, and 97 % and 97 %."""
    random = np.random.default_rng(6)
    for first, second, rows in ((0.9, 0.8, 100), (0.97, 0.97, 100)):
        held = 0
        for _ in range(200):
            luck = random.random(rows)
            other = np.where(random.random(rows) < 0.5, luck, random.random(rows))
            gap = estimate([], [(column(luck < first), column(other < second))])[1][0]
            held += gap.low <= first - second <= gap.high
        assert held / 200 >= 0.92, (first, second)


@pytest.mark.parametrize(
    ("values", "metric", "found"),
    [  # value, low, high, interval, rows
        ([1] * 200, "exact_match", (1.0, 0.9812, 1.0, "wilson", 200)),
        ([0] * 200, "exact_match", (0.0, 0.0, 0.0188, "wilson", 200)),
        ([1] * 191 + [0] * 9, "exact_match", (0.955, 0.9167, 0.9761, "wilson", 200)),
        ([1] * 50 + [0] * 50, "exact_match", (0.5, 0.4, 0.6, "bca", 100)),
        ([1] * 198 + [0.5] * 2, "anls", (0.995, 0.9722, 0.9991, "wilson", 200)),
        ([1, math.nan, 1], "anls", (1.0, 0.3424, 1.0, "wilson", 2)),
        ([0] * 30, "absolute_error", (0.0, None, None, None, 30)),  # how large an error could be is not known
        ([3], "absolute_error", (3.0, None, None, None, 1)),
        ([0, 1], "absolute_error", (0.5, None, None, None, 2)),  # 0 to 1 would be a guess
        ([math.nan] * 3, "absolute_error", (None, None, None, None, 0)),
        ([], "exact_match", (None, None, None, None, 0)),
    ],
)
def test_intervals_where_there_is_little_to_resample(values, metric, found):
    one = interval(values, metric)
    assert (one.interval, one.rows) == found[3:]
    for mine, wanted in zip((one.value, one.low, one.high), found[:3], strict=True):
        assert mine == (None if wanted is None else pytest.approx(wanted, abs=5e-4))


def test_loss_per_token_weighs_rows_by_their_tokens():
    one = column([1.0, 2.0, math.nan], "loss", [30, 10, 0])
    assert mean(one) == pytest.approx(1.25) and mean(column([math.nan], "loss", [0])) is None


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (97, 3, 0, 0), (50, 5, 2, 43), (0, 191, 0, 9), (90, 4, 4, 2)])
def test_newcombe_by_the_counts_of_a_table(table):
    """Newcombe 1998 (paired data), method 10, with both right, first alone, second alone, none right."""
    both, first, second, none = table
    count, a, b = sum(table), both + first, both + second
    (l1, u1), (l2, u2) = (wilson_interval(hits, count) for hits in (a, b))
    product = a * (count - a) * b * (count - b)
    gap = both * none - first * second
    phi = (max(gap - count / 2, 0) if gap > 0 else gap) / math.sqrt(product) if product else 0.0
    p1, p2 = a / count, b / count
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    ones = np.repeat([1.0, 1.0, 0.0, 0.0], table)
    others = np.repeat([1.0, 0.0, 1.0, 0.0], table)
    found = newcombe_interval(ones, others)
    assert found == pytest.approx((low, high))
    assert newcombe_interval(others, ones) == pytest.approx((-high, -low))
    if table == (36, 12, 2, 0):
        assert found == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_the_same_rows_give_the_same_figures_whatever_stands_beside_them():
    random = np.random.default_rng(0)
    one, other = column(random.random(50), "anls"), column(random.random(50), "anls")
    together = estimate([one, other], [(one, other)])
    assert together[0][0] == estimate([one])[0][0] and together[1][0] == estimate([], [(one, other)])[1][0]
    assert estimate([one]) == estimate([one]) and estimate([one], seed=1) != estimate([one])


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [  # scipy.stats.binomtest(won, won + lost).pvalue
        (0, 0, 1.0),
        (1, 0, 1.0),
        (2, 0, 0.5),
        (5, 5, 1.0),
        (9, 1, 0.021484375),
        (1, 9, 0.021484375),
        (30, 14, 0.022628841),
        (191, 0, 6.372367e-58),
        (50_000, 49_000, 0.001498083),
    ],
)
def test_mcnemar(won, lost, p):
    assert mcnemar_p(won, lost) == pytest.approx(p, rel=1e-6)


def all_flips(differences) -> float:
    total = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(one >= total - 1e-9 for one in sums) / len(sums)


@pytest.mark.parametrize("differences", [[0.5, 0.2], [1], [3, -1, 2, 2], [0.1] * 6 + [-0.1], [1, -1], [0.3, -0.7]])
def test_few_rows_are_flipped_in_every_way(differences):
    assert sign_flip_p(np.array([*differences, 0.0])) == pytest.approx(all_flips(differences))


def test_many_rows_are_flipped_at_random():
    """16 rows, 65,536 ways: 9,999 random ones come within three standard errors; zeros change nothing."""
    differences = np.random.default_rng(2).normal(0.4, 1, FEW_ROWS + 3)
    exact, found = all_flips(list(differences)), sign_flip_p(differences)
    assert 0.02 < exact < 0.5 and abs(found - exact) < 3 * math.sqrt(exact * (1 - exact) / 9999)
    assert found == sign_flip_p(np.concatenate([differences, np.zeros(100)])) != exact
    assert sign_flip_p(np.ones(50)) == 1 / 10_000 and sign_flip_p(np.zeros(5)) == 1.0


def test_a_test_between_equals_finds_something_once_in_20_times():
    random = np.random.default_rng(4)
    found = [sign_flip_p(random.normal(0, 1, 30)) for _ in range(400)]
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.085


def test_which_test_and_who_won():
    right = paired_test(column([1, 1, 1, 0, math.nan]), column([0, 0, 1, 0, 1]))
    assert vars(right) == {"p": 0.5, "test": "mcnemar", "won": 2, "lost": 0, "tied": 2}
    likeness = paired_test(column([1, 0.5, 0], "anls"), column([0.5, 0, 1], "anls"))
    assert vars(likeness) == {"p": 1.0, "test": "sign_flip", "won": 2, "lost": 1, "tied": 0}
    error = paired_test(column([1, 0], "absolute_error"), column([3, 0], "absolute_error"))
    assert (error.test, error.won, error.lost, error.tied) == ("sign_flip", 1, 0, 1)  # a smaller error wins
    photo = [replace(column(one), groups=np.array([0, 0, 1])) for one in ([1, 1, 1], [0, 0, 0])]
    assert vars(paired_test(*photo)) == {"p": 0.5, "test": "sign_flip", "won": 3, "lost": 0, "tied": 0}
    nothing = paired_test(column([math.nan]), column([1]))
    assert vars(nothing) == {"p": None, "test": "mcnemar", "won": 0, "lost": 0, "tied": 0}


def test_the_table_of_metrics():
    template = AnswerTemplate("a: {a}, n: {n}")
    expected = [f"a: {'xyz'[i % 3]}, n: {i}" for i in range(40)]
    tuned = [*expected[:30], *[text + "1" for text in expected[30:]]]
    base, asked = ["nonsense"] * 40, ["?"] * 40
    scoring = choose_scoring(expected, asked, template)
    ours, theirs = (score_rows(scoring, expected, one, asked, [4.0] * 40, [2] * 40) for one in (tuned, base))
    table = metric_table(ours, theirs, constant_columns(scoring, expected, asked))
    json.dumps(table, allow_nan=False)
    exact = table["exact_match"]
    assert exact["tuned"]["value"] == exact["difference"]["value"] == 0.75 and exact["base"]["value"] == 0
    assert (exact["won"], exact["lost"], exact["tied"], exact["test"]) == (30, 0, 10, "mcnemar") and exact["p"] < 1e-8
    assert exact["constant"] == 1 / 40 and table["field_accuracy.a"]["constant"] == 14 / 40
    error = table["absolute_error.n"]
    assert error["tuned"]["rows"] == 40 and error["base"]["value"] is None and error["p"] is None
    assert error["constant"] == 10 and error["unit"] == "number" and error["better"] == "lower"
    assert table["loss"]["tuned"] == {"value": 2.0, "low": None, "high": None, "interval": None, "rows": 40}
    assert table["well_formed"]["constant"] is table["well_formed"]["over_constant"] is None
    above = exact["over_constant"]
    assert above["difference"]["value"] == 0.75 - 1 / 40 and (above["won"], above["lost"]) == (29, 0)
    assert above["p"] < 1e-6 and above["test"] == "mcnemar"
    assert remarks(table, {"rows": 40, "different": 40}) == []
    assert remarks(table, {"rows": 40, "different": 4})[0] == (
        "rows about the same photo are taken together in intervals and tests"
    )
    alone = metric_table(ours, None, {})
    assert alone["exact_match"]["base"] is alone["exact_match"]["difference"] is alone["exact_match"]["p"] is None
    assert alone["exact_match"]["tuned"] == exact["tuned"]


def test_what_figures_need_to_be_read_with():
    """Six rows a little better, the others the same: Newcombe's interval holds 0, the test says 2 in 64."""
    ours, theirs = column([1.0] * 6 + [0.7] * 34, "anls"), column([0.6] * 6 + [0.7] * 34, "anls")
    errors = [column([*(np.arange(12) + at), *[math.nan] * 28], "absolute_error") for at in (0, 1)]
    columns = {"anls": ours, "absolute_error": errors[0]}, {"anls": theirs, "absolute_error": errors[1]}
    table = metric_table(*columns, {})
    gap = table["anls"]["difference"]
    assert table["anls"]["p"] == 2 / 64 and gap["low"] < 0 < gap["high"] and gap["interval"] == "newcombe"
    assert remarks(table, {"rows": 0, "different": 0}) == [
        "mean absolute error: intervals over fewer than 20 rows or photos are too short where a few errors are large",
        "ANLS: interval and test of the difference disagree, and the p value decides",
    ]
    beside = metric_table({"anls": ours}, None, {"anls": theirs})
    assert remarks(beside, {"rows": 0, "different": 0}) == [
        "ANLS: interval and test of the difference to the best single answer disagree, and the p value decides"
    ]
    said = [{"scores": {"tuned": {"absolute_error": error}}} for error in (900.0, 40.0, *range(18), None)]
    assert remarks(table, {"rows": 0, "different": 0}, said)[1] == (
        "mean absolute error: one row makes more than half of it, of 20, so its interval is wide"
    )
    even = [{"scores": {"tuned": {"absolute_error": float(error)}}} for error in range(20)]
    assert len(remarks(table, {"rows": 0, "different": 0}, even)) == 2
    assert in_words(table["anls"]).endswith("Here the two disagree, and the p value decides.")
    assert "disagree" not in in_words(table["absolute_error"])


def test_bootstrap_of_nothing():
    assert bootstrap_intervals([]) == [] and bootstrap_intervals([(np.zeros(0), np.zeros(0))]) == [(None, None)]


def test_so_many_rows_show_a_difference():
    """Of draws of so many rows with the same share of lost and won ones about four of five have p below 0.05."""
    before, after = np.ones(20), np.ones(20)
    after[:4], before[4] = 0.0, 0.0  # 4 of 20 lost, 1 won
    one, other = (Column("exact_match", None, values) for values in (after, before))
    needed = rows_to_show(one, other)
    draw = np.random.default_rng(0).integers(0, 20, (400, needed))
    shown = [mcnemar_p(int((places == 4).sum()), int((places < 4).sum())) < 0.05 for places in draw]
    assert needed == 85 and 0.7 < np.mean(shown) < 0.9
