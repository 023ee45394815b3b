"""Log to MLflow in a callback: the config as parameters, steps and validations as metrics."""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from shardrec.pipeline.checkpoint.writer import CheckpointReport
from shardrec.pipeline.outputs.addresses import clean, without_keys
from shardrec.pipeline.outputs.json_files import read_object
from shardrec.pipeline.run.callbacks import (
    Callback,
    EndReport,
    StepReport,
    ValidationReport,
    step_scalars,
)
from shardrec.pipeline.run.config import MLflowConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MLflow", "open_mlflow"]

_RUN_FILE = "mlflow.json"
_MOST_PARAMETERS = 100  # in one request, by MLflow's rules
_LONGEST_VALUE = 500


class MLflow(Callback):
    """Callback that logs to one MLflow run; a resumed training continues the same MLflow run.

    If the store stops responding, one warning is given and training continues without it.
    """

    def __init__(
        self,
        client: "MlflowClient",
        start: Callable[[], str],
        parameters: Mapping[str, Any],
        every: int = 1,
    ) -> None:
        """Store the parts; the first event begins the run.

        Args:
            client: client of the store.
            start: makes or finds the run and returns its id.
            parameters: the options of a new run, by dotted name.
            every: steps between two that are logged.
        """
        self.client: MlflowClient | None = client
        self.start, self.parameters, self.every = start, parameters, every
        self.run_id: str | None = None

    @override
    def on_step(self, report: StepReport) -> None:
        if not report.skipped and report.step % self.every == 0:
            self._metrics("train", step_scalars(report), report.step)

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self._metrics("validation", report.metrics, report.step)

    @override
    def on_checkpoint(self, report: CheckpointReport) -> None:
        names = ["checkpoint.last", *(["checkpoint.best"] if report.best else [])]
        if report.error is None:
            self._send({}, report.step, dict.fromkeys(names, report.folder))

    @override
    def on_end(self, report: EndReport) -> None:
        values = {
            "run/seconds": report.seconds,
            "run/seconds_per_step": report.seconds_per_step,
            "run/positions_per_second": report.positions_per_second,
            "run/memory_gib": report.memory_bytes / 2**30,
            "run/skipped_steps": float(report.num_skipped),
        }
        self._send(values, report.step, {"stopped": report.reason})
        self._guarded(lambda client, run_id: client.set_terminated(run_id, "FINISHED"))

    def _metrics(self, group: str, values: Mapping[str, float], step: int) -> None:
        named = {f"{group}/{_metric_name(name)}": value for name, value in values.items()}
        self._send(named, step, {})

    def _send(self, values: Mapping[str, float], step: int, tags: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        now = time.time_ns() // 1_000_000
        metrics = [
            Metric(name, float(value), now, step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        shown = [RunTag(name, value) for name, value in tags.items()]
        self._guarded(lambda client, run_id: client.log_batch(run_id, metrics=metrics, tags=shown))

    def _guarded(self, work: Callable[["MlflowClient", str], object]) -> None:
        """Do ``work``; if the store fails, log nothing more and continue training."""
        from mlflow.exceptions import MlflowException

        if self.client is None:
            return
        try:
            if self.run_id is None:
                self.run_id = self._begin(self.client)
            work(self.client, self.run_id)
        except (MlflowException, OSError) as error:
            self.client = None
            words = without_keys(str(error))
            warnings.warn(f"MLflow is not logged to any more: {words}", stacklevel=2)

    def _begin(self, client: "MlflowClient") -> str:
        from mlflow.entities import Param

        run_id = self.start()
        known = client.get_run(run_id).data.params
        missing = [
            Param(name, str(value)[:_LONGEST_VALUE])
            for name, value in self.parameters.items()
            if name not in known
        ]
        for first in range(0, len(missing), _MOST_PARAMETERS):
            client.log_batch(run_id, params=missing[first : first + _MOST_PARAMETERS])
        return run_id


def open_mlflow(
    config: MLflowConfig, folder: Path, parameters: Mapping[str, Any], every: int = 1
) -> MLflow:
    """The MLflow callback, after checking that the store responds.

    The MLflow run starts with the first event.

    Args:
        config: the store, experiment and run name.
        folder: run folder; it stores the id of the MLflow run once that has started.
        parameters: the options of the run, by dotted name.
        every: number of steps between logged steps.

    Raises:
        ValueError: the store does not respond.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # It logs the addresses that it asks again.
    logging.getLogger("urllib3.connectionpool").addFilter(clean)
    try:
        client = MlflowClient(tracking_uri=config.uri)
        experiment = _experiment(client, config.experiment)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"mlflow.uri must be a tracking store that answers, got "
            f"{without_keys(f'{config.uri} and {error}')}; check the address, or none"
        ) from None  # the error of MLflow quotes keys

    def start() -> str:
        return _run(client, experiment, folder, config.run_name or folder.name)

    return MLflow(client, start, parameters, every)


def _experiment(client: "MlflowClient", name: str) -> str:
    """The id of an experiment, which is created if missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:  # another run has created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _run(client: "MlflowClient", experiment: str, folder: Path, name: str) -> str:
    """The id of the run that ``folder`` has begun, or of a new one."""
    path = folder / _RUN_FILE
    if path.is_file():
        remedy = "remove it, and a new MLflow run is begun"
        run_id: str = read_object(path, {"run_id": str}, remedy)["run_id"]
        client.update_run(run_id, status="RUNNING")
        return run_id
    run_id = client.create_run(experiment, run_name=name).info.run_id
    path.write_text(json.dumps({"run_id": run_id}))
    return run_id


def _metric_name(name: str) -> str:
    """The metric's name in characters that every store accepts.

    Example:
        >>> _metric_name("NDCG@10/known")
        'NDCG_at_10/known'
    """
    return name.replace("@", "_at_")
