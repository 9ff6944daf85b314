"""The guard of a step's speed: what one of our steps asks of a GPU at full size, counted on the meta device.

No clock: operations, bytes, launches, waits of the host and memory are counted from the code that a training runs, and
may not grow. A change that lowers a number lowers its limit here, in the same commit.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LIMITS = json.loads((BENCHMARKS / "step_limits.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The benchmarks import each other by name, as programs do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def count(way: str, shape: str, size: str = "full") -> dict:
    from count import count_way

    return count_way(way, [shape], size)[shape]


@pytest.fixture(scope="module")
def full_size(benchmarks) -> dict:
    """Ours at full size, shape -> counts."""
    from count import count_way

    return count_way("ours", list(LIMITS))


@pytest.mark.parametrize("shape", list(LIMITS))
def test_our_step_stays_within_its_limits(full_size, shape):
    counted = full_size[shape]
    over = {name: (counted[name], limit) for name, limit in LIMITS[shape].items() if counted[name] > limit}
    assert not over, f"(counted, limit), see benchmarks/step_limits.json: {over}"
    slack = {name: (counted[name], limit) for name, limit in LIMITS[shape].items() if counted[name] < 0.8 * limit}
    assert not slack, f"the step became cheaper: lower these limits (counted, limit): {slack}"


def test_the_document_tells_what_the_file_says():
    """Each figure of the counted tables is that of `benchmarks/count.json`, rounded as it is shown."""
    from count import COUNTED

    document = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    told = json.loads((BENCHMARKS / "count.json").read_text())
    keys = ("operations_1e12", "bytes_1e9", "launches", "host_waits", "peak_gib", "predicted_ms")
    section = document.partition("## A training step, counted")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    heads = [place for place, line in enumerate(lines) if line[1] == "10^12 operations"]
    assert [lines[head][0].split()[0].replace(",", "") for head in heads] == list(told["floor_1e12"])
    for head, (shape, floor) in zip(heads, told["floor_1e12"].items(), strict=True):
        rows = [[floor], *([told["counted"][way][shape][key] for key in keys] for way in COUNTED)]
        for line, values in zip(lines[head + 2 : head + 2 + len(rows)], rows, strict=True):
            for cell, value in zip(line[1:], values, strict=False):
                shown = float(cell.replace(",", ""))
                half = 0.05 if "." in cell else 0.5
                assert abs(shown - value) <= half + 1e-9, (shape, line[0], cell, value)


def test_the_guard_sees_a_pass_more_in_each_layer(monkeypatch):
    """One copy of the hidden states a layer, as a careless `.contiguous()` makes it."""
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    before = count("ours-eager", "2509", "tiny")
    plain = Phi3MLP.forward
    monkeypatch.setattr(Phi3MLP, "forward", lambda self, hidden: plain(self, hidden.clone()))
    after = count("ours-eager", "2509", "tiny")
    assert after["launches"] > before["launches"] and after["bytes_1e9"] >= before["bytes_1e9"]


def test_a_counter_counts_what_can_be_counted_by_hand():
    """y = x W' with x [4, 8] and W [16, 8] in float32, both trained, then backward of sum(y)."""
    from counter import Counter

    with torch.device("meta"):
        x, weight = torch.empty(4, 8, requires_grad=True), torch.empty(16, 8, requires_grad=True)
    counter = Counter()
    for tensor in (x, weight):
        counter.hold(tensor)
    with counter:
        made = torch.nn.functional.linear(x, weight)
    assert counter.counts.operations == 2 * 4 * 8 * 16
    assert counter.counts.launches == 1 and counter.counts.waits == 0
    assert counter.counts.bytes == 4 * (4 * 8 + 16 * 8 + 4 * 16)
    assert counter.counts.peak_bytes == 4 * (4 * 8 + 16 * 8 + 4 * 16)
    with counter:
        made.sum().backward()
    assert counter.counts.operations == 3 * 2 * 4 * 8 * 16


def test_memory_that_is_given_back_is_not_counted_twice():
    from counter import Counter

    with torch.device("meta"), Counter() as counter:
        for _ in range(3):
            torch.empty(1000, dtype=torch.uint8).add(1)
    assert counter.counts.peak_bytes == 2000 and sum(counter.live.values()) == 0


def test_a_wait_of_the_host_is_seen():
    from counter import Counter

    with torch.device("meta"):
        values = torch.empty(4)
    with Counter(rows=2) as counter:
        assert not bool((values > 0).any())
        assert values[values > 0].shape == (2,)
    assert counter.counts.waits == 2


@pytest.mark.parametrize("way", ["guide", "peft", "ours-eager", "ours-padded", "ours"])
def test_every_way_counts_the_useful_arithmetic_at_least(way):
    """A way that computes less than the floor does not compute the step."""
    from count import SHAPES, floor_of
    from sizes import config_of

    counted = count(way, "757", "tiny")
    assert counted["operations_1e12"] * 1e12 >= 0.95 * floor_of(config_of("tiny"), SHAPES["757"])


def test_the_floor_is_that_of_the_research():
    """17 crops and 2,609 tokens: 61.2 ms at 788e12 operations a second; 5 crops and 857 tokens: 53.9 samples/s."""
    from sizes import config_of

    from phi3v.training.floor import useful_operations

    config = config_of("full")
    large = useful_operations(config, tokens=2609, image=2509, crops=17, trained=40)
    small = useful_operations(config, tokens=857, image=757, crops=5, trained=40)
    assert large / 788e12 == pytest.approx(61.2e-3, rel=0.003)
    assert 788e12 / small == pytest.approx(53.93, abs=0.05)


def test_what_is_compared_is_the_default_and_added_lines_say_whose_they_are(tmp_path, monkeypatch):
    import train_step

    monkeypatch.setattr(train_step, "draw_bars", lambda *given: None)
    here = {"device": "a", "torch": "2", "transformers": "5", "peft": "0", "quick": False}
    given = Namespace(ways=["ours", "ours-padded"], out=tmp_path / "step")
    bench = train_step.Bench(given, "cpu", None, torch.float32, 1.0, {**here, "lines": []}, 0.0)
    earlier = {**here, "date": "2026-01-01", "command": "step", "matrix_rate_1e12": 700.0}
    line = {"shape": "757", "way": "peft", "samples/s": 2.0}
    older = {"shape": "757", "way": "peft16", "samples/s": 4.0, "of": {"command": "one before"}}
    bench.add({**earlier, "lines": [line, older, {"shape": "757", "way": "ours", "samples/s": 1.0}]})
    call = {name: earlier[name] for name in ("date", "command", "matrix_rate_1e12")}
    assert bench.result["lines"] == [{"of": call, **line}, older]
    bench.bars["757: samples/s"] |= {"ours": 8.0, "ours-padded": 16.0}
    train_step.compare(bench)
    told = json.loads((tmp_path / "step.json").read_text())["lines"][2:]
    assert told == [{"shape": "757", "ours / (b)": 2.0}, {"shape": "757", "ours packed / padded": 0.5}]


def test_kept_features_that_give_another_loss_stop_the_benchmark_of_packing():
    from packing import check_losses

    check_losses({"plain": 6.93448, "ours": 6.93450, "ours, kept features": 6.93448})
    with pytest.raises(AssertionError, match="kept features"):
        check_losses({"plain": 6.93448, "ours": 6.93448, "ours, kept features": 6.94})


def test_all_ways_compute_the_same_loss():
    """What is compared is the same step: equal weights, equal samples, equal loss; and after a step still so."""
    from sizes import config_of, make_example
    from ways import make_optimiser, make_way, run_step, trained_tokens

    config = config_of("tiny")
    grids = [(1, 2), (1, 1), (1, 1)]
    examples = [make_example(config, [grid], text=20, trained=6, seed=seed) for seed, grid in enumerate(grids)]
    losses = {}
    for name in ("guide", "peft", "ours-eager", "ours-padded", "ours"):
        way = make_way(name, config, device="cpu", dtype=torch.float32)
        batches = way.batches(examples, 2)
        items = trained_tokens(batches)
        assert items == 18
        began = [weight.detach().clone() for weight in way.trained]
        for weight in way.trained:
            weight.grad = torch.ones_like(weight)
        make_optimiser(way, "cpu").step()
        assert all(map(torch.equal, began, way.trained)), "steps that are timed move no weight for the next shape"
        for weight in way.trained:
            weight.grad = None
        optimiser = make_optimiser(way, "cpu", 1e-3)
        losses[name] = torch.tensor([float(run_step(way, batches, items, optimiser, "cpu")) for _ in range(2)])
    for name, found in losses.items():
        torch.testing.assert_close(found, losses["peft"], rtol=1e-5, atol=1e-5, msg=f"{name}: {losses}")
    assert losses["peft"][1] < losses["peft"][0]
