"""The evaluate stage: a run and its prepared folder in, ``metrics.json`` out."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrec.modules.shard import RowShard
from shardrec.pipeline.checkpoint import Checkpoints, load_checkpoint, write_atomically
from shardrec.pipeline.data import Prepared
from shardrec.pipeline.group import (
    default_group,
    on_first_rank,
    on_this_rank,
    rank_of,
    size_of,
)
from shardrec.pipeline.measure import MeasureConfig, Split, measure, open_users
from shardrec.pipeline.model import Model
from shardrec.pipeline.run import TrainConfig, build_model, open_run

__all__ = ["evaluate", "evaluate_popularity", "load_model"]


def evaluate(
    run: str,
    data: str,
    config: MeasureConfig | None = None,
    *,
    split: Split = "test",
    checkpoint: Literal["best", "last"] = "best",
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Rank the whole catalog for every user of a split and write ``metrics.json`` into the run.

    Runs on any number of ranks, whatever number trained.

    Args:
        run: the run folder.
        data: the prepared folder the run was trained on.
        config: list lengths and the seen filter; None takes the defaults.
        split: which users.
        checkpoint: which weights.
        encoder: the module handed to ``train``, where one was.

    Returns:
        What was written: metrics, and the protocol they follow.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        ValueError: the run does not fit the data.

    Collectives: on the default group; every rank must call it.
    """
    started, group, config = time.monotonic(), default_group(), config or MeasureConfig()
    prepared = on_this_rank(lambda: Prepared.open(data), group)
    trained = on_first_rank(
        lambda: open_run(Path(run), prepared, own_encoder=encoder is None), group
    )
    folder = on_first_rank(
        lambda: Checkpoints(Path(run) / "checkpoints", None).find(checkpoint), group
    )
    model, progress = load_model(trained, folder, prepared, encoder)
    batches = open_users(prepared, split, config, trained.encoder.max_length, group)
    metrics = measure(model.last_states, model.scored_shard(), batches, config, prepared)
    seconds = time.monotonic() - started
    report = {
        "metrics": metrics,
        "protocol": describe_protocol(prepared, split, config),
        "checkpoint": {"which": checkpoint, "folder": folder.name, "step": progress["step"]},
        "seconds": seconds,
        "users_per_second": metrics["users"] / seconds,
    }
    on_first_rank(lambda: _write(Path(run) / "metrics.json", report), group)
    return report


def evaluate_popularity(
    data: str, config: MeasureConfig | None = None, *, split: Split = "test"
) -> dict[str, float]:
    """Metrics of ranking every user by training counts alone: the floor for any model.

    The same ranking as a model's, over a table of width 1.

    Args:
        data: a prepared folder.
        config: list lengths and the seen filter; None takes the defaults.
        split: which users.

    Collectives: on the default group; every rank must call it.
    """
    group, config = default_group(), config or MeasureConfig()
    prepared = on_this_rank(lambda: Prepared.open(data), group)
    batches = open_users(prepared, split, config, 1, group)
    return measure(_same_state, popularity_shard(prepared, group), batches, config, prepared)


def popularity_shard(prepared: Prepared, group: dist.ProcessGroup | None) -> RowShard:
    """A (V, 1) table of training counts, this rank holding a block of its rows."""
    counts = prepared.item_counts()
    block = -(-prepared.num_items // size_of(group))
    first = min(rank_of(group) * block, prepared.num_items)
    rows = counts[first : first + block].float()[:, None]
    return RowShard(rows, first, prepared.num_items, group)


def load_model(
    config: TrainConfig, checkpoint: Path, prepared: Prepared, encoder: nn.Module | None = None
) -> tuple[Model, Mapping[str, Any]]:
    """The model of a checkpoint, on the ranks of the default group.

    Args:
        config: of the run.
        checkpoint: a complete checkpoint folder.
        prepared: the data of the run.
        encoder: the module handed to ``train``, where one was.

    Returns:
        The model, and the progress stored with it.

    Collectives: on the default group.
    """
    group = default_group()
    model = build_model(config, prepared.num_items, encoder, group)
    shard = model.catalog.shard
    rows = range(shard.first_row, shard.first_row + shard.rows.shape[0])
    state = on_this_rank(lambda: load_checkpoint(checkpoint, rows), group)
    model.encoder.load_state_dict(state.encoder)
    model.catalog.load_state_dict(state.table)
    model.encoder.eval()
    return model, state.progress


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


def _write(path: Path, report: Mapping[str, Any]) -> None:
    finite = {
        name: value if math.isfinite(value) else None for name, value in report["metrics"].items()
    }
    write_atomically(path, json.dumps({**report, "metrics": finite}, indent=1))


def _same_state(items: Tensor, lengths: Tensor) -> Tensor:
    """(B, 1) ones: every user gets the counts as scores."""
    return torch.ones(items.shape[0], 1, device=items.device)
