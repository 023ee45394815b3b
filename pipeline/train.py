"""The train stage: train a model on a prepared folder and write a run folder.

``run/build.py`` makes the run, ``run/loop.py`` is the training loop, ``run/step.py`` one step.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.config import flatten
from shardrec.pipeline.memorize import MemorizeConfig, memorize
from shardrec.pipeline.outputs.addresses import warn_of_keys
from shardrec.pipeline.ranks import default_group, on_first_rank, on_this_rank
from shardrec.pipeline.run.agreement import code_facts, require_same
from shardrec.pipeline.run.build import build
from shardrec.pipeline.run.callbacks import (
    Callback,
    EndReport,
    JsonLines,
    TensorBoard,
    in_notebook,
    progress,
)
from shardrec.pipeline.run.config import LimitConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.run.folder import METRICS, encoder_name
from shardrec.pipeline.run.loop import Loop, Run
from shardrec.pipeline.run.mlflow_logging import open_mlflow
from shardrec.pipeline.run.own_code import own_callbacks, own_encoder
from shardrec.pipeline.run.profiler import Profiler
from shardrec.pipeline.run.replace import check_force, moved_to, replace_run, training_folder
from shardrec.pipeline.run.resume import Resume, find_end
from shardrec.pipeline.run.screen import ending, opening

__all__ = ["LimitConfig", "Run", "TrainConfig", "ValidationConfig", "build", "train"]


def train(
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    encoder: nn.Module | None = None,
    resume: Resume = "no",
    force: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    node_size: int | None = None,
) -> EndReport:
    """Train until a limit or the patience is reached; keeps the last and the best weights.

    Runs on the ranks of the default process group if there is one, else in this process alone.
    Every step seeds torch's global generator from (seed, step, rank). A resumed run takes the steps
    that the interrupted one would have taken, bit for bit on the same number of ranks of the same
    machine.

    Args:
        config: the same on every rank.
        callbacks: called on every rank, after the trainer's own and those that the config names.
        encoder: causal module from (B, L, D) to (B, L, D), used instead of the encoder that
            ``config`` describes; D is ``config.encoder.width``. All ranks start from the weights of
            rank 0.
        resume: "no": the output folder must be new or empty; "yes": it must hold this run, which
            resumes from its last complete checkpoint; "auto": either. A finished run is left
            unchanged.
        force: replace the run in the output folder, which stays there until the new one is
            complete. With "auto" an interrupted run, forced or not, is resumed; only a finished
            one is replaced.
        interrupted: called at every step; if it returns True on one rank, all ranks write a
            checkpoint after that step and stop.
        node_size: ranks of this node, for the default of ``parallel.shards``; None: unknown.

    Returns:
        How the run ended, the same on every rank.

    Raises:
        FileExistsError: the output folder holds something that must not be continued, or another
            process is writing it.
        FileNotFoundError: there is no run to resume.
        FloatingPointError: loss or gradients were not finite in many steps in a row, or the scores
            of a validation were not numbers.
        OSError: the last checkpoint could not be written; those before it are complete.
        Preempted: the run was interrupted after a checkpoint; resume it to continue.
        ValueError: the config does not fit the data or the run to resume, or a rank was started
            with other options, data or code.

    Collectives: many, on the default group; every rank must call it.
    """
    check_force(force, resume)
    group, output = default_group(), Path(config.output)
    encoder = on_this_rank(lambda: own_encoder(config) if encoder is None else encoder, group)
    require_same(_start(config, encoder_name(encoder), resume, force), group)
    if Communicator(group).rank == 0:
        warn_of_keys("checkpoints.folder", config.checkpoints.folder)
        warn_of_keys("mlflow.uri", config.mlflow.uri)
    with contextlib.ExitStack() as held:
        find = functools.partial(training_folder, output, resume, force=force)
        folder = on_first_rank(lambda: held.enter_context(find()), group)
        placed = moved_to(folder, config)
        report = on_first_rank(lambda: find_end(placed, resume, encoder_name(encoder)), group)
        was_done = report is not None
        if report is not None:
            done = f"{output} is finished already ({report.reason}): nothing to do"
            _show(config, lambda: done)
        else:
            tracking = on_this_rank(lambda: _tracking(placed), group)
            run = build(placed, encoder=encoder, resume=resume, node_size=node_size)
            config = dataclasses.replace(config, parallel=run.config.parallel)
            with run.held:
                plan = [run.stepper.model.catalog.describe(), run.layout.advice]
                _show(
                    run.config,
                    lambda: opening(
                        run.config, "\n".join(filter(None, plan)), run.batches.target_share()
                    ),
                )
                built_in = [*_built_in_callbacks(run), *_profiling(placed), *tracking]
                own = on_this_rank(lambda: own_callbacks(config.callbacks), group)
                called = [*built_in, *own, *callbacks]
                report = Loop(run, called, interrupted).run_to_end()
        if folder != output:
            report = on_first_rank(functools.partial(replace_run, config, folder, report), group)
    if config.memory.neighbors:
        memorized = memorize(_memory_of(config, is_new=not was_done), encoder=encoder)
        _show(config, memorized.describe)
    _show(config, lambda: ending(report, config))
    return report


def _memory_of(config: TrainConfig, *, is_new: bool) -> MemorizeConfig:
    """The memory that the run ends with, chosen as the best checkpoint is."""
    measure = config.validation.measure
    return MemorizeConfig(
        run=config.output,
        prepared=config.data,
        neighbors=config.memory.neighbors,
        scales=config.memory.scales,
        metric=config.validation.metric,
        ks=measure.ks,
        filter_seen=measure.filter_seen,
        sample_users=measure.sample_users,
        force=is_new,
    )


def _start(config: TrainConfig, encoder: str, resume: Resume, force: bool) -> dict[str, Any]:
    """What must be the same on all ranks before they train; of the data, the content is."""
    options = {name: value for name, value in flatten(config) if name != "data"}
    command = {"stage": "train", "resume": resume, "force": force, "encoder": encoder}
    return options | command | code_facts()


def _show(config: TrainConfig, text: Callable[[], str]) -> None:
    """Print a text on rank 0, if the run shows its progress; a notebook has the bar alone."""
    if config.show_progress and not in_notebook() and Communicator(default_group()).rank == 0:
        print(text(), file=sys.stderr, flush=True)


def _built_in_callbacks(run: Run) -> list[Callback]:
    """The built-in callbacks, on rank 0 only."""
    if not run.is_first:
        return []
    folder, every = Path(run.config.output), run.config.log_every
    first_step = None if run.is_new else run.progress.step + 1
    written: list[Callback] = [
        JsonLines(folder / METRICS, every),
        TensorBoard(folder / "tensorboard", every, first_step),
    ]
    if not run.config.show_progress:
        return written
    shown = [progress(run.total_steps)]
    if in_notebook():
        from shardrec.pipeline.run.live_curve import live_curve

        shown.append(live_curve())
    return [*written, *shown]


def _profiling(config: TrainConfig) -> list[Callback]:
    """A profile of some steps on every rank, where the config asks for it."""
    if not config.profile.steps:
        return []
    folder = Path(config.output) / "profile"
    return [Profiler(folder, config.profile, Communicator(default_group()).rank)]


def _tracking(config: TrainConfig) -> list[Callback]:
    """MLflow on rank 0, if the config names a store; raises before the run folder is made."""
    if config.mlflow.uri is None or Communicator(default_group()).rank:
        return []
    parameters = dict(flatten(config))
    return [open_mlflow(config.mlflow, Path(config.output), parameters, config.log_every)]
