"""The evaluate stage: measure a run on its prepared folder and write ``metrics.json``."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.shard import RowShard
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.model.measure import Scorer, Split, measure, open_users
from shardrec.pipeline.outputs.formats import METRICS
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.ranks import default_group, on_this_rank
from shardrec.pipeline.run.trained import Source, load_model

__all__ = ["evaluate", "evaluate_popularity"]


def evaluate(
    run: str,
    data: str,
    config: MeasureConfig | None = None,
    *,
    split: Split = "test",
    checkpoint: Literal["best", "last"] = "best",
    encoder: nn.Module | None = None,
    output: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Rank the whole catalog for every user of a split and write ``metrics.json`` into the run.

    Runs on any number of ranks, whatever number trained. If the report of the same weights, users
    and options exists already, logs that and does nothing.

    Args:
        run: the run folder.
        data: the prepared folder the run was trained on.
        config: list lengths and the seen filter; None takes the defaults.
        split: the users to rank for.
        checkpoint: the weights to load.
        encoder: the module given to ``train``, if any.
        output: the report to write; None takes ``metrics.json`` in the run.
        force: whether to replace an existing report.

    Returns:
        The content of the report: metrics, and the protocol they follow.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        FileExistsError: a report of other weights, users or options exists.
        ValueError: the run does not fit the data.

    Collectives: on the default group; every rank must call it.
    """
    users = _Users.open(data, split, config)
    source = Source.find(run, users.prepared, checkpoint, encoder)
    request = {"source": source.identity, "checkpoint": checkpoint, **users.request}
    report = users.report(output or str(Path(run) / "metrics.json"), request, force)
    found = _find(report)
    if found is not None:
        return found
    model, progress = load_model(source.config, source.checkpoint, users.prepared, encoder)
    length = source.config.encoder.max_length
    metrics = users.measure(model.last_states, model.scored_shard(), length)
    which = {"which": checkpoint, "folder": source.checkpoint.name, "step": progress["step"]}
    return _with_numbers(report.finish(lambda: users.details(metrics) | {"checkpoint": which}))


def evaluate_popularity(
    data: str,
    config: MeasureConfig | None = None,
    *,
    split: Split = "test",
    output: str | None = None,
    force: bool = False,
) -> dict[str, float]:
    """Metrics of ranking every user by training counts alone: a baseline for any model.

    Ranks as for a model, with a table of width 1 (D = 1).

    Args:
        data: a prepared folder.
        config: list lengths and the seen filter; None takes the defaults.
        split: the users to rank for.
        output: the report to write; None writes none.
        force: whether to replace an existing report.

    Raises:
        FileExistsError: a report of other data or options exists.

    Collectives: on the default group; every rank must call it.
    """
    users = _Users.open(data, split, config)
    source = {"ranking": "popularity", "data": users.prepared.fingerprint}
    report = None
    if output is not None:
        report = users.report(output, {"source": source, **users.request}, force)
        found = _find(report)
        if found is not None:
            return dict(found["metrics"])
    metrics = users.measure(_same_state, _popularity_shard(users.prepared, users.group), 1)
    if report is not None:
        report.finish(lambda: users.details(metrics))
    return metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class _Users:
    """Evaluation users and how they are ranked."""

    prepared: Prepared
    split: Split
    config: MeasureConfig
    group: dist.ProcessGroup | None
    started: float

    @classmethod
    def open(cls, data: str, split: Split, config: MeasureConfig | None) -> "_Users":
        started, group, config = time.monotonic(), default_group(), config or MeasureConfig()
        prepared = on_this_rank(lambda: Prepared.open(data), group)
        return cls(prepared=prepared, split=split, config=config, group=group, started=started)

    @property
    def request(self) -> dict[str, Any]:
        config = self.config
        asked = {"split": self.split, "ks": list(config.ks), "filter_seen": config.filter_seen}
        return asked | {"sample_users": config.sample_users}

    def report(self, path: str, request: Mapping[str, Any], force: bool) -> StageOutput:
        return StageOutput(
            path=Path(path), format=METRICS, request=request, force=force, group=self.group
        )

    def measure(self, scorer: Scorer, shard: RowShard, max_length: int) -> dict[str, float]:
        batches = open_users(self.prepared, self.split, self.config, max_length, self.group)
        return measure(scorer, shard, batches, self.config, self.prepared)

    def details(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The report, without its request."""
        seconds = time.monotonic() - self.started
        return {
            "metrics": {n: value if math.isfinite(value) else None for n, value in metrics.items()},
            "protocol": self.protocol(),
            "seconds": seconds,
            "users_per_second": metrics["users"] / seconds,
        }

    def describe_users(self) -> str:
        """Which users of the split were ranked."""
        total, sample = self.prepared.manifest.file(f"{self.split}.parquet").rows, self.config
        if sample.sample_users is None or sample.sample_users >= total:
            return f"all {total} of the split"
        return (
            f"{sample.sample_users} of {total}, the first in the order by a hash of user and seed"
        )

    def protocol(self) -> dict[str, Any]:
        """What the metrics mean, for later readers."""
        prepared, without = self.prepared, f"{self.split}_users_without_history"
        seen = "removed, targets excepted" if self.config.filter_seen else "not removed"
        return {
            "split": self.split,
            "data": prepared.manifest.split,
            "num_items": prepared.num_items,
            "candidates": "the whole catalog, items first seen after the split included",
            "popularity": "training events only",
            "known": "metrics that end in /known leave out targets without training events",
            "seen_items": seen,
            "users": self.describe_users(),
            "ties": "lower item index first",
            "users_without_history": prepared.manifest.counts.get(without),
            "data_fingerprint": prepared.fingerprint,
        }


def _find(report: StageOutput) -> dict[str, Any] | None:
    """The report if it exists already; rank 0 logs that."""
    found = report.find()
    if found is None:
        return None
    if Communicator(report.group).rank == 0:
        message = "%s already holds the metrics of these weights, users and options: nothing to do"
        logging.getLogger(__name__).warning(message, report.path)
    return _with_numbers(found)


def _with_numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """A stored report with its metrics as numbers: NaN where there were no users to average."""
    metrics = {n: math.nan if value is None else value for n, value in report["metrics"].items()}
    return {**report, "metrics": metrics}


def _popularity_shard(prepared: Prepared, group: dist.ProcessGroup | None) -> RowShard:
    """A (V, 1) table of training counts, of which this rank holds a block of rows."""
    counts = on_this_rank(prepared.item_counts, group)
    block = -(-prepared.num_items // Communicator(group).size)
    first = min(Communicator(group).rank * block, prepared.num_items)
    rows = counts[first : first + block].float()[:, None]
    return RowShard(rows, first, prepared.num_items, group)


def _same_state(items: Tensor, lengths: Tensor) -> Tensor:
    """(B, 1) ones: every user gets the counts as scores."""
    return torch.ones(items.shape[0], 1, device=items.device)
