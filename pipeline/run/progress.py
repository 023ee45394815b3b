"""The counters of a run, which are saved besides weights and the position in the data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardrec.pipeline.run.callbacks import ValidationReport

__all__ = ["Progress"]


@dataclass(kw_only=True, slots=True)
class Progress:
    """Counters of a run since its start, across resumes; equal on all ranks except ``seconds``.

    Attributes:
        step: optimizer steps taken.
        num_skipped: number of steps skipped because loss or gradients were not finite.
        skipped_in_a_row: number of consecutive skipped steps up to now.
        best: report of the best validation; None before the first.
        validations_since_best: number of validations since the best one.
        positions: number of real positions trained.
        slots: number of positions that attention processed, including padding.
        seconds: wall time of the run.
    """

    step: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    best: ValidationReport | None = None
    validations_since_best: int = 0
    positions: int = 0
    slots: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The counters as JSON that ``from_json`` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Progress":
        """The counters in the result of ``to_json``; other keys are ignored.

        Raises:
            ValueError: a counter is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in stored]
        if missing:
            raise ValueError(
                f"the progress in the checkpoint must have {', '.join(missing)}, got none; go on "
                "with the version of shardrec that wrote it, or start a new run"
            )
        known = {name: stored[name] for name in names}
        best = known.pop("best")
        return cls(best=None if best is None else ValidationReport(**best), **known)
