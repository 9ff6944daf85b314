"""What a sweep's plots show, and what trials are called in them."""

import json

import pytest

pytest.importorskip("optuna", reason="sweeps need Optuna")

import optuna
from matplotlib.figure import Figure

from phi3v.sweep.names import short_names
from phi3v.sweep.plots import _whole_ticks, choice_names, with_last


def test_a_trial_of_one_validation_has_a_dot_and_the_pruner_is_not_told() -> None:
    study = optuna.create_study()
    for seen, last in (({}, [1, 0.4]), ({1: 0.7}, [2, 0.5])):
        study.add_trial(optuna.trial.create_trial(value=last[1], intermediate_values=seen, user_attrs={"last": last}))
    study.ask()  # a trial that is not done
    whole = with_last(study)
    assert [trial.intermediate_values for trial in whole.trials] == [{1: 0.4}, {1: 0.7, 2: 0.5}, {}]
    assert [trial.number for trial in whole.trials] == [0, 1, 2]
    assert [trial.intermediate_values for trial in study.trials] == [{}, {1: 0.7}, {}]
    assert [trial.intermediate_values for trial in with_last(study, -1).trials] == [{1: -0.4}, {1: -0.7, 2: -0.5}, {}]


@pytest.mark.parametrize("drawn", ["plot", "scatter"])
def test_axes_of_whole_numbers_have_ticks_at_them_alone(drawn: str) -> None:
    def ticks(places: list[float], scale: str = "linear") -> list[float]:
        axes = Figure(figsize=(8, 5)).subplots()
        getattr(axes, drawn)(places, [0.5] * len(places))
        axes.set_xscale(scale)
        before = axes.get_xticks()
        _whole_ticks(axes)
        low, high = axes.get_xlim()
        after = axes.get_xticks()
        assert scale == "linear" or list(before) == list(after)
        return [float(tick) for tick in after if low <= tick <= high]

    assert ticks([1, 2]) == [1, 2] and ticks([3]) == [3], "the steps of short trials"
    assert ticks([1, 1.5]) != [1] and len(ticks([0.0, 0.1, 0.2])) > 3, "others keep theirs"
    assert ticks([1, 10, 100], "log")


def test_choices_have_short_names_that_differ() -> None:
    lists = ["""'["qkv_proj", "o_proj"]'""", '["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]']
    assert choice_names(lists) == ["qkv_proj+o_proj", "qkv_proj+o_proj+gate_up…"]
    assert choice_names(["0.00025", "'cosine'", "[8]"]) == ["0.00025", "cosine", "8"]
    pairs = [{"lora.lora_dropout": one, "training.weight_decay": one / 10} for one in (0.0, 0.1)]
    assert choice_names([json.dumps(pair) for pair in pairs]) == short_names(pairs) == ["0, 0", "0.1, 0.01"]
    assert short_names([{"vision.tower": "lora"}, {"vision.tower": "frozen"}]) == ["tower=lora", "tower=frozen"]
    assert short_names([{"a.r": 8}, {"b.r": 8}, {"a.r": 8}]) == ["1: r=8", "2: r=8", "1: r=8"]
    for ends in (("one", "two"), ("one" + "x" * 30, "two" + "x" * 30)):
        names = short_names([f"{'a' * 30}{end}" for end in (*ends, ends[0])])
        assert names[0] == names[2] != names[1] and max(map(len, names)) <= 24
