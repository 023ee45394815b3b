"""The train stage: a prepared folder and a config in, a run folder out.

``train`` is the loop. ``build`` makes what the loop works on. One step is in ``step.py``, the
config and the run folder are in ``run.py``.
"""

import statistics
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from shardrec.pipeline.callbacks import (
    Callback,
    CheckpointReport,
    EndReport,
    JsonLines,
    StepReport,
    TensorBoard,
    ValidationReport,
    progress,
)
from shardrec.pipeline.checkpoint import Checkpoints, CheckpointState
from shardrec.pipeline.config import describe, flatten, to_json
from shardrec.pipeline.data import Batch, Prepared, TrainingBatches
from shardrec.pipeline.group import (
    default_group,
    in_step,
    on_first_rank,
    on_this_rank,
    rank_of,
    size_of,
)
from shardrec.pipeline.init_from import start_from
from shardrec.pipeline.measure import measure, open_users
from shardrec.pipeline.mlflow_logging import open_mlflow
from shardrec.pipeline.run import (
    OURS,
    LimitConfig,
    TrainConfig,
    ValidationConfig,
    build_model,
    require_new,
    start_run,
)
from shardrec.pipeline.step import StepOutcome, Stepper

__all__ = ["LimitConfig", "Run", "TrainConfig", "ValidationConfig", "build", "train"]


@dataclass(frozen=True, slots=True)
class Run:
    """What ``build`` makes and the loop works on."""

    config: TrainConfig
    prepared: Prepared
    batches: TrainingBatches
    stepper: Stepper
    checkpoints: Checkpoints
    steps_per_epoch: int
    total_steps: int | None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return rank_of(self.stepper.model.group) == 0


def train(
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    encoder: nn.Module | None = None,
) -> EndReport:
    """Train until a limit or the patience is reached; the run folder then holds last and best.

    Runs in one process as it is, and on the ranks of the default process group where there is one.
    Every step seeds torch's global generator from (seed, step, rank).

    Args:
        config: the same on every rank.
        callbacks: called on every rank, after the trainer's own.
        encoder: (B, L, D) to (B, L, D), causal, used instead of the one ``config.encoder``
            describes; D is ``config.encoder.width``. Its initial weights are those of rank 0.

    Returns:
        How the run ended, the same on every rank.

    Raises:
        FileExistsError: the output folder holds something.
        FloatingPointError: loss or gradients were not finite in many steps in a row.
        ValueError: the config does not fit the data.

    Collectives: many, on the default group; every rank must call it.
    """
    tracking = on_this_rank(lambda: _tracking(config), default_group())
    run = build(config, encoder=encoder)
    if config.show_progress and run.is_first:
        plan = run.stepper.model.catalog.describe()
        print(describe(config), plan, sep="\n", file=sys.stderr, flush=True)
    return _Loop(run, [*_own_callbacks(run), *tracking, *callbacks]).run_to_end()


def build(config: TrainConfig, *, encoder: nn.Module | None = None) -> Run:
    """Open the data, start the run folder, make the model and its optimizers.

    Args:
        config: the same on every rank.
        encoder: as in ``train``.

    Collectives: on the default group.
    """
    group = default_group()
    on_first_rank(lambda: require_new(Path(config.output)), group)
    prepared = on_this_rank(lambda: Prepared.open(config.data), group)
    batches = on_this_rank(
        lambda: TrainingBatches(
            prepared,
            config.batches,
            max_length=config.encoder.max_length,
            rank=rank_of(group),
            world_size=size_of(group),
            seed=config.seed,
        ),
        group,
    )
    _check_validation(config.validation, prepared)
    steps_per_epoch = -(-len(batches) // config.optimizer.accumulate)
    total_steps = _total_steps(config.limits, steps_per_epoch)
    model = build_model(config, prepared.num_items, encoder, group)
    stepper = Stepper(
        model,
        config.loss,
        config.optimizer,
        seed=config.seed,
        total_steps=total_steps,
        item_counts=prepared.item_counts().to(model.device),
    )
    whose = OURS if encoder is None else type(encoder).__qualname__
    origin = start_from(config, prepared, stepper, whose)
    folder = on_first_rank(lambda: start_run(config, prepared, whose, origin), group)
    checkpoints = Checkpoints(folder / "checkpoints", group)
    return Run(config, prepared, batches, stepper, checkpoints, steps_per_epoch, total_steps)


class _Loop:
    """Where a run stands: steps, best validation, and what stops it."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        self.run = run
        self.callbacks = callbacks
        self.started = time.monotonic()
        self.step = self.saved_step = self.validated_step = 0
        self.num_skipped = self.skipped_in_a_row = 0
        self.validations_since_best = 0
        self.best: ValidationReport | None = None
        self.seconds = array("d")
        self.positions = self.slots = self.memory_bytes = 0

    def run_to_end(self) -> EndReport:
        reason: str | None = None
        for batches in self._batches():
            outcome = self._take(batches)
            if self._validation_is_due():
                self._validate()
            reason = self._reason_to_stop(outcome)
            if reason:
                break
        return self._finish(reason or "the data has no training sequences")

    def _batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of one step after another, epoch after epoch."""
        model = self.run.stepper.model
        self.fetch_started = time.monotonic()
        while self.run.steps_per_epoch:
            epoch = in_step(self.run.batches, model.group, model.device)
            while batches := list(islice(epoch, self.run.config.optimizer.accumulate)):
                yield batches
                self.fetch_started = time.monotonic()

    def _take(self, batches: list[Batch]) -> StepOutcome:
        self.step += 1
        outcome = self.run.stepper.take(batches, self.step, stop=self._time_is_up())
        self.seconds.append(time.monotonic() - self.fetch_started)
        self.positions += outcome.positions
        self.slots += outcome.slots
        self.memory_bytes = max(self.memory_bytes, outcome.memory_bytes)
        self.num_skipped += outcome.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome.skipped else 0
        report = StepReport(
            step=self.step,
            epoch=self._epoch(),
            loss=outcome.loss,
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            positions=outcome.positions,
            padding_share=1 - outcome.positions / max(1, outcome.slots),
            seconds=self.seconds[-1],
            skipped=outcome.skipped,
            num_skipped=self.num_skipped,
            memory_bytes=self.memory_bytes,
            statistics=outcome.statistics,
        )
        for callback in self.callbacks:
            callback.on_step(report)
        self._require_progress()
        return outcome

    def _require_progress(self) -> None:
        limit = self.run.config.optimizer.max_skipped
        if self.skipped_in_a_row >= limit:
            raise FloatingPointError(
                f"loss and gradients must be finite, got {limit} steps in a row (up to step "
                f"{self.step}) where they were not; lower the learning rates, set "
                "optimizer.clip_norm, or look for broken weights in the data. The checkpoints "
                "written before are whole"
            )

    def _validation_is_due(self) -> bool:
        due = self.run.config.validation
        by_steps = due.every_steps is not None and self.step % due.every_steps == 0
        in_epochs = due.every_epochs and self.run.steps_per_epoch * due.every_epochs
        return by_steps or bool(in_epochs and self.step % in_epochs == 0)

    def _validate(self) -> None:
        """Measure, then keep the weights."""
        started = time.monotonic()
        config, model = self.run.config.validation, self.run.stepper.model
        model.encoder.eval()
        batches = open_users(
            self.run.prepared,
            "validation",
            config.measure,
            self.run.config.encoder.max_length,
            model.group,
        )
        shard = model.scored_shard()
        metrics = measure(model.last_states, shard, batches, config.measure, self.run.prepared)
        value = metrics[config.metric]
        improved = self.best is None or value > self.best.metrics[config.metric]
        report = ValidationReport(
            step=self.step,
            epoch=self._epoch(),
            metric=config.metric,
            metrics=metrics,
            improved=improved,
            seconds=time.monotonic() - started,
        )
        self.validated_step = self.step
        self.validations_since_best = 0 if improved else self.validations_since_best + 1
        self.best = report if improved else self.best
        for callback in self.callbacks:
            callback.on_validation(report)
        self._save(best=improved)

    def _save(self, *, best: bool) -> None:
        started = time.monotonic()
        stepper = self.run.stepper
        state = CheckpointState(
            encoder=stepper.model.encoder.state_dict(),
            optimizer=stepper.optimizer.state_dict(),
            table=stepper.model.catalog.state_dict(),
            progress={
                "step": self.step,
                "num_skipped": self.num_skipped,
                "best_step": self.best.step if self.best else None,
                "best_metrics": dict(self.best.metrics) if self.best else {},
                "validations_since_best": self.validations_since_best,
                "data": self.run.batches.state_dict(),
            },
            config=to_json(self.run.config),
        )
        folder = self.run.checkpoints.save(self.step, state, best=best)
        self.saved_step = self.step
        report = CheckpointReport(
            step=self.step, folder=str(folder), best=best, seconds=time.monotonic() - started
        )
        for callback in self.callbacks:
            callback.on_checkpoint(report)

    def _reason_to_stop(self, outcome: StepOutcome) -> str | None:
        config = self.run.config
        if self.step == self.run.total_steps:
            by_steps = self.step == config.limits.max_steps
            return f"max_{'steps' if by_steps else 'epochs'} reached"
        if outcome.stop:
            return "max_minutes reached"
        patience = config.validation.patience
        if patience is not None and self.validations_since_best >= patience:
            return f"no better {config.validation.metric} in {patience} validations"
        return None

    def _time_is_up(self) -> bool:
        """Only rank 0's clock counts; the step tells the others."""
        minutes = self.run.config.limits.max_minutes
        late = minutes is not None and time.monotonic() - self.started >= 60 * minutes
        return late and self.run.is_first

    def _epoch(self) -> float:
        return self.step / self.run.steps_per_epoch

    def _finish(self, reason: str) -> EndReport:
        if self.run.config.validation.is_on and self.validated_step < self.step:
            self._validate()
        if self.saved_step < self.step:
            self._save(best=False)
        report = EndReport(
            output=self.run.config.output,
            reason=reason,
            step=self.step,
            epoch=self._epoch() if self.step else 0.0,
            seconds=time.monotonic() - self.started,
            seconds_per_step=statistics.median(self.seconds[1:] or self.seconds or [0.0]),
            positions_per_second=self.positions / max(1e-9, sum(self.seconds)),
            padding_share=1 - self.positions / max(1, self.slots),
            memory_bytes=self.memory_bytes,
            num_skipped=self.num_skipped,
            best_step=self.best.step if self.best else None,
            best_metrics=self.best.metrics if self.best else {},
        )
        for callback in self.callbacks:
            callback.on_end(report)
        return report


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
    written: list[Callback] = [
        JsonLines(folder / "metrics.jsonl", every),
        TensorBoard(folder / "tensorboard", every),
    ]
    return [*written, progress(run.total_steps)] if run.config.show_progress else written


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
