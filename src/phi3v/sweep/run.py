"""`sweep(recipe)`: trials until there are as many as the recipe asks for, the best recipe, the ranking and the plots.

Everything goes through a folder and an Optuna storage, so any number of processes work on one sweep: those that
`sweep.workers` starts, or the same call made again elsewhere. The same call again goes on where an earlier one was
stopped or killed, or says that the sweep is finished.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from phi3v.data.scratch import alone
from phi3v.errors import ConfigError, Phi3VError, TrainingError
from phi3v.evaluation.figures import counted, ends, score_name
from phi3v.evaluation.run import feature_store
from phi3v.features.store import FeatureStore
from phi3v.launch import Launch
from phi3v.passthrough import first_line
from phi3v.recipe import Recipe
from phi3v.recipe_sweep import SweepSection
from phi3v.sweep.folder import SweepFolder
from phi3v.sweep.plots import write_plots
from phi3v.sweep.space import Dimension, search_space, values_of
from phi3v.sweep.study import OwnTrial, SweepStudy, validations
from phi3v.sweep.trial import Outcome, rows_of, run_trial, score_untuned, trial_recipe
from phi3v.sweep.verdict import ranked, remarks
from phi3v.sweep.workers import Workers
from phi3v.training.callbacks import Watcher
from phi3v.training.conditions import compare
from phi3v.training.preflight import check_recipe_alone
from phi3v.training.step_faults import is_out_of_memory

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_OF = {name: state for state, name in _STATES.items()}
_NO_ONE_BASE = ("data.", "model.", "quantization", "evaluation.")
"""Beginnings of keys whose values make another base, or other questions to it, of each trial."""
_HOPELESS = 5
"""So many failed trials and no other end a sweep."""


@dataclass(frozen=True)
class TrialNews:
    """A trial began or ended.

    Attributes:
        number: of the trial, from 0.
        state: running, complete, pruned or failed.
        values: what it sets, by key of the recipe.
        value: the score of a complete one.
        last: score of its last validation; None before the first, and where validations have the loss alone and the
            sweep another metric.
        seconds: how long it took; 0.0 at the start.
        error: why it failed.
        resumed: whether it had begun before.
        ended: trials of the sweep that have ended.
        total: trials that the recipe asks for.
        best: number and score of the best trial so far; None until there is one.
    """

    number: int
    state: str
    values: dict[str, Any]
    value: float | None
    last: float | None
    seconds: float
    error: str | None
    resumed: bool
    ended: int
    total: int
    best: tuple[int, float] | None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; `ranking` is what ranking.json holds, see docs/tuning.md.

    Attributes:
        status: "finished" when the sweep was finished before this call; "complete" when it is now; "stopped" when
            `sweep.timeout` ended this call before.
        folder: the sweep.
        ranking: all trials.
        best_recipe: best.yaml; None while no trial is complete.
        plots: Optuna's plots.
    """

    status: Literal["finished", "complete", "stopped"]
    folder: Path
    ranking: dict[str, Any]
    best_recipe: Path | None
    plots: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "best_recipe": None if self.best_recipe is None else str(self.best_recipe),
            "plots": [str(plot) for plot in self.plots],
        }


def sweep(
    recipe: Recipe,
    *,
    on_trial: Callable[[TrialNews], None] = lambda news: None,
    on_event: Watcher = lambda event: None,
    features: FeatureStore | None = None,
) -> SweepResult:
    """Tries a recipe with other values, as its section `sweep` says.

    Args:
        recipe: everything about the sweep; its `output` is the sweep's folder.
        on_trial: told when a trial begins or ends.
        on_event: told of each training.
        features: where trials keep features of frozen vision parts; None opens what the recipe names, in memory where
            it names nothing.
    Raises:
        ConfigError: in one line, before anything is written.
        DataError: the rows cannot be read, or more of them be left out than the recipe allows; no trial began.
        TrainingError: five trials failed and none did not.
        Interrupted: SIGTERM or Ctrl-C came; the same call goes on.
    """
    settings = recipe.sweep or SweepSection()
    if settings.storage is not None and "://" not in settings.storage:
        settings = settings.model_copy(update={"storage": os.path.abspath(settings.storage)})
    recipe = Recipe.from_dict({**recipe.model_dump(), "sweep": settings.model_dump()})
    check_recipe_alone(recipe)
    if Launch.here().count > 1:
        raise ConfigError("each trial of a sweep is one process: start it by itself, with sweep.workers for several")
    if recipe.data.validation is None and recipe.data.split is None:
        raise ConfigError("a sweep compares trials on held-out rows: set data.split or data.validation")
    work = _Work(recipe, settings, on_trial, on_event, features)
    return work.all()


class _Work:
    """One call of `sweep`."""

    def __init__(
        self,
        recipe: Recipe,
        settings: SweepSection,
        on_trial: Callable[[TrialNews], None],
        on_event: Watcher,
        features: FeatureStore | None,
    ) -> None:
        self.recipe, self.settings, self.features = recipe, settings, features
        self.on_trial, self.on_event = on_trial, on_event
        self.folder, self.space = SweepFolder(recipe.output), search_space(recipe)
        self.study = SweepStudy(self.folder, recipe, settings, self.space)

    def all(self) -> SweepResult:
        """Trials until none is left to begin, then what they found."""
        began, worked = time.monotonic(), False
        for trial in self.study.trials():
            if trial.state.is_finished():
                self.folder.drop_checkpoints(trial.number)  # of a process that was killed behind a trial's end
        if not self._finished() or self.folder.read_base() is None:
            self._refuse_other_rows()
        if self.settings.workers > 1 and not self._finished():
            worked = self._let_others_work()
        while self.settings.workers == 1 and not self._late(began) and (own := self.study.next()) is not None:
            worked = True
            try:
                self._try(own)
            finally:
                own.lock.give_back()  # the trial of an interrupted call is anybody's
        stopped = not self._finished()
        if not worked and not stopped and self._is_told():
            return self._result("finished", write=False)
        return self._result("stopped" if stopped else "complete", write=True)

    def _refuse_other_rows(self) -> None:
        """Reads the rows once.

        Raises: ConfigError where rows or photos are not those of the trials so far, DataError where they are not read.
        """
        now = rows_of(self.recipe, self.on_event, self.space)
        with alone(self.folder.lock):
            if self.study.trials():
                compare(self.folder.read_rows(), now, f"sweep {self.folder.path}")
            if now and not (self.study.trials() and self.folder.rows.is_file()):
                self.folder.write_rows(now)

    def _late(self, began: float) -> bool:
        return self.settings.timeout is not None and time.monotonic() - began >= self.settings.timeout

    def _finished(self) -> bool:
        """Whether as many trials have ended as are wanted."""
        return self.study.is_over() and all(trial.state.is_finished() for trial in self.study.trials())

    def _let_others_work(self) -> bool:
        """Has worker processes try, and tells of what they store."""
        seen = {trial.number: trial.state for trial in self.study.trials()}
        with Workers(self.folder, self.settings.workers, self._of_workers()) as workers:
            while True:
                alive = workers.alive()
                for trial in self.study.trials():
                    if seen.get(trial.number) != trial.state:
                        seen[trial.number] = trial.state
                        self._tell(trial)
                if not alive:
                    return True
                time.sleep(0.5)

    def _of_workers(self) -> list[str]:
        """What may differ from sweep.yaml in this call."""
        timeout = self.settings.timeout
        return [f"sweep.trials={self.settings.trials}", f"sweep.timeout={'null' if timeout is None else timeout}"]

    def _try(self, own: OwnTrial) -> None:
        """One trial from its values to its score."""
        values = values_of(self.space, own.trial.params)
        run = self.folder.run(own.number)
        self._tell(self._frozen(own.number), resumed=run.is_run(run.path))

        def judge(count: int, score: float) -> bool:
            if count not in self._frozen(own.number).intermediate_values:  # told before this process went on with it
                own.trial.report(score, count)
            return own.trial.should_prune()

        try:
            recipe = trial_recipe(self.recipe, values, str(run.path))
            if self.features is None:
                self.features = feature_store(recipe, None)
            outcome = run_trial(recipe, self.settings, judge, self.on_event, self.features)
        except ConfigError as error:  # a combination that no recipe can have
            outcome = Outcome("failed", None, 0, 0.0, str(error))
        for name in ("steps", "seconds", "error", "last", "ends", "loss"):
            own.trial.set_user_attr(name, getattr(outcome, name))
        self.study.done(own, outcome.value, _OF[outcome.state])
        self.folder.drop_checkpoints(own.number)
        self._tell(self._frozen(own.number))
        with alone(self.folder.lock):
            self.folder.write_ranking(self._ranking())
        self._refuse_hopeless(outcome)

    def _refuse_hopeless(self, last: Outcome) -> None:
        """Raises: TrainingError when all trials failed, and there are some."""
        ended = [trial.state for trial in self.study.trials() if trial.state.is_finished()]
        if len(ended) >= min(_HOPELESS, self.settings.trials) and set(ended) == {TrialState.FAIL}:
            raise TrainingError(f"all {len(ended)} trials failed, the last one so: {last.error}")

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.trials()[number]

    def _tell(self, trial: FrozenTrial, resumed: bool = False) -> None:
        """News of a trial."""
        trials = self.study.trials()
        best = next((line for line in self._lines(trials) if line["state"] == "complete"), None)
        line = self._line(trial)
        told = self.study.validated == self.settings.metric
        self.on_trial(
            TrialNews(
                number=trial.number,
                resumed=resumed,
                ended=sum(one.state.is_finished() for one in trials),
                total=self.settings.trials,
                best=None if best is None else (best["trial"], best["value"]),
                last=next(reversed(line["validations"].values()), None) if told else None,
                **{name: line[name] for name in ("state", "values", "value", "seconds", "error")},
            )
        )

    def _line(self, trial: FrozenTrial) -> dict[str, Any]:
        """A trial as ranking.json holds it, without its rank."""
        low, high = trial.user_attrs.get("ends") or (None, None)
        return {
            "trial": trial.number,
            "state": _STATES[trial.state],
            "value": trial.value if trial.state == TrialState.COMPLETE else None,
            "low": low,
            "high": high,
            "loss": trial.user_attrs.get("loss"),
            "values": values_of(self.space, trial.params),
            "validations": {str(count): score for count, score in sorted(validations(trial, self.study.sign).items())},
            "steps": trial.user_attrs.get("steps", 0),
            "seconds": trial.user_attrs.get("seconds", 0.0),
            "error": trial.user_attrs.get("error"),
            "folder": str(self.folder.run(trial.number).path),
        }

    def _lines(self, trials: list[FrozenTrial]) -> list[dict[str, Any]]:
        """Trials as ranking.json holds them, in its order."""
        return ranked([self._line(trial) for trial in trials], self.study.minimize, list(_OF))

    def _ranking(self) -> dict[str, Any]:
        """What ranking.json holds."""
        lines = [{"rank": rank, **line} for rank, line in enumerate(self._lines(self.study.trials()), start=1)]
        ranking = {
            "metric": self.settings.metric,
            "better": "lower" if self.study.minimize else "higher",
            "validated": self.study.validated,
            "search": {
                key: list(one) if isinstance(one, list) else one.model_dump() for key, one in self.space.items()
            },
            "states": {name: count for name in _OF if (count := sum(line["state"] == name for line in lines))},
            "best": next((line["trial"] for line in lines if line["state"] == "complete"), None),
            "base": self.folder.read_base(),
            "trials": lines,
        }
        return {**ranking, "remarks": remarks(ranking)}

    def _ask_base(self) -> None:
        """Has the base scored, once for a sweep; why it cannot be is kept in its place."""
        with alone(self.folder.path / "base.lock"):
            if self.folder.read_base() is not None:
                return
            keys = {inner for key, one in self.space.items() for inner in _keys(key, one)}
            changed = sorted(key for key in keys if key.startswith(_NO_ONE_BASE))
            try:
                if changed:
                    raise ConfigError(f"trials differ in {changed[0]}, so there is no one base")
                found = score_untuned(self.recipe, self.folder.recipe, self.settings.metric, self.on_event)
            except Phi3VError as error:
                found = {"error": str(error)}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                found = {"error": f"out of memory ({first_line(error)}): take a smaller evaluation.batch_size"}
            self.folder.write_base(found)

    def _result(self, status: Literal["finished", "complete", "stopped"], *, write: bool) -> SweepResult:
        """What was found, written where there is something new."""
        if write and status == "complete" and self._ranking()["best"] is not None:
            self._ask_base()
        ranking = self._ranking()
        if write:
            with alone(self.folder.lock):
                self.folder.write_ranking(ranking)
                names = score_name(self.settings.metric), score_name(self.study.validated)
                write_plots(self.study.study, self.folder.path, *names, self.study.sign)
                if text := self._best(ranking):
                    self.folder.write_best(text)
        best = self.folder.best if self.folder.best.is_file() else None
        return SweepResult(status, self.folder.path, ranking, best, sorted(self.folder.path.glob("*.png")))

    def _is_told(self) -> bool:
        """Whether all was written that a finished sweep leaves; best.yaml comes last."""
        ranking = self._ranking()
        if ranking["best"] is None:
            return self.folder.ranking.is_file()
        if ranking["base"] is None or not self.folder.best.is_file():
            return False
        return self.folder.best.read_text(encoding="utf-8") == self._best(ranking)

    def _best(self, ranking: dict[str, Any]) -> str | None:
        """The best trial's recipe as a file; its run is the recipe's output, so that training it adds what is missing
        there.
        """
        if ranking["best"] is None:
            return None
        best = next(line for line in ranking["trials"] if line["trial"] == ranking["best"])
        trial = trial_recipe(self.recipe, best["values"], best["folder"])
        recipe = Recipe.from_dict({**trial.model_dump(), "evaluation": self.recipe.evaluation.model_dump()})
        complete = counted(ranking["states"]["complete"], "complete trial")
        head = (
            f"The best of {complete}: trial {best['trial']}, {ranking['metric']} "
            f"{best['value']:.6g} on held-out rows (95 %: {ends(best, 'number')}; {ranking['better']} is better).",
            *ranking["remarks"],
            "Its run is the output below: phi3v train on this file adds answers and report there; give another output "
            "to train anew.",
        )
        return "".join(f"# {line}\n" for text in head for line in text.splitlines()) + recipe.with_places().to_yaml()


def _keys(key: str, dimension: Dimension) -> Iterator[str]:
    """The keys of the recipe that a key of the space sets: its own, or those of choices that are mappings."""
    for value in dimension if isinstance(dimension, list) else [None]:
        yield from value if isinstance(value, Mapping) else [key]
