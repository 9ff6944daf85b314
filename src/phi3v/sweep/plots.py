"""Optuna's own plots of a study as PNG files: history, slices, curves of trials, importances."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.trial import TrialState

from phi3v.whole_files import fill_file


def write_plots(study: optuna.Study, folder: Path, target: str) -> list[Path]:
    """Writes the plots that the trials allow, and gives their files.

    Importances need two complete trials whose scores differ, and scikit-learn; without one of them they are left out.

    Args:
        study: the trials.
        folder: where the files go.
        target: what the score is called.
    """
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    draw = optuna.visualization.matplotlib
    with _quiet():
        wanted: dict[str, Any] = {}
        if complete:
            wanted["history"] = lambda: draw.plot_optimization_history(study, target_name=target)
            wanted["slice"] = lambda: draw.plot_slice(study, target_name=target)
            wanted["curves"] = lambda: draw.plot_intermediate_values(study)
        if len({trial.value for trial in complete}) > 1 and importlib.util.find_spec("sklearn"):
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            wanted["importances"] = lambda: draw.plot_param_importances(study, evaluator=evaluator, target_name=target)
        return [_drawn(draw_one, folder / f"{name}.png") for name, draw_one in wanted.items()]


def _drawn(draw: Any, file: Path) -> Path:
    """One plot in a file."""
    axes = draw()
    figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
    figure.set_size_inches(max(8.0, figure.get_size_inches()[0]), 5.0)
    fill_file(file, lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))
    pyplot.close(figure)
    return file


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
