"""The train stage: a prepared folder and a config in, a run folder out.

``build`` makes what ``loop.py`` works on: a new run, or one that was interrupted. One step is in
``step.py``, the config and the run folder are in ``run.py``, going on with a run in ``resume.py``.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import nn

from shardrec.pipeline.checkpoint.writer import CheckpointWriter, writing_group
from shardrec.pipeline.config import describe, flatten
from shardrec.pipeline.interruption import never
from shardrec.pipeline.outputs.lock import RunLock
from shardrec.pipeline.prepared.loader import Prepared, TrainingBatches
from shardrec.pipeline.ranks import (
    default_group,
    on_first_rank,
    on_this_rank,
    rank_of,
    size_of,
)
from shardrec.pipeline.run.callbacks import Callback, EndReport, JsonLines, TensorBoard, progress
from shardrec.pipeline.run.config import (
    OURS,
    LimitConfig,
    TrainConfig,
    ValidationConfig,
    build_model,
    open_checkpoints,
    start_run,
)
from shardrec.pipeline.run.loop import Loop, Run
from shardrec.pipeline.run.mlflow_logging import open_mlflow
from shardrec.pipeline.run.profiler import Profiler
from shardrec.pipeline.run.progress import Progress
from shardrec.pipeline.run.replace import check_force, folder_for, moved_to, take_place
from shardrec.pipeline.run.resume import (
    Resume,
    begin_again,
    check_folder,
    find_end,
    restore,
    started,
)
from shardrec.pipeline.run.step import Stepper
from shardrec.pipeline.run.warm_start import start_from

__all__ = ["LimitConfig", "Run", "TrainConfig", "ValidationConfig", "build", "train"]


def train(
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    encoder: nn.Module | None = None,
    resume: Resume = "no",
    force: bool = False,
    interrupted: Callable[[], bool] = never,
) -> EndReport:
    """Train until a limit or the patience is reached; the run folder then holds last and best.

    Runs in one process as it is, and on the ranks of the default process group where there is one.
    Every step seeds torch's global generator from (seed, step, rank). A resumed run takes the steps
    that the interrupted one would have taken, bit for bit on as many ranks of the same machine.

    Args:
        config: the same on every rank.
        callbacks: called on every rank, after the trainer's own.
        encoder: (B, L, D) to (B, L, D), causal, used instead of the one ``config.encoder``
            describes; D is ``config.encoder.width``. Its initial weights are those of rank 0.
        resume: "no": the output folder must be new or empty; "yes": it must hold this run, which
            goes on from its last whole checkpoint; "auto": either. A run that is finished already
            is left as it is.
        force: train anew where the output folder holds a run, which stays there until the new one
            is complete. With "auto" an interrupted run, forced or not, goes on; only one that is
            finished is done again.
        interrupted: asked at every step; where it says yes on one rank, all write a checkpoint
            after that step and stop.

    Returns:
        How the run ended, the same on every rank.

    Raises:
        FileExistsError: the output folder holds something that is not to be continued, or another
            run is writing it.
        FileNotFoundError: there is no run to resume.
        FloatingPointError: loss or gradients were not finite in many steps in a row.
        OSError: the last checkpoint could not be written; those before it are whole.
        Preempted: the run was interrupted; resumed, it goes on from there.
        ValueError: the config does not fit the data or the run to resume.

    Collectives: many, on the default group; every rank must call it.
    """
    group = default_group()
    check_force(force, resume)
    output = Path(config.output)
    with contextlib.ExitStack() as held:
        find = functools.partial(folder_for, output, resume)
        folder = on_first_rank(lambda: held.enter_context(find()) if force else output, group)
        if folder == output:
            return _train(config, callbacks, encoder, resume, interrupted)
        if rank_of(group) == 0:
            message = "%s stays until the new run, in %s, is complete"
            logging.getLogger(__name__).warning(message, output, folder)
        report = _train(moved_to(folder, config), callbacks, encoder, resume, interrupted)
        report = dataclasses.replace(report, output=config.output)
        on_first_rank(lambda: take_place(config, folder, report), group)
        return report


def _train(
    config: TrainConfig,
    callbacks: Sequence[Callback],
    encoder: nn.Module | None,
    resume: Resume,
    interrupted: Callable[[], bool],
) -> EndReport:
    """As ``train``, in the output folder itself."""
    group = default_group()
    ended = on_first_rank(lambda: find_end(config, resume, _whose(encoder)), group)
    if ended is not None:
        if rank_of(group) == 0:
            message = "%s is finished already (%s): nothing to do"
            logging.getLogger(__name__).warning(message, config.output, ended.reason)
        return ended
    tracking = on_this_rank(lambda: _tracking(config), group)
    run = build(config, encoder=encoder, resume=resume)
    with run.held:
        if config.show_progress and run.is_first:
            plan = run.stepper.model.catalog.describe()
            print(describe(config), plan, sep="\n", file=sys.stderr, flush=True)
        own = [*_own_callbacks(run), *_profiling(config), *tracking]
        return Loop(run, [*own, *callbacks], interrupted).run_to_end()


def build(config: TrainConfig, *, encoder: nn.Module | None = None, resume: Resume = "no") -> Run:
    """Open the data, start the run folder or open it again, make the model and its optimizers.

    Args:
        config: the same on every rank.
        encoder: as in ``train``.
        resume: as in ``train``.

    Collectives: on the default group.
    """
    with contextlib.ExitStack() as held:
        run = _build(config, encoder, resume, held)
        return dataclasses.replace(run, held=held.pop_all())


def _build(
    config: TrainConfig, encoder: nn.Module | None, resume: Resume, held: contextlib.ExitStack
) -> Run:
    """As ``build``; what the run holds is in ``held`` where it fails, too."""
    group, lock = default_group(), RunLock(Path(config.output))
    held.callback(lock.release)
    prepared = on_this_rank(lambda: Prepared.open(config.data), group)
    is_new = on_first_rank(
        lambda: check_folder(config, prepared, _whose(encoder), resume, lock), group
    )
    batches = on_this_rank(lambda: _batches(config, prepared, group), group)
    _check_validation(config.validation, prepared)
    steps_per_epoch = -(-len(batches) // config.optimizer.accumulate)
    total_steps = _total_steps(config.limits, steps_per_epoch)
    counts = on_this_rank(prepared.item_counts, group)
    model = build_model(config, prepared.num_items, encoder, group)
    stepper = Stepper(
        model,
        config.loss,
        config.optimizer,
        seed=config.seed,
        total_steps=total_steps,
        item_counts=counts.to(model.device),
    )
    checkpoints = open_checkpoints(Path(config.output), config, group)
    found = None if is_new else restore(checkpoints, stepper, batches)
    at = found or Progress()
    if found is None:
        origin = start_from(config, prepared, stepper, _whose(encoder))
        start = functools.partial(start_run, config, prepared, _whose(encoder), origin)
        begun = functools.partial(started, config, start, lock, at, is_new=is_new)
        on_first_rank(lambda: held.enter_context(begun()), group)
    if not is_new:
        on_first_rank(lambda: begin_again(config, at.step, size_of(group)), group)
    checkpoints.group = held.enter_context(writing_group(group))
    return Run(
        config=config,
        prepared=prepared,
        batches=batches,
        stepper=stepper,
        writer=CheckpointWriter(checkpoints, background=config.checkpoints.background),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        progress=at,
        is_new=is_new,
        held=held,
    )


def _whose(encoder: nn.Module | None) -> str:
    return OURS if encoder is None else type(encoder).__qualname__


def _batches(
    config: TrainConfig, prepared: Prepared, group: dist.ProcessGroup | None
) -> TrainingBatches:
    return TrainingBatches(
        prepared,
        config.batches,
        max_length=config.encoder.max_length,
        rank=rank_of(group),
        world_size=size_of(group),
        seed=config.seed,
    )


def _check_validation(config: ValidationConfig, prepared: Prepared) -> None:
    if config.is_on and not prepared.manifest.counts["validation_users"]:
        raise ValueError(
            "validation must be off where the data has no validation users, got "
            f"every_epochs={config.every_epochs} and every_steps={config.every_steps}; set "
            "validation.every_epochs=none, or prepare with validation users"
        )


def _own_callbacks(run: Run) -> list[Callback]:
    """What rank 0 writes."""
    if not run.is_first:
        return []
    folder, every = Path(run.config.output), run.config.log_every
    first_step = None if run.is_new else run.progress.step + 1
    written: list[Callback] = [
        JsonLines(folder / "metrics.jsonl", every),
        TensorBoard(folder / "tensorboard", every, first_step),
    ]
    return [*written, progress(run.total_steps)] if run.config.show_progress else written


def _profiling(config: TrainConfig) -> list[Callback]:
    """A profile of some steps on every rank, where the config asks for it."""
    if not config.profile.steps:
        return []
    folder = Path(config.output) / "profile"
    return [Profiler(folder, config.profile, rank_of(default_group()))]


def _tracking(config: TrainConfig) -> list[Callback]:
    """MLflow on rank 0, where the config names a store; refused before the run folder is made."""
    if config.mlflow.uri is None or rank_of(default_group()):
        return []
    parameters = dict(flatten(config))
    return [open_mlflow(config.mlflow, Path(config.output), parameters, config.log_every)]


def _total_steps(limits: LimitConfig, steps_per_epoch: int) -> int | None:
    """The step at which the run ends, where steps or epochs are limited."""
    by_epochs = None if limits.max_epochs is None else limits.max_epochs * steps_per_epoch
    known = [steps for steps in (limits.max_steps, by_epochs) if steps is not None]
    return min(known, default=None)
