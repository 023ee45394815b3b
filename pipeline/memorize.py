"""The memorize stage: count each item's successors, and choose their weight in ranking.

::

    RUN/memory/successors.parquet   item, successor, strength; the strongest successors first
    RUN/memory/manifest.json        the chosen scale, and the validation metric of each scale tried

Afterwards evaluate, recommend and export of this run rank by model and memory together.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from torch import nn

from shardrec import __version__
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.option_checks import require_at_least
from shardrec.modules.ranking import Blocks
from shardrec.pipeline.model.config import DEFAULT_METRIC, MeasureConfig
from shardrec.pipeline.model.measure import measure, open_users
from shardrec.pipeline.model.ranker import StateRanker
from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.outputs.files import FileEntry, describe_parquet
from shardrec.pipeline.outputs.formats import MEMORY
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.successors import count_successors
from shardrec.pipeline.ranks import default_group, on_first_rank, on_this_rank
from shardrec.pipeline.run import folder as run_folder
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.served.memory import PAIRS, SUCCESSORS, read_memory

__all__ = ["Memorized", "MemorizeConfig", "memorize"]

AGES, DECAY = 3, 0.7
_ROWS_PER_GROUP = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorizeConfig:
    """Options of ``memorize``: size of the memory, and how its scale is chosen.

    Attributes:
        run: run folder of train; the memory is written into it.
        prepared: the folder the run was trained on; to choose among scales it must have validation
            users.
        neighbors: number of successors of each item to keep, the strongest.
        scales: candidate values of the scale: how much a strength of 1 adds to a logit; 0 is the
            model alone. The validation users are ranked once per value. A single value is taken
            without ranking, as for a run on all data with the scale that another run chose.
        metric: metric on the validation users; the scale with the largest value is chosen.
        ks: list lengths of the metrics.
        filter_seen: leave out items of the history while the scale is chosen, as in the lists.
        sample_users: choose by this many validation users only; they are a random sample.
        checkpoint: the weights that the scale is chosen for.
        force: replace an earlier memory.
        batch_size: users at a time on each rank.
        block_states: states of all ranks that are scored at a time.
        block_rows: rows of a shard that are scored at a time.
    """

    run: str
    prepared: str
    neighbors: int = 32
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
    metric: str = DEFAULT_METRIC
    ks: tuple[int, ...] = (5, 10, 20)
    filter_seen: bool = True
    sample_users: int | None = None
    checkpoint: Literal["best", "last"] = "best"
    force: bool = False
    batch_size: int = 256
    block_states: int = 256
    block_rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse sizes below 1, scales below 0 and a metric that is not measured."""
        require_at_least("neighbors", self.neighbors, 1)
        if not self.scales or not all(0 <= scale < float("inf") for scale in self.scales):
            raise ValueError(
                f"scales must be numbers of at least 0, got {self.scales}; use 0,1,2,4,8"
            )
        known = self.measure.metric_names()
        if self.metric not in known:
            raise ValueError(unknown_name("metric", self.metric, known))

    @property
    def measure(self) -> MeasureConfig:
        """The options by which the validation users are ranked."""
        return MeasureConfig(
            ks=self.ks,
            filter_seen=self.filter_seen,
            sample_users=self.sample_users,
            batch_size=self.batch_size,
            block_states=self.block_states,
            block_rows=self.block_rows,
        )


@dataclass(frozen=True, slots=True)
class Memorized:
    """The output of ``memorize``.

    Attributes:
        manifest: manifest of the memory, the same on every rank; "scale" is the chosen one times
            the loss's temperature, in units of the scores, and "tried" has the metric of each
            scale.
        is_new: False if the memory was there and nothing had to be done.
        seconds: wall time.
    """

    manifest: dict[str, Any]
    is_new: bool
    seconds: float

    def describe(self) -> str:
        """One line: the scale, and the metric on the validation users with and without it."""
        tried = {one["scale"]: one for one in self.manifest["tried"]}
        request = self.manifest["request"]
        name, pairs = request["metric"], self.manifest["files"][0]["rows"]
        if not tried:
            return f"memory of {pairs:,} item pairs, at the scale {request['scales'][0]:g}"
        best = max(tried, key=lambda scale: (tried[scale][name], -scale))
        alone = f", {tried[0.0][name]:.4f} without it" if 0.0 in tried else ""
        return (
            f"memory of {pairs:,} item pairs, at the scale {best:g} that is best on the validation "
            f"users: {name} {tried[best][name]:.4f}{alone}"
        )


def memorize(config: MemorizeConfig, *, encoder: nn.Module | None = None) -> Memorized:
    """Count the memory of a run, choose its scale, and write both into the run folder.

    Args:
        config: the same on every rank.
        encoder: the module given to ``train``, if any.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        FileExistsError: the run has a memory with other options or for other weights.
        ValueError: the run was not trained on the data, or there are several scales and no
            validation users.
        OSError: the disk is full.

    Collectives: on the default group; every rank must call it.
    """
    started, group = time.monotonic(), default_group()
    prepared = on_this_rank(lambda: Prepared.open(config.prepared), group)
    if len(config.scales) > 1:
        _require_validation_users(prepared)
    source = Source.find(config.run, prepared, config.checkpoint, encoder, with_memory=False)
    path = Path(config.run) / run_folder.MEMORY
    request = {"source": source.identity, **_request(config)}
    output = StageOutput(path=path, format=MEMORY, request=request, force=config.force, group=group)
    found = output.find()
    if found is not None:
        return Memorized(found, False, time.monotonic() - started)
    with output.write() as (folder, _):
        count = functools.partial(_write_successors, prepared, config.neighbors, folder)
        files = on_first_rank(count, group)
        chosen, tried = config.scales[0], dict[float, float]()
        if len(config.scales) > 1:
            tried = _try_scales(config, source, prepared, folder / SUCCESSORS, encoder)
            chosen = max(tried, key=lambda scale: (tried[scale], -scale))
        details = {
            "scale": chosen * source.config.loss.temperature,
            "ages": AGES,
            "decay": DECAY,
            "tried": [{"scale": scale, config.metric: tried[scale]} for scale in sorted(tried)],
            "versions": {"shardrec": __version__},
        }
        own = files if Communicator(group).rank == 0 else []
        manifest = output.finish(lambda: details, folder, own)
    return Memorized(manifest, True, time.monotonic() - started)


def _try_scales(
    config: MemorizeConfig,
    source: Source,
    prepared: Prepared,
    successors: Path,
    encoder: nn.Module | None,
) -> dict[float, float]:
    """The metric on the validation users for each scale, in units of a logit."""
    model, how = source.load(prepared, encoder), config.measure
    group, rows = model.group, model.catalog.row_range
    unscaled = {"scale": 1.0, "ages": AGES, "decay": DECAY}
    memory = on_this_rank(
        lambda: read_memory(successors, unscaled, prepared.num_items, rows, model.device), group
    )
    length, temperature = source.config.encoder.max_length, source.config.loss.temperature
    blocks = Blocks(states=how.block_states, rows=how.block_rows)
    tried = {}
    for scale in config.scales:
        beside = memory.scaled(scale * temperature) if scale else None
        ranker = StateRanker.of(dataclasses.replace(model, memory=beside), length, blocks)
        batches = open_users(prepared, "validation", how, length, group)
        tried[scale] = measure(ranker, batches, how, prepared).metrics[config.metric]
    return tried


def _write_successors(prepared: Prepared, most: int, folder: Path) -> list[FileEntry]:
    with pq.ParquetWriter(
        folder / SUCCESSORS, PAIRS, compression="zstd", write_page_checksum=True
    ) as writer:
        writer.write_table(count_successors(prepared, most), _ROWS_PER_GROUP)
    return [describe_parquet(folder, SUCCESSORS)]


def _require_validation_users(prepared: Prepared) -> None:
    if not prepared.manifest.counts["validation_users"]:
        raise ValueError(
            f"the data must have validation users to choose a scale by, got {prepared.path} without"
            "; give the one scale that an earlier run chose, or prepare with validation users"
        )


def _request(config: MemorizeConfig) -> dict[str, Any]:
    """The options that change the content, as JSON."""
    request = {
        "neighbors": config.neighbors,
        "scales": list(config.scales),
        "metric": config.metric,
        "filter_seen": config.filter_seen,
        "checkpoint": config.checkpoint,
    }
    # Absent where it is not set, as in memories that were written before there was the option.
    sample = {} if config.sample_users is None else {"sample_users": config.sample_users}
    return request | sample
