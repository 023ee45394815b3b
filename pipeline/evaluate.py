"""The evaluate stage: measure a run on its prepared folder and write ``metrics.json``."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.ranking import Blocks, by_popularity
from shardrec.pipeline.baseline import BASELINES
from shardrec.pipeline.model.baseline_ranker import BaselineRanker
from shardrec.pipeline.model.config import MeasureConfig, describe_lists
from shardrec.pipeline.model.measure import Measurement, Split, measure, open_users
from shardrec.pipeline.model.ranker import Ranker
from shardrec.pipeline.outputs.files import sha256
from shardrec.pipeline.outputs.formats import METRICS
from shardrec.pipeline.outputs.json_files import read_json, write_atomically
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.outputs.staging import staged_file
from shardrec.pipeline.prepared.batches import gathered
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.ranked import find_ranked
from shardrec.pipeline.ranks import default_group, on_all_ranks, on_first_rank, on_this_rank

__all__ = ["evaluate", "evaluate_baselines", "evaluate_popularity"]


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
    """Rank the items for every user of a split, write ``metrics.json``, and return its content.

    Next to it, ``metrics.users.parquet`` has the rank of each target in its user's list. The number
    of ranks may differ from the training's. If a report on the same weights, users and options
    exists already, it is returned unchanged, with a log message.

    Args:
        run: the run folder, or the folder of a baseline.
        data: the prepared folder the run was trained on.
        config: list lengths and candidates; None takes the defaults.
        split: the users to rank for.
        checkpoint: the weights to load.
        encoder: the module given to ``train``, if any.
        output: file to write the report to; None takes ``metrics.json`` in the run.
        force: whether to replace an existing report.

    Returns:
        The content of the report: metrics, and the protocol they follow.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        FileExistsError: a report on other weights, users or options exists.
        ValueError: the run was not trained on this data.

    Collectives: on the default group; every rank must call it.
    """
    users = _Users.open(data, split, config)
    ranked = find_ranked(run, users.prepared, checkpoint, encoder, users.blocks)
    request = {"source": ranked.identity, "checkpoint": checkpoint, **users.request}
    report = users.report(output or str(Path(run) / "metrics.json"), request, force)
    found = _find(report)
    counted = on_first_rank(users.baselines, users.group)
    if found is not None:
        return {**found, "baselines": found.get("baselines", {}) | counted}
    ranker, loaded = ranked.load()
    measured = users.measure(ranker)
    beside = {"popularity": users.measure(users.popularity()).metrics} | counted
    lists = on_all_ranks(lambda: (measured.users, *measured.ranks), users.group)

    def details() -> dict[str, Any]:
        written = {"checkpoint": loaded, "users": _write_ranks(report.path, lists)}
        return users.details(measured, beside) | written

    return _with_numbers(report.finish(details))


def evaluate_popularity(
    data: str,
    config: MeasureConfig | None = None,
    *,
    split: Split = "test",
    output: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Metrics of one list for all users, by training counts alone: a baseline for any model.

    Args:
        data: a prepared folder.
        config: list lengths and candidates; None takes the defaults.
        split: the users to rank for.
        output: file to write the report to; None writes none.
        force: whether to replace an existing report.

    Returns:
        The content of the report, written or not.

    Raises:
        FileExistsError: a report on other data or with other options exists.

    Collectives: on the default group; every rank must call it.
    """
    users = _Users.open(data, split, config)
    source = {"ranking": "popularity", "data": users.prepared.fingerprint}
    report = None
    if output is not None:
        report = users.report(output, {"source": source, **users.request}, force)
        found = _find(report)
        if found is not None:
            return found
    measured = users.measure(users.popularity())
    details = users.details(measured, {})
    return _with_numbers(details if report is None else report.finish(lambda: details))


def evaluate_baselines(
    data: str, config: MeasureConfig, split: Split = "test", *, output: Path | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of popularity, and of the baselines in ``data`` evaluated by the same protocol.

    Args:
        data: a prepared folder.
        config: list lengths and candidates.
        split: the users to rank for.
        output: JSON file to write the metrics to; None writes none.

    Returns:
        The metrics of each baseline, by its name.

    Collectives: on the default group; every rank must call it.
    """
    users = _Users.open(data, split, config)
    popularity = users.measure(users.popularity()).metrics
    found = {"popularity": popularity} | on_first_rank(users.baselines, users.group)
    if output is not None:
        stored = {name: _json(metrics) for name, metrics in found.items()}
        text = json.dumps({"split": split, "metrics": stored}, indent=1)
        on_first_rank(lambda: _replace_text(output, text), users.group)
    return found


def _replace_text(path: Path, text: str) -> None:
    """Leave a file alone that has this text already: that of a finished run started again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


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
        return {"split": self.split, **self.config.protocol}

    def report(self, path: str, request: Mapping[str, Any], force: bool) -> StageOutput:
        return StageOutput(
            path=Path(path), format=METRICS, request=request, force=force, group=self.group
        )

    @property
    def blocks(self) -> Blocks:
        return Blocks(states=self.config.block_states, rows=self.config.block_rows)

    def baselines(self) -> dict[str, dict[str, float]]:
        """The metrics of the baselines of this data that were evaluated by the same protocol."""
        folder = self.prepared.path / BASELINES
        reports = [read_json(path) for path in sorted(folder.glob("*/metrics.json"))]
        found = {}
        for report in (one for one in reports if one.get("format") == METRICS.name):
            request = report["request"]
            same = {name: request.get(name) for name in self.request} == self.request
            if same and request["source"].get("data") == self.prepared.fingerprint:
                found[request["source"]["baseline"]] = report["metrics"]
        return found

    def popularity(self) -> Ranker:
        counts = on_this_rank(self.prepared.item_counts, self.group)
        return BaselineRanker.of_order(by_popularity(counts), self.group)

    def measure(self, ranker: Ranker) -> Measurement:
        batches = open_users(self.prepared, self.split, self.config, ranker.max_length, self.group)
        return measure(ranker, batches, self.config, self.prepared)

    def details(
        self, measured: Measurement, beside: Mapping[str, Mapping[str, float]]
    ) -> dict[str, Any]:
        """The report, without its request; ``beside`` has the metrics of baselines."""
        seconds = time.monotonic() - self.started
        return {
            "metrics": _json(measured.metrics),
            "standard_errors": _json(measured.standard_errors),
            "baselines": {name: _json(metrics) for name, metrics in beside.items()},
            "protocol": self.protocol(),
            "seconds": seconds,
            "users_per_second": measured.metrics["users"] / seconds,
        }

    def sample(self) -> dict[str, str]:
        """Which users of the split were ranked, if not all."""
        total, asked = self.prepared.manifest.file(f"{self.split}.parquet").rows, self.config
        if asked.sample_users is None or asked.sample_users >= total:
            return {}
        order = "the first in the order by a hash of user and seed"
        return {"users": f"{asked.sample_users} of {total}, {order}"}

    def protocol(self) -> dict[str, Any]:
        """What the metrics mean, for later readers."""
        prepared, without = self.prepared, f"{self.split}_users_without_history"
        return {
            "split": self.split,
            "data": prepared.manifest.split,
            "num_items": prepared.num_items,
            **describe_lists(self.config.filter_seen, self.config.min_count),
            "popularity": "training events only",
            "known": "metrics that end in /known leave out targets without training events",
            **self.sample(),
            "new": "metrics that end in /new leave out all other targets",
            "standard_errors": "of a mean over users, as a random sample",
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
    """A report with its metrics as numbers: NaN where there were no users to average."""
    parts = {
        part: {
            name: math.nan if value is None else value
            for name, value in report.get(part, {}).items()
        }
        for part in ("metrics", "standard_errors")
    }
    return {**report, **parts}


def _write_ranks(report: Path, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, str]:
    """Write the ranks of all users' targets, in the order of the split's file, beside the report.

    Args:
        report: ``NAME.json``; the ranks are ``NAME.users.parquet``.
        parts: users, ranks of their targets, and numbers of targets, from each rank.

    Returns:
        JSON: the file's name and checksum.
    """
    users, ranks, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values, lengths = gathered(ranks, offsets, users.argsort())
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    lists = pa.ListArray.from_arrays(offsets.int().numpy(), values.numpy())
    path = report.with_name(f"{report.stem}.users.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as partial:
        pq.write_table(pa.table({"ranks": lists}), partial, compression="zstd")
    return {"file": path.name, "sha256": sha256(path)}


def _json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics without NaN, which JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
