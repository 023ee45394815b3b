"""Generated event logs whose own next-item probabilities are known.

Items live in clusters. A user holds a few tastes (clusters); each taste is forgotten and redrawn now and then (drift). The
cluster of the next event comes from one of three places:

- a taste of the user, with probability ``taste`` (a model has to read the whole history for it),
- the successor of the previous event's cluster, with probability ``follow`` (order matters),
- the clusters' own popularity, with probability ``1 - taste - follow`` (noise nobody can predict).

Inside a cluster items follow Zipf's law. So the probability of item j is
``P(j) = P(cluster of j | tastes, previous cluster) * zipf(rank of j in its cluster)``,
and the best possible ranking is known for every event. Item embeddings need to learn little more than a cluster, and most events
fall on few items, so that a small model learns the structure from a few events per item.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["SynthConfig", "SynthReport", "generate"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

EVENTS_PER_BLOCK = 1 << 20
TOP = 10
DISCOUNTS: Floats = 1.0 / np.log2(np.arange(TOP) + 2.0)
SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthConfig:
    """What to generate; two equal configs write equal events.

    ``chunk_events`` (rows in a Parquet row group) changes the file's layout and never the events.
    """

    users: int = 40_000
    items: int = 50_000
    events: int = 1_000_000
    seed: int = 0
    clusters: int = 128
    tastes: int = 3
    taste: float = 0.65
    follow: float = 0.25
    drift: float = 0.02
    item_exponent: float = 1.2
    cluster_exponent: float = 0.5
    length_spread: float = 0.7
    start_time: int = 1_600_000_000
    duration_s: int = 365 * 86_400
    chunk_events: int = 1 << 20
    report_users: int = 4_000
    markov_events: int = 20_000_000

    def __post_init__(self) -> None:
        """Refuse sizes and probabilities that no log can have."""
        for name in (
            "users",
            "items",
            "clusters",
            "tastes",
            "chunk_events",
            "duration_s",
            "report_users",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        _require(
            self.items >= TOP, "items", f"at least {TOP} (ranking is judged at {TOP})", self.items
        )
        _require(
            self.clusters <= self.items, "clusters", f"at most items = {self.items}", self.clusters
        )
        needed = 2 * self.users
        _require(self.events >= needed, "events", f"at least 2 per user = {needed}", self.events)
        _require(self.markov_events >= 0, "markov_events", "0 or more", self.markov_events)
        for name in ("taste", "follow", "drift"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "within [0, 1]", getattr(self, name))
        total = self.taste + self.follow
        _require(total <= 1.0 + 1e-9, "taste + follow", "at most 1", total)


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthReport:
    """What was written, and NDCG@10 over the whole catalog on a sample of the users' last events.

    Attributes:
        ceiling: ranking by the generator's own probabilities (tastes known).
        markov_limit: first-order Markov with the clusters known and their transitions counted: what a
            model that reads only the previous event reaches with unlimited data.
        markov: first-order Markov on items, counted on the log, popularity where nothing was counted.
        popularity: the most popular items for everybody.
        report_users: last events the four figures are means over.
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


def generate(config: SynthConfig, path: str | Path) -> SynthReport:
    """Write the log to one Parquet file at ``path`` and judge four rankings on it.

    Memory is one block of about a million events, plus 8 bytes for each event the Markov baseline counts.
    The file appears under its name only when it is complete.

    Args:
        config: sizes, seed and the shape of the process.
        path: a file name; folders above it are made, an existing file is replaced.

    Returns:
        Counts and the four NDCG@10 figures.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    world = _World(config)
    judge = _Judge(world)
    with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for table in _rechunk(_tables(world, judge), config.chunk_events):
            writer.write_table(table, row_group_size=config.chunk_events)
    partial.replace(target)
    return judge.report()


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value}; choose another value")


@dataclass(frozen=True, slots=True)
class _Block:
    """Events of one run of users in user-major order, and each user's state before the last event.

    ``user`` (E,), ``item`` (E,) internal index, ``time`` (E,), ``last`` (U,) position of the last event,
    ``tastes`` (U, M) and ``previous`` (U,) the clusters that the last event was drawn from.
    """

    user: Ints
    item: Ints
    time: Ints
    last: Ints
    tastes: Ints
    previous: Ints


class _World:
    """The fixed part of the process. Item i is in cluster i % C and has rank i // C in it."""

    def __init__(self, config: SynthConfig) -> None:
        self.config = config
        generator = self.generator(0)
        clusters = config.clusters
        popularity = np.arange(1, clusters + 1, dtype=np.float64) ** -config.cluster_exponent
        self.popularity: Floats = generator.permutation(popularity / popularity.sum())
        self.popularity_cdf: Floats = np.cumsum(self.popularity)
        ring = generator.permutation(clusters)
        self.successor: Ints = np.empty(clusters, dtype=np.int64)
        self.successor[ring] = np.roll(ring, -1)
        self.item_ids: Ints = generator.permutation(config.items)
        self.sizes: Ints = (config.items - np.arange(clusters) + clusters - 1) // clusters
        zipf = np.arange(1, self.sizes[0] + 1, dtype=np.float64) ** -config.item_exponent
        self.zipf: Floats = zipf
        self.zipf_cdf: Floats = np.cumsum(zipf)
        self.users_per_block = max(1, EVENTS_PER_BLOCK * config.users // config.events)

    def generator(self, *key: int) -> np.random.Generator:
        """Random numbers that depend on the seed and ``key`` only."""
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self.config.seed, *key]))
        )

    def draw_cluster(self, uniform: Floats) -> Ints:
        """Clusters by their own popularity."""
        found = np.searchsorted(
            self.popularity_cdf, uniform * self.popularity_cdf[-1], side="right"
        )
        return np.minimum(found, self.config.clusters - 1)

    def draw_item(self, cluster: Ints, uniform: Floats) -> Ints:
        """Items by Zipf's law inside ``cluster``."""
        size = self.sizes[cluster]
        found = np.searchsorted(self.zipf_cdf, uniform * self.zipf_cdf[size - 1], side="right")
        return np.minimum(found, size - 1) * self.config.clusters + cluster

    def cluster_probability(self, tastes: Ints, previous: Ints) -> Floats:
        """(U, C) float64: P(next cluster) of users with (U, M) tastes after (U,) previous clusters."""
        config = self.config
        noise = 1.0 - config.taste - config.follow
        probability = np.tile(noise * self.popularity, (len(previous), 1))
        users = np.arange(len(previous))
        for slot in range(config.tastes):
            np.add.at(probability, (users, tastes[:, slot]), config.taste / config.tastes)
        probability[users, self.successor[previous]] += config.follow
        return probability

    def top_items(self, cluster_probability: Floats) -> Ints:
        """(U, 10) int64: the items of highest P(cluster) * zipf; only the heads of clusters can be there."""
        heads = np.arange(min(TOP, len(self.zipf)))[None, :, None]
        clusters = np.arange(self.config.clusters)[None, None, :]
        inside = self.zipf[heads] / self.zipf_cdf[self.sizes - 1]
        inside = np.where(heads < self.sizes, inside, 0.0)
        score = (cluster_probability[:, None, :] * inside).reshape(len(cluster_probability), -1)
        items = (heads * self.config.clusters + clusters).reshape(-1)
        return items[_top(score)]


def _blocks(world: _World) -> Iterator[_Block]:
    """The log, one run of users after the other; each block has its own random stream."""
    config = world.config
    for index, first in enumerate(range(0, config.users, world.users_per_block)):
        last = min(first + world.users_per_block, config.users)
        budget = config.events * last // config.users - config.events * first // config.users
        yield _block(world, world.generator(1, index), first, last - first, budget)


def _block(
    world: _World, random: np.random.Generator, first: int, users: int, budget: int
) -> _Block:
    """Users ``first .. first + users``, ``budget`` events in all, at least two each."""
    lengths = _lengths(random, users, budget, world.config.length_spread)
    # Longest first: the users who still act at step t are a prefix, so that a step is a slice.
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths)
    offset, counts = (ends - lengths)[order], lengths[order]
    active = np.searchsorted(-counts, -np.arange(1, counts[0] + 1), side="right")
    cluster, tastes, previous = _walk(world, random, active, offset, budget)
    item = world.draw_item(cluster, random.random(budget))
    back = np.argsort(order, kind="stable")
    return _Block(
        user=np.repeat(np.arange(first, first + users), lengths),
        item=item,
        time=_times(world.config, random, lengths, ends),
        last=ends - 1,
        tastes=tastes[back],
        previous=previous[back],
    )


def _walk(
    world: _World, random: np.random.Generator, active: Ints, offset: Ints, budget: int
) -> tuple[Ints, Ints, Ints]:
    """Clusters of all events, step by step over the users who still act.

    Returns:
        (E,) clusters in user-major order; (U, M) tastes and (U,) previous cluster before the last event.
    """
    config = world.config
    users = len(offset)
    cluster = np.empty(budget, dtype=np.int64)
    tastes = world.draw_cluster(random.random((users, config.tastes)))
    previous = world.draw_cluster(random.random(users))
    current = previous.copy()
    for step, count in enumerate(active):
        rows = np.arange(count)
        if step:
            previous[:count] = current[:count]
            drifted = np.flatnonzero(random.random(count) < config.drift)
            slots = random.integers(config.tastes, size=len(drifted))
            tastes[drifted, slots] = world.draw_cluster(random.random(len(drifted)))
        choice = random.random(count)
        taken = tastes[rows, random.integers(config.tastes, size=count)]
        chosen = np.where(choice < config.taste, taken, world.successor[previous[:count]])
        noise = np.flatnonzero(choice >= config.taste + config.follow)
        chosen[noise] = world.draw_cluster(random.random(len(noise)))
        current[:count] = chosen
        cluster[offset[:count] + step] = chosen
    return cluster, tastes, previous


def _lengths(random: np.random.Generator, users: int, budget: int, spread: float) -> Ints:
    """(U,) int64 event counts: two each, the rest shared out in log-normal proportion, exact in sum."""
    share = np.cumsum(np.exp(spread * random.standard_normal(users)))
    cuts = np.floor(share * ((budget - 2 * users) / share[-1])).astype(np.int64)
    cuts[-1] = budget - 2 * users
    return 2 + np.diff(cuts, prepend=0)


def _times(config: SynthConfig, random: np.random.Generator, lengths: Ints, ends: Ints) -> Ints:
    """(E,) int64 seconds, ascending per user: from a random first day to the end of the log."""
    users = np.repeat(np.arange(len(lengths)), lengths)
    # n gaps and a rest: exponential spacings are uniform times in order.
    total = np.cumsum(random.standard_exponential(int(ends[-1])))
    before = np.where(ends > lengths, total[ends - lengths - 1], 0.0)
    inside = total - before[users]
    whole = total[ends - 1] - before + random.standard_exponential(len(lengths))
    start = random.random(len(lengths)) * 0.9
    moment = start[users] + (1.0 - start[users]) * inside / whole[users]
    return config.start_time + np.floor(moment * config.duration_s).astype(np.int64)


def _tables(world: _World, judge: "_Judge") -> Iterator[pa.Table]:
    """Blocks as Parquet columns, in order of time as a log is."""
    for block in _blocks(world):
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
    """Collects what the baselines count, and a sample of last events, and ranks them."""

    def __init__(self, world: _World) -> None:
        self.world = world
        clusters = world.config.clusters
        self.counts: Ints = np.zeros(world.config.items, dtype=np.int64)
        self.cluster_pairs: Ints = np.zeros((clusters, clusters), dtype=np.int64)
        self.pairs: list[Ints] = []
        self.num_pairs = 0
        self.events = 0
        self.samples: list[tuple[Ints, Ints, Ints, Ints]] = []

    def observe(self, block: _Block) -> None:
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
        self.pairs.append((before * config.items + after)[:room])
        self.num_pairs += len(self.pairs[-1])
        self.samples.append(
            (block.tastes[last], block.previous[last], block.item[held - 1], block.item[held])
        )

    def _sampled(self, users: Ints) -> Ints:
        """Positions of the users whose running share of the sample steps over an integer."""
        config = self.world.config
        wanted = min(config.report_users, config.users)
        return np.flatnonzero((users + 1) * wanted // config.users > users * wanted // config.users)

    def report(self) -> SynthReport:
        """Rank the sampled events four ways."""
        config = self.world.config
        tastes, previous, before, target = (
            np.concatenate(column) for column in zip(*self.samples, strict=True)
        )
        favourites = _top(self.counts[None, :].astype(np.float64))
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
        """(U, 10) most counted followers of ``before``; popularity decides ties and fills the rest."""
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


def _top(score: Floats) -> Ints:
    """(U, 10) int64 columns of the highest scores, lower index first among equals."""
    return np.argsort(-score, axis=1, kind="stable")[:, :TOP]


def _ndcg(ranked: Ints, target: Ints) -> float:
    """Mean NDCG@10 with one relevant item.

    >>> round(_ndcg(np.array([[7, 3], [7, 3]]), np.array([7, 3])), 4)
    0.8155
    """
    hit = ranked == target[:, None]
    return float((hit * DISCOUNTS[: ranked.shape[1]]).sum(axis=1).mean())
