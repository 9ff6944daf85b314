"""A sweep's study: Optuna's storage, sampler and pruner, and whose trial is whose.

A trial belongs to the process that holds its lock file in the sweep's folder. One that is running and whose lock is
free was left by a process that died, and is taken up again under its own number with its stored values. A sampler is
made anew for each value, seeded by sweep, trial and key, so that what is suggested depends on the finished trials alone
and not on the process that asks.
"""

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from phi3v.data.scratch import alone
from phi3v.errors import ConfigError
from phi3v.passthrough import check_names, first_line
from phi3v.recipe import Recipe
from phi3v.recipe_sweep import SweepSection
from phi3v.run_lock import RunLock
from phi3v.sweep.folder import SweepFolder
from phi3v.sweep.space import Space, distributions

_EXHAUSTED = "exhausted"


@dataclass
class OwnTrial:
    """A trial that this process owns as long as it holds the lock."""

    trial: Trial
    lock: RunLock

    @property
    def number(self) -> int:
        """Its number, from 0."""
        return self.trial.number


class SweepStudy:
    """Hands out trials, and takes what became of them.

    Attributes:
        study: Optuna's.
        validated: what validations of trials say: the sweep's metric or the held-out loss.
        sign: -1 where pruners are told of that loss below zero, since the metric is to grow; otherwise 1.
    """

    def __init__(self, folder: SweepFolder, recipe: Recipe, sweep: SweepSection, space: Space) -> None:
        """Opens folder and storage, or makes them.

        Args:
            folder: of the sweep.
            recipe: the sweep's; its training.seed is that of all suggestions.
            sweep: its section.
            space: what is searched.
        Raises: ConfigError for a storage that cannot be opened, and for a sampler or pruner that Optuna does not have.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder, self.sweep, self.space, self.seed = folder, sweep, space, recipe.training.seed
        self._distributions = distributions(space)
        self.validated = (
            sweep.metric if sweep.metric == "eval_loss" or recipe.evaluation.during_training else "eval_loss"
        )
        self.sign = 1 if self.validated == sweep.metric else -1
        self._try_sampler()
        pruner = optuna.pruners.NopPruner() if sweep.pruner is None else _made("pruner", sweep.pruner)
        direction = StudyDirection.MINIMIZE if self.minimize else StudyDirection.MAXIMIZE
        folder.start(recipe)
        with alone(folder.lock):
            storage = _open_storage(sweep.storage, folder)
            self.study = optuna.create_study(
                storage=storage, study_name=folder.study_name(), direction=direction, pruner=pruner, load_if_exists=True
            )

    @property
    def minimize(self) -> bool:
        """Whether a lower value is better."""
        return self.sweep.metric == "eval_loss"

    def trials(self) -> list[FrozenTrial]:
        """All trials so far, by number."""
        return sorted(self.study.get_trials(deepcopy=False), key=lambda trial: trial.number)

    def next(self) -> OwnTrial | None:
        """A trial that another process left, or a new one with its values; None when there are as many as wanted."""
        with alone(self.folder.lock):
            found = self._orphan() or self._fresh()
            return None if found is None else OwnTrial(self._suggested(*found[:2]), found[2])

    def done(self, own: OwnTrial, value: float | None, state: TrialState) -> None:
        """Stores how a trial ended; its lock is free behind this."""
        try:
            self.study.tell(own.trial, value, state=state)
        except RuntimeError as error:  # a grid's sampler says so that all of it was tried
            if "Study.stop" not in str(error):
                raise
            self.study.set_user_attr(_EXHAUSTED, True)
        finally:
            own.lock.give_back()

    def is_over(self) -> bool:
        """Whether no trial is to be begun any more."""
        trials = self.study.get_trials(deepcopy=False)
        return len(trials) >= self.sweep.trials or bool(self.study.user_attrs.get(_EXHAUSTED))

    def _orphan(self) -> tuple[int, int, RunLock] | None:
        """A running trial that no process holds; None too where the file system has no locks to tell.

        Returns: its number, its id in the storage, its lock.
        """
        for frozen in self.trials():
            if frozen.state != TrialState.RUNNING:
                continue
            lock = self._lock_of(frozen.number)
            try:
                lock.take()
            except ConfigError:
                continue
            if lock.held:
                return frozen.number, frozen._trial_id, lock
        return None

    def _fresh(self) -> tuple[int, int, RunLock] | None:
        """A new trial, without its values yet."""
        if self.is_over():
            return None
        self.study.sampler = optuna.samplers.RandomSampler(seed=0)  # looks at no trial before it has values
        trial = self.study.ask()
        lock = self._lock_of(trial.number)
        lock.take()
        return trial.number, trial._trial_id, lock

    def _suggested(self, number: int, place: int) -> Trial:
        """A trial with its values: stored ones stay, the others are what an undisturbed process would suggest.

        What a sampler makes of several keys at once (CMA-ES, GP, multivariate TPE) comes from one seed of the trial.
        """
        self.study.sampler = self._sampler(number, "")
        trial = Trial(self.study, place)
        _ = trial.relative_params
        for key, distribution in self._distributions.items():
            self.study.sampler = self._sampler(number, key)
            trial._suggest(key, distribution)
        return trial

    def _lock_of(self, number: int) -> RunLock:
        return RunLock(self.folder.trials, f"{number:04d}.lock")

    def _try_sampler(self) -> None:
        """Suggests two made-up trials, before anything is written: some samplers import a package at their second."""

        def suggest(trial: Trial) -> float:
            for key, distribution in self._distributions.items():
                trial._suggest(key, distribution)
            return 0.0

        tried: list[dict[str, Any]] = [{}]
        if "n_startup_trials" in self.sweep.sampler:  # as if those were over, too
            tried.append({"n_startup_trials": 1})
        try:
            for instead in tried:
                optuna.create_study(sampler=self._sampler(0, "", **instead)).optimize(suggest, n_trials=2)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"sweep.sampler {self.sweep.sampler['name']}: {first_line(error)}") from error
        except ImportError as error:
            raise ConfigError(
                f"sweep.sampler {self.sweep.sampler['name']} needs a package that is not here ({error}): "
                f"pip install {error.name}"
            ) from error

    def _sampler(self, number: int, key: str, **instead: Any) -> optuna.samplers.BaseSampler:
        """A sampler with a seed of its own, where its class takes one; `instead` of some options of the recipe."""
        options = {**self.sweep.sampler, **instead}
        parameters = inspect.signature(_class_of("sampler", options)).parameters
        grid = "search_space" in parameters  # its seed says in which order it holds the combinations
        if "seed" in parameters:
            text = f"{options.get('seed', self.seed)}/{number}/{key}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            options["seed"] = self.seed if grid else seed
        if grid and "search_space" not in options:
            options["search_space"] = _grid(self._distributions)
        return _made("sampler", options)


def validations(trial: FrozenTrial, sign: int = 1) -> dict[int, float]:
    """What a trial's validations said, by their number from 1; `sign` is the study's.

    The last one is kept beside those that the pruner is told of: a trial of one epoch has let its learning rate fall to
    nothing there, and one of three epochs would be cut off for being worse at its first.
    """
    last = trial.user_attrs.get("last")
    return {count: sign * said for count, said in [*trial.intermediate_values.items(), *([last] if last else [])]}


def _grid(found: dict[str, Any]) -> dict[str, list[Any]]:
    """The choices of a space for a grid. Raises: ConfigError where it holds ranges."""
    for key, distribution in found.items():
        if not hasattr(distribution, "choices"):
            raise ConfigError(f"sweep.sampler tries a grid, and sweep.search.{key} is a range: give a list of values")
    return {key: list(distribution.choices) for key, distribution in found.items()}


def _class_of(kind: str, options: dict[str, Any]) -> Any:
    """Optuna's class. Raises: ConfigError for another name."""
    module = getattr(optuna, f"{kind}s")
    known = [name for name in module.__all__ if inspect.isclass(getattr(module, name)) and not name.startswith("Base")]
    name = options["name"]
    if name not in known:
        raise ConfigError(f"sweep.{kind} is {name!r}, Optuna has {', '.join(known)}")
    return getattr(module, name)


def _made(kind: str, options: dict[str, Any]) -> Any:
    """A sampler or pruner from its name and options; an option that is one itself (`wrapped_pruner`) has that form too.

    Raises: ConfigError with the library's line.
    """
    made = _class_of(kind, options)
    given = {key: value for key, value in options.items() if key != "name"}
    check_names(f"sweep.{kind}", given, inspect.signature(made).parameters)
    inner = {key: _made(kind, value) for key, value in given.items() if isinstance(value, dict) and "name" in value}
    try:
        return made(**{**given, **inner})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"sweep.{kind} {options['name']}: {first_line(error)}") from error


def _open_storage(place: str | None, folder: SweepFolder) -> BaseStorage:
    """SQLite in the folder, a database by its URL, or a journal file. Raises: ConfigError when it cannot be opened."""
    try:
        if place is not None and "://" not in place:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(place))
        url = place or f"sqlite:///{folder.database.absolute()}"
        waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        return RDBStorage(url, engine_kwargs=waiting)
    except Exception as error:  # of Optuna, SQLAlchemy, a driver or the system
        raise ConfigError(f"sweep.storage {place or folder.database} cannot be opened: {first_line(error)}") from error
