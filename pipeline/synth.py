"""The synth stage: generate event logs for which the best possible metrics are known.

``shardrec.pipeline.log.generator`` draws the events. This stage writes them to Parquet and measures
a few simple rankings on them.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.config import from_json, to_json
from shardrec.pipeline.log.generator import (
    TOP,
    Floats,
    GeneratedBlock,
    Ints,
    SynthConfig,
    World,
    blocks,
    top_columns,
)
from shardrec.pipeline.outputs.formats import SYNTH
from shardrec.pipeline.outputs.json_files import Shape, parse_json, require_shape
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.outputs.staging import staged_file
from shardrec.pipeline.prepared.data_files import check_path

__all__ = ["SynthConfig", "SynthReport", "generate"]

DISCOUNTS: Floats = 1.0 / np.log2(np.arange(TOP) + 2.0)
SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])
_LEAST_BYTES = 1  # of an event in the compressed file


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthReport:
    """Size of the log, and NDCG@10 of four rankings on the last events of a sample of users.

    Attributes:
        ceiling: ranking by the generator's own probabilities, with each user's tastes known.
        markov_limit: first-order Markov model of the clusters, which are known, with counted
            transitions: the limit of a model that reads only the previous event.
        markov: first-order Markov model of the items, counted on the log; popularity if an item has
            no transition.
        popularity: the most popular items for every user.
        report_users: number of last events that the four figures average over.
    """

    events: int
    users: int
    items: int
    ceiling: float
    markov_limit: float
    markov: float
    popularity: float
    report_users: int

    def __str__(self) -> str:
        """The lines the command prints."""
        return (
            f"{self.events:,} events of {self.users:,} users on {self.items:,} items\n"
            f"NDCG@10 over the whole catalog, last events of {self.report_users:,} users:\n"
            f"  ceiling (true model)                {self.ceiling:.4f}\n"
            f"  first-order Markov, clusters known  {self.markov_limit:.4f}\n"
            f"  first-order Markov on items         {self.markov:.4f}\n"
            f"  popularity (floor)                  {self.popularity:.4f}"
        )


def generate(config: SynthConfig, path: str | Path, *, force: bool = False) -> SynthReport:
    """Write the log to one Parquet file at ``path`` and evaluate four rankings on it.

    Memory is one block of about a million events, plus 8 bytes for each event that the Markov
    baseline counts. The file is renamed to ``path`` when complete. If ``path`` already holds the
    log of this config, it is left unchanged, with a log message.

    Args:
        config: sizes, seed and parameters of the random process.
        path: a file name; missing folders above it are created.
        force: whether to replace an existing file.

    Returns:
        The counts and the four NDCG@10 figures.

    Raises:
        FileExistsError: ``path`` holds something else.
        ValueError: the path is invalid, or the disk cannot hold so many events.
    """
    check_path("output", str(path))
    target = Path(path)
    found = None if force else _output(config, target).find()
    if found is not None:
        message = "%s already holds the log of these options: nothing to do"
        logging.getLogger(__name__).warning(message, target)
        return from_json(SynthReport, found["report"])
    target.parent.mkdir(parents=True, exist_ok=True)
    if _LEAST_BYTES * config.events > (free := shutil.disk_usage(target.parent).free):
        raise ValueError(
            f"events must fit on the disk of the output, got {config.events:,} with {free:,} bytes "
            "free; ask for fewer, or choose another disk"
        )
    world = World(config)
    judge = _Judge(world)
    with (
        staged_file(target) as partial,
        pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer,
    ):
        for table in _rechunk(_tables(world, judge), config.chunk_events):
            writer.write_table(table, row_group_size=config.chunk_events)
        report = judge.report()
        stored = {"config": to_json(config), "report": to_json(report)}
        writer.add_key_value_metadata({SYNTH.name: json.dumps(stored)})
    return report


def _output(config: SynthConfig, target: Path) -> StageOutput:
    return StageOutput(path=target, format=SYNTH, request=to_json(config), stored=_stored)


def _stored(target: Path) -> dict[str, Any]:
    """The config and the report in a log's footer; empty if the file is another one."""
    try:
        note = (pq.read_metadata(target).metadata or {}).get(SYNTH.name.encode())
    except (pa.ArrowInvalid, OSError):
        return {}
    if note is None:
        return {}
    try:
        shape: Shape = {"config": dict, "report": dict}
        stored = require_shape(parse_json(note), shape, str(target), "generate it again")
    except ValueError:
        return {}
    head = {"format": SYNTH.name, "schema_version": SYNTH.version}
    return head | {"request": stored["config"], "report": stored["report"]}


def _tables(world: World, judge: "_Judge") -> Iterator[pa.Table]:
    """Blocks as Parquet columns, in order of time as a log is."""
    for block in blocks(world):
        judge.observe(block)
        order = np.argsort(block.time, kind="stable")
        columns = [block.user[order], world.item_ids[block.item[order]], block.time[order]]
        yield pa.Table.from_arrays([pa.array(column) for column in columns], schema=SCHEMA)


def _rechunk(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        whole = count - count % rows
        if whole:
            joined = pa.concat_tables(held)
            yield joined.slice(0, whole)
            held, count = [joined.slice(whole)], count - whole
    if count:
        yield pa.concat_tables(held)


class _Judge:
    """Counts for the baselines, and a sample of last events on which they are ranked."""

    def __init__(self, world: World) -> None:
        self.world = world
        clusters = world.config.clusters
        self.counts: Ints = np.zeros(world.config.items, dtype=np.int64)
        self.cluster_pairs: Ints = np.zeros((clusters, clusters), dtype=np.int64)
        self.pairs: list[Ints] = []
        self.num_pairs = 0
        self.events = 0
        self.samples: list[tuple[Ints, Ints, Ints, Ints]] = []

    def observe(self, block: GeneratedBlock) -> None:
        """Count a block; the sampled users' last events stay out of every count."""
        config = self.world.config
        last = self._sampled(block.user[block.last])
        held = block.last[last]
        known = np.ones(len(block.item), dtype=bool)
        known[held] = False
        self.events += len(block.item)
        self.counts += np.bincount(block.item[known], minlength=config.items)
        first = np.append(0, block.last[:-1] + 1)
        known[first] = False
        after = np.flatnonzero(known)
        before = block.item[after - 1]
        after = block.item[after]
        keys = before % config.clusters * config.clusters + after % config.clusters
        self.cluster_pairs += np.bincount(keys, minlength=config.clusters**2).reshape(
            self.cluster_pairs.shape
        )
        room = config.markov_events - self.num_pairs
        self.pairs.append(before[:room] * config.items + after[:room])
        self.num_pairs += len(self.pairs[-1])
        self.samples.append(
            (block.tastes[last], block.previous[last], block.item[held - 1], block.item[held])
        )

    def _sampled(self, users: Ints) -> Ints:
        """Positions of the users at which the running share of the sample passes an integer."""
        config = self.world.config
        wanted = min(config.report_users, config.users)
        return np.flatnonzero((users + 1) * wanted // config.users > users * wanted // config.users)

    def report(self) -> SynthReport:
        """Rank the sampled events four ways."""
        config = self.world.config
        tastes, previous, before, target = (
            np.concatenate(column) for column in zip(*self.samples, strict=True)
        )
        favourites = top_columns(self.counts[None, :].astype(np.float64))
        transitions = self.cluster_pairs + self.world.popularity
        transitions = transitions / transitions.sum(axis=1, keepdims=True)
        ranked = {
            "ceiling": self._true_top(tastes, previous),
            "markov_limit": self.world.top_items(transitions)[before % config.clusters],
            "markov": self._markov_top(before, favourites[0]),
            "popularity": np.broadcast_to(favourites, (len(target), favourites.shape[1])),
        }
        figures = {name: _ndcg(items, target) for name, items in ranked.items()}
        return SynthReport(
            events=self.events,
            users=config.users,
            items=config.items,
            report_users=len(target),
            **figures,
        )

    def _true_top(self, tastes: Ints, previous: Ints) -> Ints:
        """(U, 10) best items by the generator's probabilities, some users at a time."""
        parts = [
            self.world.top_items(
                self.world.cluster_probability(
                    tastes[start : start + 1000], previous[start : start + 1000]
                )
            )
            for start in range(0, len(previous), 1000)
        ]
        return np.concatenate(parts)

    def _markov_top(self, before: Ints, favourites: Ints) -> Ints:
        """(U, 10) most counted followers of ``before``; popularity settles ties, fills the rest."""
        items = self.world.config.items
        asked, position = np.unique(before, return_inverse=True)
        keys, counts = np.unique(np.concatenate(self.pairs), return_counts=True)
        keep = np.isin(keys // items, asked)
        keys, counts = keys[keep], counts[keep]
        row = np.searchsorted(asked, keys // items)
        best = np.lexsort((keys % items, -self.counts[keys % items], -counts, row))
        row, item = row[best], (keys % items)[best]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        row, item, place = row[place < TOP], item[place < TOP], place[place < TOP]
        # Counted followers first, then the favourites that are not among them.
        listed = np.full((len(asked), 2 * TOP), -1, dtype=np.int64)
        listed[row, place] = item
        fill = np.resize(favourites, TOP)
        fresh = ~(listed[:, :TOP, None] == fill).any(axis=1)
        listed[:, TOP:] = np.where(fresh, fill, -1)
        first = np.argsort(listed < 0, axis=1, kind="stable")[:, :TOP]
        return np.take_along_axis(listed, first, axis=1)[position]


def _ndcg(ranked: Ints, target: Ints) -> float:
    """Mean NDCG@10 with one relevant item.

    >>> round(_ndcg(np.array([[7, 3], [7, 3]]), np.array([7, 3])), 4)
    0.8155
    """
    hit = ranked == target[:, None]
    return float((hit * DISCOUNTS[: ranked.shape[1]]).sum(axis=1).mean())
