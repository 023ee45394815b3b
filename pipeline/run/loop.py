"""The training loop: steps, validations, checkpoints, and what ends a run.

The phases of a step:
1. Take the step. The micro-batches of the next step are loaded before it, so that the next look-up
   can start during the backward pass.
2. If all ranks have finished writing the checkpoint in flight, report it.
3. Validate if a validation is due, or if a limit ends the run.
4. Start a checkpoint if one is due, after a validation, or if the run stops here.
5. End the run at a limit or when patience runs out; if interrupted, wait for the checkpoint and
   raise ``Preempted``.
All ranks take the same decisions, which depend on step counts and on all-reduced ``StepFlags``.
"""

import contextlib
import math
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.ranking import Blocks
from shardrec.pipeline.checkpoint.store import CheckpointState
from shardrec.pipeline.checkpoint.writer import CheckpointReport, CheckpointWriter
from shardrec.pipeline.config import to_json
from shardrec.pipeline.model.measure import measure, open_users
from shardrec.pipeline.model.ranker import StateRanker
from shardrec.pipeline.outputs.addresses import stored_without_keys
from shardrec.pipeline.prepared.loader import Batch, Prepared, TrainingBatches
from shardrec.pipeline.ranks import in_step, on_first_rank
from shardrec.pipeline.run.ahead import made_ahead
from shardrec.pipeline.run.callbacks import Callback, EndReport, StepReport, ValidationReport
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.interruption import Preempted
from shardrec.pipeline.run.layout import Layout
from shardrec.pipeline.run.progress import Progress
from shardrec.pipeline.run.resume import write_end
from shardrec.pipeline.run.step import StepFlags, StepOutcome, Stepper

__all__ = ["Loop", "Run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The parts of a run, made by ``build`` and used by ``Loop``.

    Attributes:
        config: the config of the run.
        prepared: the data.
        batches: data loader, at the position where the run starts or resumes.
        stepper: model and optimizers, initialised or restored.
        writer: writes the checkpoints.
        progress: counters, from 0 or restored.
        is_new: whether the run is new, and not resumed.
        layout: how the ranks are laid out.
        ahead: whether a thread makes the next batch during a step.
        held: closing it releases the lock of the run folder and the writer's process group.
    """

    config: TrainConfig
    prepared: Prepared
    batches: TrainingBatches
    stepper: Stepper
    writer: CheckpointWriter
    progress: Progress
    is_new: bool
    layout: Layout
    ahead: bool
    held: contextlib.ExitStack

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return Communicator(self.stepper.model.group).rank == 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return -(-len(self.batches) // self.config.optimizer.accumulate)

    @property
    def total_steps(self) -> int | None:
        """Number of optimizer steps of the whole run; None if only time or patience ends it."""
        return self.stepper.total_steps


@dataclass(frozen=True, slots=True)
class _Placed:
    """A batch, and the state of the data loader after it."""

    batch: Batch
    state: dict[str, Any]


def _placed(batches: TrainingBatches, *, pinned: bool) -> Iterator[_Placed]:
    """The batches to the end of the epoch; no one else may ask for the loader's state."""
    for batch in batches:
        yield _Placed(batch.pinned() if pinned else batch, batches.state_dict())


class Loop:
    """The training loop: continues a run from its current step to its end."""

    def __init__(
        self, run: Run, callbacks: Sequence[Callback], interrupted: Callable[[], bool]
    ) -> None:
        """Store the run, its callbacks, and the function that asks to stop early."""
        self.run = run
        self.callbacks = callbacks
        self.interrupted = interrupted
        self.at = run.progress
        self.started = time.monotonic() - run.progress.seconds
        self.saved_at = time.monotonic()
        self.first_positions = run.progress.positions
        self.seconds = array("d")
        self.at_data = run.batches.state_dict()
        self.memory_bytes = 0
        self.validation_seconds = 0.0

    def run_to_end(self) -> EndReport:
        """Train, validate and save until the run ends; return the report on its end.

        Raises:
            Preempted: the run was interrupted; the checkpoint of its last step is complete.
            FloatingPointError: loss or gradients were not finite in too many steps in a row, or
                weights to be saved are not finite.
            OSError: the last checkpoint could not be written.

        Collectives: many, on the model's group; every rank must call it.
        """
        try:
            # A run that was interrupted just before its end takes no more steps.
            reason = self._limit_reached() or self._patience_is_over()
            for batches, following in self._steps() if reason is None else ():
                outcome = self._take(batches, following)
                if outcome.flags.written:
                    self._report_checkpoints(self.run.writer.collect())
                reason = self._end_step(outcome)
                if reason is not None:
                    break
                if outcome.flags.interrupt:
                    self._stop_early()
            assert reason is not None, "build refuses data without training sequences"
            return self._finish(reason)
        except BaseException:
            self.run.writer.abandon()
            raise

    def _steps(self) -> Iterator[tuple[list[Batch], Batch | None]]:
        """The micro-batches of each step, and the first one of the step after it."""
        self.fetch_started = time.monotonic()
        coming = self._batches()
        taken = next(coming, None)
        while taken is not None:
            # The state after this step must not count the batches that are fetched ahead.
            self.at_data = taken[-1].state
            is_last = self.at.step + 1 == self.run.total_steps
            following = None if is_last else next(coming, None)
            own = (following or [])[self.run.batches.replica :]
            yield [one.batch for one in taken], own[0].batch if own else None
            self.fetch_started = time.monotonic()
            taken = following

    def _batches(self) -> Iterator[list["_Placed"]]:
        """The micro-batches of each step, epoch after epoch."""
        model = self.run.stepper.model
        while self.run.steps_per_epoch:
            placed = _placed(self.run.batches, pinned=model.device.type == "cuda")
            made = made_ahead(placed) if self.run.ahead else placed
            epoch = in_step(made, model.group, model.device)
            while taken := list(islice(epoch, self.run.config.optimizer.accumulate)):
                yield taken

    def _take(self, batches: list[Batch], following: Batch | None) -> StepOutcome:
        at = self.at
        outcome = self.run.stepper.take(batches, at.step + 1, self._flags(), following)
        at.step += 1
        self.seconds.append(time.monotonic() - self.fetch_started)
        at.positions += outcome.positions
        at.slots += outcome.slots
        at.num_skipped += outcome.skipped
        at.skipped_in_a_row = at.skipped_in_a_row + 1 if outcome.skipped else 0
        self.memory_bytes = max(self.memory_bytes, outcome.memory_bytes)
        report = StepReport(
            step=at.step,
            epoch=self._epoch(),
            loss=outcome.loss,
            learning_rate=outcome.learning_rate,
            gradient_norm=outcome.gradient_norm,
            positions=outcome.positions,
            padding_share=1 - outcome.positions / max(1, outcome.slots),
            seconds=self.seconds[-1],
            skipped=outcome.skipped,
            num_skipped=at.num_skipped,
            memory_bytes=self.memory_bytes,
            statistics=outcome.statistics,
        )
        for callback in self.callbacks:
            callback.on_step(report)
        self._require_progress()
        return outcome

    def _flags(self) -> StepFlags:
        """This rank's flags; only rank 0 reads the clock, so all ranks agree on the time."""
        every = self.run.config.checkpoints.every_minutes
        now, is_first = time.monotonic(), self.run.is_first
        return StepFlags(
            stop=is_first and self._minutes_left() <= 0,
            save=is_first and every is not None and now - self.saved_at >= 60 * every,
            interrupt=self.interrupted(),
            written=self.run.writer.is_over,
        )

    def _minutes_left(self) -> float:
        """Until the time limit, less the time that the last validation took."""
        limit = self.run.config.limits.max_minutes
        used = time.monotonic() - self.started + self.validation_seconds
        return math.inf if limit is None else limit - used / 60

    def _time_is_up(self) -> str | None:
        """Whether the run ends with the validation just made; rank 0's clock decides.

        Otherwise a limit that passes in a validation would cost a step and another validation.
        """
        if self.run.config.limits.max_minutes is None:
            return None
        left = on_first_rank(self._minutes_left, self.run.stepper.model.group)
        return "max_minutes reached" if left <= 0 else None

    def _require_progress(self) -> None:
        limit = self.run.config.optimizer.max_skipped
        if self.at.skipped_in_a_row >= limit:
            raise FloatingPointError(
                f"loss and gradients must be finite, got {limit} steps in a row (up to step "
                f"{self.at.step}) where they were not; lower the learning rates, set "
                "optimizer.clip_norm, or look for broken weights in the data. The checkpoints "
                "written before are complete"
            )

    def _end_step(self, outcome: StepOutcome) -> str | None:
        """Validate and save if due; returns why the run ends, or None."""
        reason = "max_minutes reached" if outcome.flags.stop else None
        reason = self._limit_reached() or reason
        validation, improved = self.run.config.validation, False
        is_validated = self._validation_is_due() or (reason is not None and validation.is_on)
        if is_validated:
            with self.run.stepper.averaged():
                improved = self._validate()
            reason = reason or self._time_is_up()
        reason = reason or self._patience_is_over()
        asked = outcome.flags.save or outcome.flags.interrupt
        if reason is not None or is_validated or asked or self._checkpoint_is_due():
            self._save(best=improved)
        return reason

    def _validation_is_due(self) -> bool:
        due = self.run.config.validation
        by_steps = due.every_steps is not None and self.at.step % due.every_steps == 0
        in_epochs = due.every_epochs and self.run.steps_per_epoch * due.every_epochs
        return by_steps or bool(in_epochs and self.at.step % in_epochs == 0)

    def _checkpoint_is_due(self) -> bool:
        every = self.run.config.checkpoints.every_steps
        return every is not None and self.at.step % every == 0

    def _validate(self) -> bool:
        """Measure the model; returns whether it is the best so far."""
        started = time.monotonic()
        config, model = self.run.config.validation, self.run.stepper.model
        model.encoder.eval()
        max_length = self.run.config.encoder.max_length
        how = config.measure
        blocks = Blocks(states=how.block_states, rows=how.block_rows)
        ranker = StateRanker.of(model, max_length, blocks)
        batches = open_users(self.run.prepared, "validation", how, max_length, model.group)
        metrics = measure(ranker, batches, how, self.run.prepared).metrics
        best, value = self.at.best, metrics[config.metric]
        improved = best is None or value > best.metrics[config.metric]
        report = ValidationReport(
            step=self.at.step,
            epoch=self._epoch(),
            metric=config.metric,
            metrics=metrics,
            improved=improved,
            seconds=time.monotonic() - started,
        )
        self.validation_seconds = report.seconds
        self.at.validations_since_best = 0 if improved else self.at.validations_since_best + 1
        self.at.best = report if improved else best
        for callback in self.callbacks:
            callback.on_validation(report)
        return improved

    def _save(self, *, best: bool) -> None:
        """Start a checkpoint of this step.

        Raises:
            FloatingPointError: weights are not finite (the run has diverged); saving them would
                replace good checkpoints.
        """
        stepper = self.run.stepper
        if not stepper.weights_are_finite():
            self._finish_checkpoint()
            raise FloatingPointError(
                "weights must be finite to be saved, got NaN or infinity after step "
                f"{self.at.step}; lower the learning rates, or set optimizer.clip_norm. The "
                "checkpoints written before are complete"
            )
        self.at.seconds = time.monotonic() - self.started
        with stepper.averaged():
            state = CheckpointState(
                encoder=stepper.model.encoder.state_dict(),
                optimizer=stepper.optimizer.state_dict(),
                table=stepper.model.catalog.stored_state(),
                attributes=stepper.model.catalog.attributes.state_dict(),
                unaveraged={} if stepper.average is None else stepper.average.state_dict(),
                progress=self.at.to_json() | {"data": self.at_data},
                config=stored_without_keys(to_json(self.run.config)),
            )
            reports = self.run.writer.save(self.at.step, state, best=best)
        self._report_checkpoints(reports)
        self.saved_at = time.monotonic()

    def _report_checkpoints(self, reports: Sequence[CheckpointReport]) -> None:
        for report in reports:
            for callback in self.callbacks:
                callback.on_checkpoint(report)

    def _limit_reached(self) -> str | None:
        total, max_steps = self.run.total_steps, self.run.config.limits.max_steps
        if total is None or self.at.step < total:
            return None
        return f"max_{'steps' if total == max_steps else 'epochs'} reached"

    def _patience_is_over(self) -> str | None:
        config = self.run.config.validation
        if config.patience is None or self.at.validations_since_best < config.patience:
            return None
        return f"no better {config.metric} in {config.patience} validations"

    def _stop_early(self) -> NoReturn:
        """Wait for the checkpoint of this step, then raise Preempted."""
        self._finish_checkpoint()
        raise Preempted(
            f"the run stopped after step {self.at.step} as it was asked to, and its checkpoint is "
            "complete; start it again with --resume=auto to continue from there"
        )

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint in flight; raise the error if its write failed."""
        self._report_checkpoints(self.run.writer.collect())
        if self.run.writer.failure is not None:
            raise self.run.writer.failure

    def _epoch(self) -> float:
        return self.at.step / max(1, self.run.steps_per_epoch)

    def _finish(self, reason: str) -> EndReport:
        """Wait for the last checkpoint, call ``on_end`` and write ``end.json``."""
        at = self.at
        self._finish_checkpoint()
        report = EndReport(
            output=self.run.config.output,
            reason=reason,
            step=at.step,
            epoch=self._epoch(),
            seconds=time.monotonic() - self.started,
            seconds_per_step=statistics.median(self.seconds[1:] or self.seconds or [0.0]),
            positions_per_second=(at.positions - self.first_positions)
            / max(1e-9, sum(self.seconds)),
            padding_share=1 - at.positions / max(1, at.slots),
            memory_bytes=self.memory_bytes,
            num_skipped=at.num_skipped,
            best_step=at.best.step if at.best else None,
            best_metrics=at.best.metrics if at.best else {},
        )
        for callback in self.callbacks:
            callback.on_end(report)
        folder = Path(self.run.config.output)
        on_first_rank(lambda: write_end(folder, report), self.run.stepper.model.group)
        return report
