"""A study: the trials of ``tune``, kept by Optuna in the study's folder."""

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardrec.modules.option_checks import require_above_zero, require_at_least
from shardrec.pipeline.config import to_json
from shardrec.pipeline.outputs.json_files import read_json, write_atomically
from shardrec.pipeline.outputs.lock import LOCK, lock_file, open_lock
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.tuning.space import Searched, starting_point

__all__ = ["BEST", "STUDY", "TRIALS", "Claim", "Study", "Trial", "TuneConfig", "Tuned"]

STUDY, STORAGE, TRIALS, BEST = "study.json", "study.db", "trials", "best.json"
# Attributes of a trial in the storage.
_OPTIONS, _MINUTES = "options", "minutes"


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """How long ``tune`` searches, and where its study is.

    Attributes:
        output: folder of the study; a study of the same request in it goes on.
        minutes: wall time of this call. The trial that is running when it is over ends with it.
        trials: trials of the study at which the search ends; none: only the time ends it.
        patience: trials that run to their end before others may be ended early, because their
            validations are below the median of earlier trials at the same step.
        seed: of the search; that of the runs is the option ``seed`` of training.
    """

    output: str
    minutes: float = 60.0
    trials: int | None = None
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a search without time or trials."""
        require_above_zero("minutes", self.minutes, "give e.g. 60")
        require_at_least("trials", 1 if self.trials is None else self.trials, 1)
        require_at_least("patience", self.patience, 1)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a study.

    Attributes:
        number: names its folder.
        options: of training, by dotted name, as they are typed.
        value: the best of its validations; None without one.
    """

    number: int
    options: Mapping[str, str]
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a study has found so far, the same on every rank.

    Attributes:
        trials: all that have ended, the best first; those without a validation last.
        num_pruned: how many of them were ended early, or diverged.
    """

    trials: Sequence[Trial]
    num_pruned: int

    @property
    def best(self) -> Trial | None:
        """The trial with the best validation; None before the first one."""
        return next((trial for trial in self.trials if trial.value is not None), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """A trial that this process is to run.

    Attributes:
        folder: name of its run folder.
        options: of training, by dotted name, as they are typed.
        minutes: that it may take.
    """

    folder: str
    options: Mapping[str, str]
    minutes: float


class Study:
    """Optuna's side of a study, on rank 0."""

    def __init__(self, config: TuneConfig, base: TrainConfig, space: Sequence[Searched]) -> None:
        """Open the study in the folder, or start one.

        Raises:
            ModuleNotFoundError: optuna is not installed.
            ValueError: the folder holds a study of another request.
        """
        optuna = _optuna()
        self.config, self.space, self.metric = config, space, base.validation.metric
        self.until = time.monotonic() + 60 * config.minutes
        self.folder = Path(config.output)
        (self.folder / TRIALS).mkdir(parents=True, exist_ok=True)
        with self._alone():
            _require_same(self.folder, _request(config, base, space))
            storage = optuna.storages.RDBStorage(f"sqlite:///{self.folder / STORAGE}")
            pruner = optuna.pruners.MedianPruner(n_startup_trials=config.patience)
            self.study = optuna.create_study(
                storage=storage,
                study_name="tune",
                direction="maximize",
                pruner=pruner,
                load_if_exists=True,
            )
            if not self.study.trials:
                self.study.enqueue_trial(starting_point(space, base))

    def claim(self, held: contextlib.ExitStack) -> Claim | None:
        """The next trial for this process: one that was interrupted, or a new one.

        Returns None when the time or the trials are over. The trial is locked until ``held`` is
        closed, so that no other process takes it.
        """
        left = (self.until - time.monotonic()) / 60
        if left <= 0:
            return None
        with self._alone():
            trial = self._interrupted(held) or self._new(held, left)
        if trial is None:
            return None
        self.trial = trial
        stored = trial.user_attrs
        return Claim(_name(trial.number), stored[_OPTIONS], stored[_MINUTES])

    def is_hopeless(self, value: float, step: int) -> bool:
        """Store a validation of the trial; whether it is below the median of earlier trials."""
        self.trial.report(value, step)
        return bool(self.trial.should_prune())

    def end(self, value: float | None) -> None:
        """Store how the trial ended, None if early; keeps the weights of the best one only."""
        states = _optuna().trial.TrialState
        state = states.PRUNED if value is None else states.COMPLETE
        self.study.tell(self.trial, value, state=state)
        found = self.found()
        best = found.best
        if best is None:
            return
        text = json.dumps(
            {
                "trial": best.number,
                "metric": self.metric,
                "value": best.value,
                "options": dict(best.options),
            },
            indent=2,
        )
        write_atomically(self.folder / BEST, text + "\n")
        for trial in found.trials:
            if trial.number != best.number:
                weights = self.folder / TRIALS / _name(trial.number) / "checkpoints"
                shutil.rmtree(weights, ignore_errors=True)

    def found(self) -> Tuned:
        """The trials that have ended, the best first."""
        states = _optuna().trial.TrialState
        ended = [trial for trial in self.study.trials if trial.state.is_finished()]
        trials = [
            Trial(
                trial.number,
                trial.user_attrs.get(_OPTIONS, {}),
                trial.value if trial.state == states.COMPLETE else None,
            )
            for trial in ended
        ]
        trials.sort(key=lambda trial: -math.inf if trial.value is None else trial.value)
        return Tuned(trials[::-1], sum(trial.value is None for trial in trials))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Context manager: no other process starts or claims a trial."""
        path = self.folder / LOCK
        file = open_lock(path)
        try:
            lock_file(file, path, wait=True)
            yield
        finally:
            os.close(file)

    def _interrupted(self, held: contextlib.ExitStack) -> Any | None:
        """A trial that was started and that no process is running."""
        optuna = _optuna()
        for trial in self.study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            if _OPTIONS in trial.user_attrs and self._lock(trial.number, held):
                return optuna.trial.Trial(self.study, trial._trial_id)
        return None

    def _new(self, held: contextlib.ExitStack, minutes: float) -> Any | None:
        """A new trial with the options that the sampler proposes; None if there are enough."""
        optuna = _optuna()
        states = optuna.trial.TrialState
        begun = [trial for trial in self.study.trials if trial.state != states.WAITING]
        if self.config.trials is not None and len(begun) >= self.config.trials:
            return None
        # Numbered seeds: a study that goes on, or a second process, does not repeat draws.
        seed = self.config.seed + len(begun)
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = self.study.ask()
        if not self._lock(trial.number, held):
            raise RuntimeError(f"trial {trial.number} is new and must not be locked")
        trial.set_user_attr(_MINUTES, minutes)
        options = {searched.name: searched.suggest(trial) for searched in self.space}
        trial.set_user_attr(_OPTIONS, options)
        return trial

    def _lock(self, number: int, held: contextlib.ExitStack) -> bool:
        """Whether this process may run the trial; the lock is kept until ``held`` is closed."""
        path = self.folder / TRIALS / f".{_name(number)}.lock"
        file = open_lock(path)
        if not lock_file(file, path):
            os.close(file)
            return False
        held.callback(os.close, file)
        return True


def _name(number: int) -> str:
    """The folder of a trial."""
    return f"{number:04d}"


def _request(config: TuneConfig, base: TrainConfig, space: Sequence[Searched]) -> Mapping[str, Any]:
    """All that the trials depend on."""
    trained = to_json(replace(base, output=""))
    searched = {one.name: [*one.extremes(), one.is_log] for one in space}
    fingerprint = Prepared.open(base.data).fingerprint
    return {"train": trained, "data": fingerprint, "search": searched, "seed": config.seed}


def _require_same(folder: Path, request: Mapping[str, Any]) -> None:
    """Store the request of a new study; refuse another one in its folder, and other files."""
    path = folder / STUDY
    if not path.exists():
        found = {one.name for one in folder.iterdir()} - {TRIALS, LOCK}
        if found:
            raise FileExistsError(
                f"output must be new or hold a study, got {folder} with {min(found)}; choose "
                "another folder"
            )
        write_atomically(path, json.dumps(request, indent=2) + "\n")
    stored = read_json(path)
    if stored != json.loads(json.dumps(request)):
        raise ValueError(
            f"output must be new or hold a study of the same options, got {folder} with "
            "another one (see study.json); choose another folder or repeat its options"
        )


def _optuna() -> Any:
    """The library, quiet about each trial.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tune needs optuna, which is not installed; install shardrec[tune]"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
