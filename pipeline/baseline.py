"""The baseline stage: count popularity and item-to-item scores, which a model must beat."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from shardrec import __version__
from shardrec.modules.option_checks import require_at_least, require_choice
from shardrec.modules.ranking import by_popularity
from shardrec.pipeline.model.baseline_ranker import BaselineRanker
from shardrec.pipeline.outputs.files import check_files, describe_parquet
from shardrec.pipeline.outputs.formats import BASELINE
from shardrec.pipeline.outputs.stage_output import StageOutput, read_output
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.neighbors import (
    NEIGHBORS,
    Counting,
    count_last_items,
    count_neighbors,
)
from shardrec.pipeline.prepared.row_groups import RowGroups

__all__ = ["BASELINES", "BaselineConfig", "Built", "Kind", "baseline", "open_baseline"]

BASELINES = "baselines"
# Weights of the cosine and of the transition counts.
_WEIGHTS = {"knn": (1.0, 0.0), "next": (0.0, 1.0), "knn_next": (1.0, 3.0)}
_ORDER = pa.schema([("item", pa.int64())])
_ORDER_NAME, _NEIGHBORS_NAME = "order.parquet", "neighbors.parquet"

Kind = Literal["popularity", "recent", "knn", "next", "knn_next"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """Options of ``baseline``: the data, and what is counted.

    Attributes:
        prepared: prepared folder, whose training sequences are counted.
        kind: the score that items are ranked by. popularity: training events of the item. recent:
            training sequences that end with the item. knn: cosine similarity of two items, each a
            binary vector over the sequences. next: how often one item directly followed the
            other. knn_next: the sum knn + 3 next.
        output: folder to write, new or empty; none: baselines/KIND in the prepared folder.
        neighbors: neighbours with the highest scores that are kept for each item, separately for
            knn and for next.
        last_events: how many of the last events of a sequence knn counts.
        force: replace an earlier output of this stage.
    """

    prepared: str
    kind: Kind = "knn_next"
    output: str | None = None
    neighbors: int = 100
    last_events: int = 200
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers below 1, and options that would be ignored."""
        require_choice("kind", self.kind, ("popularity", "recent", *_WEIGHTS))
        for name, kinds in (("neighbors", _WEIGHTS), ("last_events", ("knn", "knn_next"))):
            require_at_least(name, getattr(self, name), 1)
            default = type(self).__dataclass_fields__[name].default
            if self.kind not in kinds and getattr(self, name) != default:
                raise ValueError(
                    f"{name} must come with kind {' or '.join(kinds)}, got {self.kind}; remove it"
                )

    @property
    def folder(self) -> Path:
        """The folder that the baseline is written to."""
        return Path(self.output or Path(self.prepared) / BASELINES / self.kind)


@dataclass(frozen=True, slots=True)
class Built:
    """The output of ``baseline``.

    Attributes:
        manifest: manifest of the output folder; its ``counts`` has the number of item pairs kept.
        is_new: False if the output was there and nothing had to be done.
        seconds: wall time.
    """

    manifest: dict[str, Any]
    is_new: bool
    seconds: float


def baseline(config: BaselineConfig) -> Built:
    """Count a baseline from the training sequences, and write it as a folder to evaluate.

    Memory is that of ``count_neighbors``. With m ``neighbors`` at most 2 m V pairs are written;
    ranking holds 8 bytes for each pair on every rank.

    Raises:
        FileNotFoundError, ValueError: the folder is not a complete prepared folder.
        FileExistsError: the output folder holds something else.
        OSError: the disk is full.
    """
    started, prepared = time.monotonic(), Prepared.open(config.prepared)
    request: dict[str, Any] = {
        "data": prepared.fingerprint,
        "kind": config.kind,
        "ranks": "by sums of scores",
    }
    if config.kind in _WEIGHTS:
        request |= {"neighbors": config.neighbors, "last_events": config.last_events}
    output = StageOutput(path=config.folder, format=BASELINE, request=request, force=config.force)
    found = output.find()
    if found is not None:
        logging.getLogger(__name__).info("%s is complete already: nothing to do", output.path)
        return Built(found, False, time.monotonic() - started)
    with output.write() as (folder, _):
        pairs = _write(config, prepared, folder)
        files = [describe_parquet(folder, name) for name in (_ORDER_NAME, _NEIGHBORS_NAME)]
        counts = {"items": prepared.num_items, "pairs": pairs}
        details = {"kind": config.kind, "data": prepared.fingerprint, "counts": counts}
        details["versions"] = {"shardrec": __version__}
        manifest = output.finish(lambda: details, folder, files)
    return Built(manifest, True, time.monotonic() - started)


def open_baseline(
    folder: Path, prepared: Prepared, group: dist.ProcessGroup | None
) -> BaselineRanker:
    """The ranker of a baseline, after checking that it was counted on this data.

    Raises:
        FileNotFoundError, ValueError: the folder is no complete baseline, or was counted on other
            data.
    """
    manifest = read_output(folder, BASELINE)
    if manifest["data"] != prepared.fingerprint:
        raise ValueError(
            f"the baseline must belong to the prepared data, got {folder} of {manifest['data']} "
            f"and {prepared.path} of {prepared.fingerprint}; count another with "
            "`shardrec baseline`"
        )
    check_files(folder, manifest["files"], BASELINE.remedy, verify=True)
    order = pq.read_table(folder / _ORDER_NAME).column("item").to_numpy()
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in NEIGHBORS.names}
    groups = RowGroups([folder / _NEIGHBORS_NAME], NEIGHBORS.names)
    for index in range(len(groups)):
        table = groups.read(index, NEIGHBORS.names)
        for name, parts in columns.items():
            parts.append(table.column(name).to_numpy())
    joined = {
        name: np.concatenate([*parts, np.zeros(0, NEIGHBORS.field(name).type.to_pandas_dtype())])
        for name, parts in columns.items()
    }
    offsets = np.cumsum([0, *np.bincount(joined["item"], minlength=prepared.num_items)])
    return BaselineRanker(
        order=torch.tensor(order),
        offsets=torch.from_numpy(offsets),
        neighbors=torch.from_numpy(joined["neighbor"]),
        scores=torch.from_numpy(joined["score"]),
        group=group,
    )


def _write(config: BaselineConfig, prepared: Prepared, folder: Path) -> int:
    """Write order and neighbours; returns the number of pairs."""
    files, order = prepared.train_files, by_popularity(prepared.item_counts())
    tables: Iterator[pa.Table] = iter(())
    if config.kind in _WEIGHTS:
        knn, step = _WEIGHTS[config.kind]
        how = Counting(knn=knn, next=step, most=config.neighbors, last_events=config.last_events)
        tables = count_neighbors(files, order.numpy(), how)
    if config.kind == "recent":
        last = torch.from_numpy(count_last_items(files, prepared.num_items))
        order = order[last[order].argsort(descending=True, stable=True)]
    pq.write_table(pa.table([order.numpy()], schema=_ORDER), folder / _ORDER_NAME)
    return _write_neighbors(folder / _NEIGHBORS_NAME, tables)


def _write_neighbors(path: Path, tables: Iterator[pa.Table]) -> int:
    pairs = 0
    with pq.ParquetWriter(path, NEIGHBORS, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            pairs += table.num_rows
    return pairs
