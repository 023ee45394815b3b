"""Generate event logs with known next-item probabilities.

Each item belongs to a cluster. A user has a few tastes (clusters); from time to time one taste is
replaced by a new one (drift). The cluster of the next event is one of three:

- a taste of the user, with probability ``taste`` (a model must use the whole history),
- the successor of the previous event's cluster, with probability ``follow`` (the order matters),
- a cluster drawn by popularity, with probability ``1 - taste - follow`` (unpredictable noise).

Inside a cluster items follow Zipf's law. So the probability of item j is
``P(j) = P(cluster of j | tastes, previous cluster) * zipf(rank of j in its cluster)``,
and the best possible ranking is known for every event. A small model learns from few events: an
item's vector encodes little more than its cluster, and most events are of few items.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "TOP",
    "Floats",
    "GeneratedBlock",
    "Ints",
    "SynthConfig",
    "World",
    "blocks",
    "top_columns",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

EVENTS_PER_BLOCK = 1 << 20
TOP = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthConfig:
    """Options of a generated log; equal configs generate equal events.

    Attributes:
        users: number of users; each gets at least two events.
        items: size of the catalog; rare items get no event (of the default 80,000, about 56,000
            do).
        events: exact number of events.
        seed: seed of all random choices.
        clusters: number of groups of items.
        tastes: number of clusters that a user likes at any time.
        taste: probability that an event comes from one of the user's tastes, which a model learns
            only from the whole history.
        follow: probability that it comes from the successor of the previous event's cluster, which
            a model learns from the order; the rest is noise.
        drift: probability, at each event, that a new taste replaces an old one.
        item_exponent: exponent of Zipf's law inside a cluster; the larger, the more uneven.
        cluster_exponent: exponent of Zipf's law over clusters; 0 makes all clusters equally
            popular.
        length_spread: standard deviation of the logarithm of events per user.
        start_time: first second of the log, in Unix time.
        duration_s: seconds the log covers; by default a year.
        chunk_events: rows in a Parquet row group; changes the layout of the file, not the events.
        report_users: upper limit of the users in the report.
        markov_events: upper limit of the events counted by the item-level Markov baseline (8 bytes
            each).
    """

    users: int = 40_000
    items: int = 80_000
    events: int = 1_000_000
    seed: int = 0
    clusters: int = 128
    tastes: int = 2
    taste: float = 0.75
    follow: float = 0.15
    drift: float = 0.01
    item_exponent: float = 1.3
    cluster_exponent: float = 0.5
    length_spread: float = 0.7
    start_time: int = 1_600_000_000
    duration_s: int = 365 * 86_400
    chunk_events: int = 1 << 20
    report_users: int = 4_000
    markov_events: int = 20_000_000

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in "users clusters tastes chunk_events duration_s report_users".split():
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("seed", "markov_events"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("taste", "follow", "drift"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "within [0, 1]", getattr(self, name))
        rule = f"at least {TOP} (ranking is judged at {TOP})"
        _require(self.items >= TOP, "items", rule, self.items)
        rule = f"at most items = {self.items}"
        _require(self.clusters <= self.items, "clusters", rule, self.clusters)
        needed = 2 * self.users
        _require(self.events >= needed, "events", f"at least 2 per user = {needed}", self.events)
        total = self.taste + self.follow
        _require(total <= 1.0 + 1e-9, "taste + follow", "at most 1", total)


@dataclass(frozen=True, slots=True)
class GeneratedBlock:
    """Events of consecutive users, and the state of each user just before the last event."""

    user: Ints  # (E,)
    item: Ints  # (E,) internal index
    time: Ints  # (E,)
    last: Ints  # (U,) position of the last event
    tastes: Ints  # (U, M) clusters
    previous: Ints  # (U,) cluster of the event before the last


class World:
    """Clusters and items, shared by all users; item i has rank i // C in cluster i % C."""

    def __init__(self, config: SynthConfig) -> None:
        """Draw the popularity of clusters, their successors, and the item ids."""
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
        """A generator that depends only on the seed and ``key``."""
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self.config.seed, *key]))
        )

    def draw_cluster(self, uniform: Floats) -> Ints:
        """Clusters drawn by popularity from ``uniform`` numbers in [0, 1); the same shape."""
        found = np.searchsorted(
            self.popularity_cdf, uniform * self.popularity_cdf[-1], side="right"
        )
        clusters: Ints = np.minimum(found, self.config.clusters - 1)
        return clusters

    def draw_item(self, cluster: Ints, uniform: Floats) -> Ints:
        """Items drawn by Zipf's law inside ``cluster``; all arrays have the same shape."""
        size = self.sizes[cluster]
        found = np.searchsorted(self.zipf_cdf, uniform * self.zipf_cdf[size - 1], side="right")
        return np.minimum(found, size - 1) * self.config.clusters + cluster

    def cluster_probability(self, tastes: Ints, previous: Ints) -> Floats:
        """(U, C) float64: P(next cluster) with (U, M) tastes after (U,) previous clusters."""
        config = self.config
        noise = 1.0 - config.taste - config.follow
        probability = np.tile(noise * self.popularity, (len(previous), 1))
        users = np.arange(len(previous))
        for slot in range(config.tastes):
            np.add.at(probability, (users, tastes[:, slot]), config.taste / config.tastes)
        probability[users, self.successor[previous]] += config.follow
        return probability

    def top_items(self, cluster_probability: Floats) -> Ints:
        """(U, 10) int64: the items of highest probability, found among the heads of clusters."""
        heads = np.arange(min(TOP, len(self.zipf)))[None, :, None]
        clusters = np.arange(self.config.clusters)[None, None, :]
        inside = self.zipf[heads] / self.zipf_cdf[self.sizes - 1]
        inside = np.where(heads < self.sizes, inside, 0.0)
        score = (cluster_probability[:, None, :] * inside).reshape(len(cluster_probability), -1)
        items = (heads * self.config.clusters + clusters).reshape(-1)
        return items[top_columns(score)]


def blocks(world: World) -> Iterator[GeneratedBlock]:
    """The log in blocks of users, each drawn from a random stream of its own."""
    config = world.config
    for index, first in enumerate(range(0, config.users, world.users_per_block)):
        last = min(first + world.users_per_block, config.users)
        budget = config.events * last // config.users - config.events * first // config.users
        yield _block(world, world.generator(1, index), first, last - first, budget)


def _block(
    world: World, random: np.random.Generator, first: int, users: int, budget: int
) -> GeneratedBlock:
    """Users ``first .. first + users``, ``budget`` events in all, at least two each."""
    lengths = _lengths(random, users, budget, world.config.length_spread)
    # Longest first: the users with an event at step t are a prefix, so that a step is a slice.
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths)
    offset, counts = (ends - lengths)[order], lengths[order]
    active = np.searchsorted(-counts, -np.arange(1, counts[0] + 1), side="right")
    cluster, tastes, previous = _clusters(world, random, active, offset, budget)
    item = world.draw_item(cluster, random.random(budget))
    back = np.argsort(order, kind="stable")
    return GeneratedBlock(
        user=np.repeat(np.arange(first, first + users), lengths),
        item=item,
        time=_times(world.config, random, lengths, ends),
        last=ends - 1,
        tastes=tastes[back],
        previous=previous[back],
    )


def _clusters(
    world: World, random: np.random.Generator, active: Ints, offset: Ints, budget: int
) -> tuple[Ints, Ints, Ints]:
    """(E,) clusters of all events, and the (U, M) tastes and (U,) previous clusters at the end."""
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
    """(U,) int64 event counts: two each, the rest in log-normal proportion, exact in sum."""
    share = np.cumsum(np.exp(spread * random.standard_normal(users)))
    cuts = np.floor(share * ((budget - 2 * users) / share[-1])).astype(np.int64)
    cuts[-1] = budget - 2 * users
    lengths: Ints = 2 + np.diff(cuts, prepend=0)
    return lengths


def _times(config: SynthConfig, random: np.random.Generator, lengths: Ints, ends: Ints) -> Ints:
    """(E,) int64 seconds, ascending per user from a random first day to the end of the log."""
    users = np.repeat(np.arange(len(lengths)), lengths)
    # n + 1 exponential gaps divided by their sum give n sorted uniform times.
    total = np.cumsum(random.standard_exponential(int(ends[-1])))
    before = np.where(ends > lengths, total[ends - lengths - 1], 0.0)
    inside = total - before[users]
    whole = total[ends - 1] - before + random.standard_exponential(len(lengths))
    start = random.random(len(lengths)) * 0.9
    moment = start[users] + (1.0 - start[users]) * inside / whole[users]
    return config.start_time + np.floor(moment * config.duration_s).astype(np.int64)


def top_columns(score: Floats) -> Ints:
    """(U, 10) int64 columns of the highest scores, lower index first among equals."""
    return np.argsort(-score, axis=1, kind="stable")[:, :TOP]


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value}; choose another value")
