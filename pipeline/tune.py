"""The tune stage: search options of training, by a metric on the validation users.

::

    STUDY/study.json     what is tuned; another request in the same folder is refused
    STUDY/study.db       every trial, its options and its validations (Optuna's SQLite storage)
    STUDY/trials/0007    the run folder of trial 7; ``shardrec report STUDY/trials/*`` compares them
    STUDY/best.json      the best trial so far, its options and its metric

Started again, a study goes on: an interrupted trial from its last checkpoint, then new ones.
Several processes of one machine may work on one study, each on a trial of its own.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from shardrec.pipeline.config import override as with_options
from shardrec.pipeline.ranks import default_group, on_first_rank
from shardrec.pipeline.run.callbacks import Callback, EndReport, ValidationReport
from shardrec.pipeline.run.config import MemoryConfig, TrainConfig
from shardrec.pipeline.train import train
from shardrec.pipeline.tuning.space import DEFAULT_SPACE, check_space, read_space
from shardrec.pipeline.tuning.study import TRIALS, Claim, Study, Trial, TuneConfig, Tuned

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["Trial", "TuneConfig", "Tuned", "tune"]


def tune(
    config: TuneConfig,
    base: TrainConfig,
    search: Sequence[str] = DEFAULT_SPACE,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Train with varying options until the time or the trials are over; keeps the best weights.

    The first trial has the options of ``base``. Later ones are proposed by a tree-structured
    Parzen estimator (Bergstra et al., NeurIPS 2011). The weights of other trials are removed.

    Args:
        config: the same on every rank.
        base: what every trial trains, but for the options searched; its output is not used.
        search: options and their values, see ``read_space``.
        interrupted: as for ``train``; the study is to be started again.

    Raises:
        ModuleNotFoundError: optuna is not installed.
        Preempted: the trial was interrupted after a checkpoint.
        ValueError: an option does not exist, nothing is validated, or the folder holds a study of
            another request.

    Collectives: those of ``train`` and a few all-gathers of small objects for each trial and
    validation, on the default group; every rank must call it.
    """
    space = read_space(search)
    check_space(space, base)
    if not base.validation.is_on:
        raise ValueError(
            "validation must be on to tune, got validation.every_epochs=none and "
            "validation.every_steps=none; set one of them"
        )
    group = default_group()
    with contextlib.ExitStack() as held:
        studies: list[Study] = []  # on rank 0 only
        on_first_rank(lambda: studies.append(Study(config, base, space)), group)
        while True:
            claim = on_first_rank(lambda: studies[0].claim(held), group)
            if claim is None:
                return on_first_rank(lambda: studies[0].found(), group)
            _run(claim, base, config, studies, group, interrupted)
            held.close()


def _run(
    claim: "Claim",
    base: TrainConfig,
    config: TuneConfig,
    studies: "Sequence[Study]",
    group: "dist.ProcessGroup | None",
    interrupted: Callable[[], bool],
) -> None:
    """Train one trial and store how it ended."""
    folder = Path(config.output) / TRIALS / claim.folder
    placed = replace(
        with_options(base, [f"{name}={text}" for name, text in claim.options.items()]),
        output=str(folder),
        memory=MemoryConfig(),  # a memory would be ranked with for every trial
    )
    minutes = min(claim.minutes, placed.limits.max_minutes or math.inf)
    placed = replace(placed, limits=replace(placed.limits, max_minutes=minutes))
    pruning = Pruning(lambda value, step: studies[0].is_hopeless(value, step), group)
    end: EndReport | None = None
    with contextlib.suppress(_Hopeless, FloatingPointError):  # a diverged run is as bad as any
        end = train(placed, callbacks=[pruning], resume="auto", interrupted=interrupted)
    value = None if end is None else end.best_metrics[base.validation.metric]
    on_first_rank(lambda: studies[0].end(value), group)


class _Hopeless(Exception):  # noqa: N818
    """Ends a trial whose validations are below those of earlier ones."""


class Pruning(Callback):
    """Ends a run when rank 0 says so after a validation."""

    def __init__(
        self, is_hopeless: Callable[[float, int], bool], group: "dist.ProcessGroup | None"
    ) -> None:
        """Store the decision, which is called on rank 0, and the ranks that follow it."""
        self.is_hopeless, self.group = is_hopeless, group

    @override
    def on_validation(self, report: ValidationReport) -> None:
        value = report.metrics[report.metric]
        if on_first_rank(lambda: self.is_hopeless(value, report.step), self.group):
            raise _Hopeless
