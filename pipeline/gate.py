"""The gate: may an evaluated run take the place of the published model?

Both are compared on the same users. Where the published model was measured on them already, by the
same options, that figure counts. Otherwise, as after every retraining on newer data, it is measured
again: its export ranks the users of the new run, with the items it knows.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrec.pipeline.config import unknown_name
from shardrec.pipeline.evaluate import FORMAT as METRICS_FORMAT
from shardrec.pipeline.measure_export import measure_export
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.outputs.json_files import require_shape
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.served.pointer import Publication, read_published, require_unchanged
from shardrec.pipeline.stored_report import StoredReport, read_report

__all__ = ["FORMAT", "GateConfig", "Verdict", "gate"]

FORMAT = "shardrec.gate"


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What a run must reach to be published.

    Attributes:
        run: folder of train, with the report of evaluate in it.
        prepared: the folder the run was trained on.
        published: pointer of publish; where there is none yet, there is nothing to compare with.
        metric: what is compared; larger is better.
        tolerance: share of the published model's value that the run may lack.
        minimum: value that the run must reach in any case.
        metrics: report of evaluate; none takes metrics.json in the run.
        output: report to write; none takes gate.json in the run.
        force: decide again, or replace a report of other options.
    """

    run: str
    prepared: str
    published: str
    metric: str = "NDCG@10"
    tolerance: float = 0.02
    minimum: float | None = None
    metrics: str | None = None
    output: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}; 0.02 is 2 %")

    @property
    def report(self) -> Path:
        """Where the verdict is written."""
        return Path(self.output or Path(self.run) / "gate.json")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``gate`` decided, or found already decided.

    Attributes:
        passed: whether the run may be published.
        reason: the comparison in one line.
        is_new: False where the report was there and nothing had to be done.
        report: what was written.
    """

    passed: bool
    reason: str
    is_new: bool
    report: dict[str, Any]


def gate(config: GateConfig) -> Verdict:
    """Compare a run with what is published and write the verdict, whatever it is.

    The same question asked again is not worked on again; where another model was published since,
    it is another question, and the report is replaced.

    Args:
        config: run, pointer and rule.

    Returns:
        The verdict.

    Raises:
        FileNotFoundError: the run was not evaluated, or the published export is gone.
        FileExistsError: the report that is there follows other options.
        ValueError: the metric was not measured, or inputs do not belong together.

    Collectives: none; one process holds the published vectors, as one that serves them does.
    """
    evaluation = _evaluation(config)
    prepared = Prepared.open(config.prepared)
    _require_data(config, prepared, evaluation)
    current = read_published(Path(config.published)).current
    request = {
        "evaluation": evaluation["source"] | evaluation["protocol"],
        "metric": config.metric,
        "tolerance": config.tolerance,
        "minimum": config.minimum,
    }
    shape = {"passed": bool, "reason": str, "evaluation": dict, "published": dict}
    stored = StoredReport(config.report, FORMAT, request, config.force, shape)
    found = stored.finished()
    if found is not None and _still_holds(found, current):
        return Verdict(found["passed"], found["reason"], False, found)
    theirs, how = _published_value(config, prepared, evaluation, current)
    passed, reason = judge(config, evaluation["metrics"][config.metric], theirs)
    report = stored.write(
        {
            "passed": passed,
            "reason": reason,
            "evaluation": evaluation,
            "published": {"number": current and current.number, "value": theirs, "measured": how},
        }
    )
    return Verdict(passed, reason, True, report)


def judge(config: GateConfig, ours: float | None, theirs: float | None) -> tuple[bool, str]:
    """Whether a value passes, and why.

    Args:
        config: metric, tolerance and minimum.
        ours: of the run; None where it is not a number.
        theirs: of the published model; None where there is none.

    Example:
        >>> rule = GateConfig(run="run", prepared="data", published="p.json", tolerance=0.1)
        >>> judge(rule, 0.46, 0.5)
        (True, 'NDCG@10 0.4600 is at least 0.4500, 90 % of the published 0.5000')
        >>> judge(rule, 0.44, 0.5)
        (False, 'NDCG@10 0.4400 is below 0.4500, 90 % of the published 0.5000')
    """
    name = config.metric
    if ours is None or not math.isfinite(ours):
        return False, f"{name} is not a number"
    if config.minimum is not None and ours < config.minimum:
        return False, f"{name} {ours:.4f} is below the minimum {config.minimum:.4f}"
    if theirs is None:
        return True, f"{name} {ours:.4f}, and no published value to compare with"
    needed = (1 - config.tolerance) * theirs
    passed = ours >= needed
    told = "is at least" if passed else "is below"
    share = f"{100 * (1 - config.tolerance):g} % of the published {theirs:.4f}"
    return passed, f"{name} {ours:.4f} {told} {needed:.4f}, {share}"


def _evaluation(config: GateConfig) -> dict[str, Any]:
    """What was measured of the run: its source, on which users, by which options, and metrics."""
    path = Path(config.metrics or Path(config.run) / "metrics.json")
    maker = "shardrec evaluate"
    report = read_report(path, METRICS_FORMAT, maker, {"request": dict, "metrics": dict})
    asked = {"source": dict, "split": str, "ks": list, "filter_seen": bool}
    again = f"make it with `{maker} --force`"
    request = require_shape(report["request"], asked, f"'request' in {path}", again)
    names = [name for name in report["metrics"] if "@" in name]
    if config.metric not in names:
        raise ValueError(unknown_name("metric", config.metric, names))
    protocol = {name: request[name] for name in ("split", "ks", "filter_seen")}
    protocol["data"] = request["source"]["data"]
    return {"source": request["source"], "protocol": protocol, "metrics": report["metrics"]}


def _require_data(config: GateConfig, prepared: Prepared, evaluation: dict[str, Any]) -> None:
    measured_on = evaluation["protocol"]["data"]
    if prepared.fingerprint != measured_on:
        raise ValueError(
            f"prepared must be the data that the run was evaluated on, {measured_on}, got "
            f"{config.prepared} with {prepared.fingerprint}; give the folder the run was trained on"
        )


def _still_holds(report: dict[str, Any], current: Publication | None) -> bool:
    """Whether a verdict is about what is published now, or has led to it."""
    if current is not None and report["passed"]:
        if current.source == report["evaluation"]["source"]:
            return True
    return bool(report["published"]["number"] == (current and current.number))


def _published_value(
    config: GateConfig,
    prepared: Prepared,
    evaluation: dict[str, Any],
    current: Publication | None,
) -> tuple[float | None, str]:
    """The published model's value on the users of the run, and how it is known."""
    if current is None:
        return None, "nothing is published"
    known = current.evaluation
    if known is not None and known["protocol"] == evaluation["protocol"]:
        return known["metrics"][config.metric], "when it was published, on the same users"
    folder = Path(config.published).parent / current.export
    require_unchanged(folder, current)
    protocol = evaluation["protocol"]
    measure = MeasureConfig(ks=tuple(protocol["ks"]), filter_seen=protocol["filter_seen"])
    value = measure_export(folder, prepared, measure, protocol["split"])[config.metric]
    return value if math.isfinite(value) else None, "now, by its export, on the users of the run"
