"""A callback that keeps what it is told."""

from shardrec.pipeline.checkpoint.writer import CheckpointReport
from shardrec.pipeline.run.callbacks import (
    Callback,
    EndReport,
    StepReport,
    ValidationReport,
)


class Recorder(Callback):
    """Keeps every report."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.validations: list[ValidationReport] = []
        self.checkpoints: list[CheckpointReport] = []
        self.ends: list[EndReport] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_validation(self, report: ValidationReport) -> None:
        self.validations.append(report)

    def on_checkpoint(self, report: CheckpointReport) -> None:
        self.checkpoints.append(report)

    def on_end(self, report: EndReport) -> None:
        self.ends.append(report)
