"""The gate stage: decide whether an evaluated run may replace the published model.

Both are compared on the same users. If the published model was measured on these users with the
same options when it was published, that value is used. Otherwise (as after every retraining on
newer data) the published export is measured now, on the users of the new run, ranking the items
that it knows.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.pipeline.model.config import DEFAULT_METRIC, MeasureConfig
from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.outputs.formats import GATE, METRICS
from shardrec.pipeline.outputs.json_files import Shape, require_shape
from shardrec.pipeline.outputs.stage_output import StageOutput, read_output
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import EvaluationBatches
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.served.pointer import Publication, read_published, require_unchanged

if TYPE_CHECKING:
    from shardrec.pipeline.model.measure import Split

__all__ = ["GateConfig", "Verdict", "gate", "judge", "measure_export"]

_NEVER = -1e30  # score of an item that the export does not know


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Options of ``gate``: what a run must reach to be published.

    Attributes:
        run: run folder of train that holds the report of evaluate.
        prepared: the folder the run was trained on.
        published: pointer file of publish; if it does not exist yet there is nothing to compare
            with.
        metric: the metric to compare; larger is better.
        tolerance: accepted decrease, as a share of the published model's value.
        minimum: value that the run must reach in any case.
        at_least: folder of an evaluated baseline, or its report, whose value the run must reach on
            the same users by the same protocol.
        metrics: report of evaluate; none: metrics.json in the run.
        output: file to write the verdict to; none: gate.json in the run.
        force: decide again, or replace a verdict made with other options.
        trust_code: open a published export whose encoder is a program (encoder.pt2), which can run
            any code; only if you made it or trust who did.
    """

    run: str
    prepared: str
    published: str
    metric: str = DEFAULT_METRIC
    tolerance: float = 0.02
    minimum: float | None = None
    at_least: str | None = None
    metrics: str | None = None
    output: str | None = None
    force: bool = False
    trust_code: bool = False

    def __post_init__(self) -> None:
        """Refuse a tolerance outside [0, 1)."""
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}; 0.02 is 2 %")

    @property
    def report(self) -> Path:
        """The file that the verdict is written to."""
        return Path(self.output or Path(self.run) / "gate.json")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The output of ``gate``.

    Attributes:
        passed: whether the run may be published.
        reason: the comparison in one line.
        is_new: False if the verdict was there and nothing had to be done.
        report: content of the verdict's file.
    """

    passed: bool
    reason: str
    is_new: bool
    report: dict[str, Any]


def gate(config: GateConfig) -> Verdict:
    """The verdict on a run, after comparing it with the published model; also written to a file.

    An existing verdict on the same run, options and published model is returned unchanged. If
    another model has been published since, it is replaced.

    Raises:
        FileNotFoundError: the run was not evaluated, or the published export is gone.
        FileExistsError: a verdict made with other options exists.
        ValueError: the metric was not measured, or inputs do not belong together.

    Collectives: none; one process holds all published vectors, as a serving process does.
    """
    evaluation = _read_evaluation(config, Path(config.metrics or Path(config.run) / "metrics.json"))
    floor = _read_floor(config, evaluation)
    prepared = Prepared.open(config.prepared)
    _check_data(config, prepared, evaluation)
    current = read_published(Path(config.published)).current
    request = {
        "evaluation": evaluation["source"] | evaluation["protocol"],
        "metric": config.metric,
        "tolerance": config.tolerance,
        "minimum": config.minimum,
        "at_least": floor and floor["source"],
    }
    output = StageOutput(path=config.report, format=GATE, request=request, force=config.force)
    found = output.find()
    if found is not None and _still_holds(found, current):
        return Verdict(found["passed"], found["reason"], False, found)
    value, how = _published_value(config, prepared, evaluation, current)
    least = None if floor is None else floor["metrics"][config.metric]
    passed, reason = judge(config, evaluation["metrics"][config.metric], value, least)
    published = {"number": current and current.number, "value": value, "measured": how}
    verdict = {"passed": passed, "reason": reason, "evaluation": evaluation, "published": published}
    return Verdict(passed, reason, True, output.finish(lambda: verdict))


def judge(
    config: GateConfig,
    value: float | None,
    published: float | None,
    baseline: float | None = None,
) -> tuple[bool, str]:
    """Whether a run's value passes, and the reason in one line.

    Args:
        config: metric, tolerance and minimum.
        value: the run's value of the metric; None if it is not a number.
        published: value of the published model; None if there is none.
        baseline: value of the baseline that the run must reach; None if there is none.

    Example:
        >>> rule = GateConfig(run="run", prepared="data", published="p.json", tolerance=0.1)
        >>> judge(rule, 0.46, 0.5)
        (True, 'NDCG@10 0.4600 is at least 0.4500, 90 % of the published 0.5000')
        >>> judge(rule, 0.44, 0.5)
        (False, 'NDCG@10 0.4400 is below 0.4500, 90 % of the published 0.5000')
    """
    name = config.metric
    if value is None or not math.isfinite(value):
        return False, f"{name} is not a number"
    if config.minimum is not None and value < config.minimum:
        return False, f"{name} {value:.4f} is below the minimum {config.minimum:.4f}"
    if baseline is not None and value < baseline:
        return False, f"{name} {value:.4f} is below the baseline's {baseline:.4f}"
    if published is None:
        return True, f"{name} {value:.4f}, and no published value to compare with"
    needed = (1 - config.tolerance) * published
    compared = "is at least" if value >= needed else "is below"
    share = f"{100 * (1 - config.tolerance):g} % of the published {published:.4f}"
    return value >= needed, f"{name} {value:.4f} {compared} {needed:.4f}, {share}"


def measure_export(
    folder: Path,
    prepared: Prepared,
    config: "MeasureConfig",
    split: "Split",
    *,
    trust_code: bool = False,
) -> dict[str, float]:
    """Metrics of an export on the users of any prepared folder, even a newer one.

    Items are matched by the log's own ids. Items that the export does not know are skipped in
    histories and rank behind all others, so that targets among them count as missed, just as when
    the export serves these users. Items that only the export knows are not ranked.

    Args:
        folder: an export.
        prepared: data of the users that are ranked.
        config: list lengths and the filter of seen items.
        split: the users to rank for.
        trust_code: whether to open files that can run code; see ``Recommender.open``.

    Raises:
        FileNotFoundError, ValueError: the export is incomplete, its ids are of another type, or its
            encoder is a program that is not trusted.

    Collectives: none; the vectors must fit into the memory of this process.
    """
    # Imported late: loads matplotlib.
    from shardrec.modules.ranking import Blocks
    from shardrec.pipeline.model.measure import measure
    from shardrec.pipeline.model.ranker import StateRanker

    model = Recommender.open(folder, min_count=0, trust_code=trust_code)
    places = model.ids.items(prepared.item_ids())  # (V,) rows of the export, or -1
    is_known = places >= 0
    # Two more columns. The last is 1 in every state: rows hold 0 there, or _NEVER for an unknown
    # item. The one before it is 1 in a state without history: rows hold minus the place by
    # popularity.
    rows = torch.zeros(len(places), model.scored.shape[1] + 2)
    rows[is_known, :-2] = model.scored[places[is_known]]
    rows[is_known, -2] = -model.popular.argsort()[places[is_known]].float()
    rows[~is_known, -1] = _NEVER
    length = model.manifest["max_length"]
    batches = EvaluationBatches(
        prepared,
        split,
        batch_size=config.batch_size,
        max_length=length,
        sample_users=config.sample_users,
    )
    scorer = functools.partial(_states, model, places)
    blocks = Blocks(states=config.block_states, rows=config.block_rows)
    memory = None if model.memory is None else model.memory.relabeled(places)
    shard = RowShard(rows, 0, len(rows), None)
    ranker = StateRanker(scorer, shard, length, blocks, memory, skipped=~is_known)
    return measure(ranker, batches, config, prepared).metrics


def _states(model: Recommender, places: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
    """(B, D + 2) states after the last known item, and the columns of ``measure_export``."""
    rows = places[items]  # (B, L)
    is_real = torch.arange(items.shape[1]) < lengths[:, None]
    histories = [row[kept] for row, kept in zip(rows, is_real & (rows >= 0), strict=True)]
    known = [index for index, history in enumerate(histories) if len(history)]
    states = torch.zeros(len(items), model.scored.shape[1] + 2)
    states[:, -2:] = 1
    if known:
        states[known, -2] = 0
        states[known, :-2] = model.states([histories[index] for index in known])
    return states


def _read_floor(config: GateConfig, evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The measurement of the baseline, if one is asked for; it must be comparable."""
    if config.at_least is None:
        return None
    path = Path(config.at_least)
    floor = _read_evaluation(config, path / "metrics.json" if path.is_dir() else path)
    ours, theirs = evaluation["protocol"], floor["protocol"]
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if names:
        raise ValueError(
            f"at_least must be measured as the run was, got {path}, which differs in "
            f"{', '.join(names)}; evaluate both by the same options"
        )
    return floor


def _read_evaluation(config: GateConfig, path: Path) -> dict[str, Any]:
    """A measurement: its source, the protocol (users and options), and the metrics."""
    report = read_output(path, METRICS)
    asked: Shape = {
        **{"source": dict, "split": str, "ks": list},
        **{"filter_seen": bool, "min_count": int, "ties": str},
    }
    request = require_shape(report["request"], asked, f"'request' in {path}", METRICS.remedy)
    names = [name for name in report["metrics"] if "@" in name]
    if config.metric not in names:
        raise ValueError(unknown_name("metric", config.metric, names))
    protocol = {name: request[name] for name in asked if name != "source"}
    if request.get("sample_users") is not None:
        protocol["sample_users"] = request["sample_users"]
    protocol["data"] = request["source"]["data"]
    return {"source": request["source"], "protocol": protocol, "metrics": report["metrics"]}


def _check_data(config: GateConfig, prepared: Prepared, evaluation: dict[str, Any]) -> None:
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
    known, protocol = current.evaluation, evaluation["protocol"]
    if known is not None and known["protocol"] == protocol:
        return known["metrics"][config.metric], "when it was published, on the same users"
    folder = require_unchanged(Path(config.published), current)
    lists = {name: protocol[name] for name in ("filter_seen", "min_count")}
    lists["sample_users"] = protocol.get("sample_users")
    measure = MeasureConfig(ks=tuple(protocol["ks"]), **lists)
    metrics = measure_export(
        folder, prepared, measure, protocol["split"], trust_code=config.trust_code
    )
    value = metrics[config.metric]
    return value if math.isfinite(value) else None, "now, by its export, on the users of the run"
