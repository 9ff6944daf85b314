"""Optuna's own plots of a study as PNG files: history, slices, curves of trials, importances."""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.category import StrCategoryFormatter
from matplotlib.ticker import AutoLocator, MaxNLocator
from optuna.trial import TrialState

from phi3v.sweep.names import short_names
from phi3v.sweep.study import validations
from phi3v.whole_files import fill_file


def write_plots(study: optuna.Study, folder: Path, target: str, validated: str, sign: int = 1) -> list[Path]:
    """Writes the plots that the trials allow, and gives their files.

    Importances need two complete trials whose scores differ, and scikit-learn; curves validations. What lacks them is
    left out.

    Args:
        study: the trials.
        folder: where the files go.
        target: what the score is called.
        validated: what the score of validations is called.
        sign: of those, see `SweepStudy`.
    """
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    draw = optuna.visualization.matplotlib
    with _quiet():
        wanted: dict[str, Any] = {}
        if complete:
            wanted["history"] = lambda: draw.plot_optimization_history(study, target_name=target)
            wanted["slice"] = lambda: draw.plot_slice(study, target_name=target)
        if any(validations(trial) for trial in study.get_trials(deepcopy=False)):
            wanted["curves"] = lambda: _named(draw.plot_intermediate_values(with_last(study, sign)), validated)
        if len({trial.value for trial in complete}) > 1 and importlib.util.find_spec("sklearn"):
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            wanted["importances"] = lambda: draw.plot_param_importances(study, evaluator=evaluator, target_name=target)
        return [_drawn(draw_one, folder / f"{name}.png") for name, draw_one in wanted.items()]


def _named(axes: Axes, validated: str) -> Axes:
    """The curves by the names of what they show."""
    axes.set(title="", xlabel="validation", ylabel=f"{validated} at each validation")
    return axes


def with_last(study: optuna.Study, sign: int = 1) -> optuna.Study:
    """A study in memory whose trials have their last validations too, under the same numbers and as they were said."""
    whole = optuna.create_study(direction=study.direction)
    for trial in sorted(study.get_trials(), key=lambda trial: trial.number):
        trial.intermediate_values = validations(trial, sign)
        whole.add_trial(trial)
    return whole


def _drawn(draw: Any, file: Path) -> Path:
    """One plot in a file."""
    axes = draw()
    figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
    figure.set_size_inches(max(8.0, figure.get_size_inches()[0]), 5.0)
    for one in figure.axes:
        _name_choices(one)
        _whole_ticks(one)
    fill_file(file, lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))
    pyplot.close(figure)
    return file


def _name_choices(axes: Axes) -> None:
    """Names of choices below an axis, slanted and short, so that they do not lie over each other."""
    if isinstance(axes.xaxis.get_major_formatter(), StrCategoryFormatter):
        places = list(map(float, axes.get_xticks()))
        names = axes.xaxis.get_major_formatter().format_ticks(places)
        axes.set_xticks(places, choice_names(names), rotation=35, ha="right")


def _whole_ticks(axes: Axes) -> None:
    """Ticks at whole numbers below an axis of them, trials, steps, epochs or ranks: few would have a tick at 1.2.

    Axes of choices and logarithmic ones keep theirs.
    """
    if isinstance(axes.xaxis.get_major_locator(), AutoLocator):
        drawn: list[Any] = [line.get_xdata() for line in axes.lines]
        dots: list[Any] = [some.get_offsets() for some in axes.collections]
        drawn += [[place for place, _ in some] for some in dots]
        places = [float(place) for some in drawn for place in some]
        if places and all(place.is_integer() for place in places):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def choice_names(labels: Sequence[str]) -> list[str]:
    """Choices of Optuna's storage as a plot shows them, see `short_names`.

    Example: "'[\"qkv_proj\", \"o_proj\"]'" (Optuna puts texts in quotes) -> "qkv_proj+o_proj"; "0.00025" stays.
    """
    bare = [label[1:-1] if label[:1] == label[-1:] == "'" else label for label in labels]
    return short_names([_value(label) for label in bare])


def _value(label: str) -> Any:
    """A list or mapping that is stored as JSON; any other text stays."""
    try:
        value = json.loads(label)
    except ValueError:
        return label
    return value if isinstance(value, list | dict) else label


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a window, without what Optuna says of its experimental functions."""
    before = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        pyplot.switch_backend(before)
