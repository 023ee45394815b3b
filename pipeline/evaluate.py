"""The evaluate stage: a run and its prepared folder in, ``metrics.json`` out."""

import functools
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrec.kernels.shard import RowShard
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.model.measure import Split, measure, open_users
from shardrec.pipeline.prepared.loader import Prepared
from shardrec.pipeline.ranks import (
    default_group,
    on_first_rank,
    on_this_rank,
    rank_of,
    size_of,
)
from shardrec.pipeline.run.trained import Source, load_model
from shardrec.pipeline.stored_report import StoredReport

__all__ = ["FORMAT", "evaluate", "evaluate_popularity", "with_numbers"]

FORMAT = "shardrec.metrics"


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

    Runs on any number of ranks, whatever number trained. Where the report of the same weights,
    users and options is there already, says so and does nothing.

    Args:
        run: the run folder.
        data: the prepared folder the run was trained on.
        config: list lengths and the seen filter; None takes the defaults.
        split: which users.
        checkpoint: which weights.
        encoder: the module handed to ``train``, where one was.
        output: the report to write; None takes ``metrics.json`` in the run.
        force: whether a report that is there is made again or replaced.

    Returns:
        What was written: metrics, and the protocol they follow.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        FileExistsError: the report that is there is of other weights, users or options.
        ValueError: the run does not fit the data.

    Collectives: on the default group; every rank must call it.
    """
    started, group, config = time.monotonic(), default_group(), config or MeasureConfig()
    prepared = on_this_rank(lambda: Prepared.open(data), group)
    source = Source.find(run, prepared, checkpoint, encoder)
    request = {"source": source.identity, "checkpoint": checkpoint, **_asked(split, config)}
    path = Path(output or Path(run) / "metrics.json")
    stored = StoredReport(path, FORMAT, request, force, {"metrics": dict})
    found = _found(stored, group)
    if found is not None:
        return with_numbers(found)
    model, progress = load_model(source.config, source.checkpoint, prepared, encoder)
    batches = open_users(prepared, split, config, source.config.encoder.max_length, group)
    metrics = measure(model.last_states, model.scored_shard(), batches, config, prepared)
    which = {"which": checkpoint, "folder": source.checkpoint.name, "step": progress["step"]}
    details = _details(metrics, prepared, split, config, started) | {"checkpoint": which}
    return with_numbers(on_first_rank(functools.partial(stored.write, details), group))


def with_numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """A stored report with its metrics as numbers: NaN where there were no users to average."""
    metrics = {n: math.nan if value is None else value for n, value in report["metrics"].items()}
    return {**report, "metrics": metrics}


def evaluate_popularity(
    data: str,
    config: MeasureConfig | None = None,
    *,
    split: Split = "test",
    output: str | None = None,
    force: bool = False,
) -> dict[str, float]:
    """Metrics of ranking every user by training counts alone: the floor for any model.

    The same ranking as a model's, over a table of width 1.

    Args:
        data: a prepared folder.
        config: list lengths and the seen filter; None takes the defaults.
        split: which users.
        output: the report to write; None writes none.
        force: whether a report that is there is made again or replaced.

    Raises:
        FileExistsError: the report that is there is of other data or options.

    Collectives: on the default group; every rank must call it.
    """
    started, group, config = time.monotonic(), default_group(), config or MeasureConfig()
    prepared = on_this_rank(lambda: Prepared.open(data), group)
    source = {"ranking": "popularity", "data": prepared.fingerprint}
    request = {"source": source, **_asked(split, config)}
    stored = None
    if output is not None:
        stored = StoredReport(Path(output), FORMAT, request, force, {"metrics": dict})
        found = _found(stored, group)
        if found is not None:
            return dict(with_numbers(found)["metrics"])
    batches = open_users(prepared, split, config, 1, group)
    shard = popularity_shard(prepared, group)
    metrics = measure(_same_state, shard, batches, config, prepared)
    if stored is not None:
        details = _details(metrics, prepared, split, config, started)
        on_first_rank(functools.partial(stored.write, details), group)
    return metrics


def _asked(split: Split, config: MeasureConfig) -> dict[str, Any]:
    return {"split": split, "ks": list(config.ks), "filter_seen": config.filter_seen}


def _found(stored: StoredReport, group: dist.ProcessGroup | None) -> dict[str, Any] | None:
    """The report that is there already; rank 0 says so."""
    found = on_first_rank(stored.finished, group)
    if found is not None and rank_of(group) == 0:
        message = "%s already holds the metrics of these weights, users and options: nothing to do"
        logging.getLogger(__name__).warning(message, stored.path)
    return found


def _details(
    metrics: Mapping[str, float],
    prepared: Prepared,
    split: Split,
    config: MeasureConfig,
    started: float,
) -> dict[str, Any]:
    """What a report says besides its request."""
    seconds = time.monotonic() - started
    return {
        "metrics": {n: value if math.isfinite(value) else None for n, value in metrics.items()},
        "protocol": describe_protocol(prepared, split, config),
        "seconds": seconds,
        "users_per_second": metrics["users"] / seconds,
    }


def popularity_shard(prepared: Prepared, group: dist.ProcessGroup | None) -> RowShard:
    """A (V, 1) table of training counts, this rank holding a block of its rows.

    Collectives: one gather of small objects.
    """
    counts = on_this_rank(prepared.item_counts, group)
    block = -(-prepared.num_items // size_of(group))
    first = min(rank_of(group) * block, prepared.num_items)
    rows = counts[first : first + block].float()[:, None]
    return RowShard(rows, first, prepared.num_items, group)


def describe_protocol(prepared: Prepared, split: Split, config: MeasureConfig) -> dict[str, Any]:
    """What the metrics mean, for whoever reads them later."""
    return {
        "split": split,
        "data": prepared.manifest.split,
        "num_items": prepared.num_items,
        "candidates": "the whole catalog, items first seen after the split included",
        "popularity": "training events only",
        "known": "metrics that end in /known leave out targets without training events",
        "seen_items": "removed, targets excepted" if config.filter_seen else "not removed",
        "ties": "lower item index first",
        "users_without_history": prepared.manifest.counts.get(f"{split}_users_without_history"),
        "data_fingerprint": prepared.fingerprint,
    }


def _same_state(items: Tensor, lengths: Tensor) -> Tensor:
    """(B, 1) ones: every user gets the counts as scores."""
    return torch.ones(items.shape[0], 1, device=items.device)
