"""Estimate how long a run takes, from the steps of another run with the same options."""

import datetime
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs.json_files import parse_json
from shardrec.pipeline.run.config import LimitConfig, TrainConfig

__all__ = ["Duration", "duration"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """The parts of a run's estimated wall time.

    Attributes:
        steps: optimizer steps until the first limit; None if only time or patience ends the run.
        step_s: median seconds per step, including data loading.
        validations: number of validations until that limit.
        validation_s: median seconds per validation; 0 if none was measured.
        most_s: ``limits.max_minutes`` in seconds; None without that limit.
    """

    steps: int | None
    step_s: float
    validations: int
    validation_s: float
    most_s: float | None

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run; None if neither steps nor time limit it."""
        if self.steps is None:
            return self.most_s
        found = self.steps * self.step_s + self.validations * self.validation_s
        return found if self.most_s is None else min(found, self.most_s)

    def describe(self, now: datetime.datetime) -> str:
        """One line with the parts, their sum, and the end of a run that starts ``now``."""
        parts = f"a step takes {self.step_s:.3g} s"
        if self.steps is None or self.seconds is None:
            return f"time         {parts}; only patience or max_minutes ends the run"
        parts = f"{self.steps:,} steps of {self.step_s:.3g} s"
        if self.validations:
            parts += f" and {self.validations} validations of {self.validation_s:.3g} s"
        end = now + datetime.timedelta(seconds=self.seconds)
        spoken = str(datetime.timedelta(seconds=round(self.seconds)))
        return f"time         {parts}: {spoken}; started now it ends at {end:%Y-%m-%d %H:%M}"


def duration(config: TrainConfig, run: Path) -> Duration:
    """The estimated time of ``config`` on the machine, the workers and the data of ``run``.

    Args:
        config: the config, whose limits and validations count.
        run: folder of a run, finished or not, that has the same options as ``config`` where they
            affect the time of a step. Its first step is left out.

    Raises:
        ValueError: the run has taken too few steps.
    """
    path = run / "metrics.jsonl"
    events = _events(path)
    steps = [one for one in events if one["event"] == "step" and one["step"] > 1]
    if not steps or not steps[-1]["epoch"]:
        raise ValueError(
            f"measured must be a run of some steps, got {run} with {len(steps)} in {path.name}; "
            "train with limits.max_steps=50 log_every=1 first"
        )
    last = steps[-1]
    per_epoch = max(1, round(last["step"] / last["epoch"]))
    total = _total(config.limits, per_epoch)
    of_validations = [one["seconds"] for one in events if one["event"] == "validation"]
    minutes = config.limits.max_minutes
    return Duration(
        steps=total,
        step_s=statistics.median(one["seconds"] for one in steps),
        validations=_validations(config, per_epoch, total or 0),
        validation_s=statistics.median(of_validations) if of_validations else 0.0,
        most_s=None if minutes is None else 60 * minutes,
    )


def _events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file."""
    if not path.is_file():
        raise FileNotFoundError(f"measured must be a run folder, got none with {path}; check it")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = parse_json(line)
        except (ValueError, json.JSONDecodeError):  # the last one of a run that was killed
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
    return found


def _total(limits: LimitConfig, per_epoch: int) -> int | None:
    by_epochs = None if limits.max_epochs is None else limits.max_epochs * per_epoch
    known = [one for one in (limits.max_steps, by_epochs) if one is not None]
    return min(known, default=None)


def _validations(config: TrainConfig, per_epoch: int, steps: int) -> int:
    """Validations in ``steps``; one at the end counts if it is not due anyway."""
    due = config.validation
    every = [due.every_steps, due.every_epochs and due.every_epochs * per_epoch]
    at = {step for one in every if one for step in range(one, steps + 1, one)}
    return len(at | {steps}) if due.is_on and steps else 0
