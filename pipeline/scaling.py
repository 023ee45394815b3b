"""Estimate how a step scales over nodes: one table over all ranks, or a replica on each node.

Bytes and FLOP are those of ``plan``, divided by assumed bandwidths and speed. Nothing overlaps, so
the efficiencies are pessimistic; a real network adds latency. A node takes as many batches in a
step however many nodes there are (weak scaling). States of an all-gather enter each node once, as
in the rings of NCCL, and rows of an all-to-all once for each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardrec.modules.option_checks import require_at_least
from shardrec.pipeline.plan import Plan, plan, readable_bytes
from shardrec.pipeline.run.config import ParallelConfig, TrainConfig
from shardrec.pipeline.run.machine import AttributeCounts, Machine

__all__ = ["NODES", "Cluster", "NodeStep", "describe_scaling", "scaled"]

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
LAYOUTS = ("one table", "replicas")
# Received from each rank apart, and not by all ranks alike.
OF_EACH_RANK = ("ids and vectors looked up", "gradients of vectors", "candidates")
OVER_ALL = ("encoder gradients", "attribute gradients")
OVER_REPLICAS = "row gradients of replicas"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes and the speeds that are assumed of them, for a table of 1 to 128 nodes.

    Attributes:
        node_gbps: network into a node, in 10**9 bits a second; none: no such table.
        gpu_gbps: links of a rank inside its node, in 10**9 bits a second.
        tflops: products of a rank, in 10**12 FLOP a second, as reached in training.
        node_ranks: ranks of a node.
    """

    node_gbps: float | None = None
    gpu_gbps: float = 3600.0
    tflops: float = 200.0
    node_ranks: int = 8

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least("node_ranks", self.node_ranks, 1)
        for name in ("node_gbps", "gpu_gbps", "tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}; give a speed")


@dataclass(frozen=True, slots=True)
class NodeStep:
    """A step on some nodes.

    Attributes:
        inside: bytes that a rank receives over the links of its node.
        across: bytes that enter a node from the others.
        seconds: of products, links and network, one after another.
    """

    inside: float
    across: float
    seconds: float


def scaled(
    config: TrainConfig,
    num_items: int,
    machine: Machine,
    cluster: Cluster,
    attributes: AttributeCounts | None = None,
) -> dict[str, list[NodeStep]]:
    """By layout, a step on each of ``NODES``; n nodes take n * ``optimizer.accumulate`` batches.

    Args:
        config: the config of the run on one node.
        num_items: V.
        machine: what ``plan`` takes; its ``ranks`` are not used.
        cluster: with ``node_gbps``.
        attributes: as for ``plan``.
    """
    found: dict[str, list[NodeStep]] = {name: [] for name in LAYOUTS}
    for nodes in NODES:
        accumulate = config.optimizer.accumulate * nodes
        optimizer = replace(config.optimizer, accumulate=accumulate)
        ranks = replace(machine, ranks=nodes * cluster.node_ranks)
        for name, shards in zip(LAYOUTS, (0, cluster.node_ranks), strict=True):
            laid_out = replace(config, optimizer=optimizer, parallel=ParallelConfig(shards=shards))
            planned = plan(laid_out, num_items, ranks, attributes)
            found[name].append(_step(planned, nodes, cluster, replicas=name == "replicas"))
    return found


def describe_scaling(steps: Mapping[str, list[NodeStep]], cluster: Cluster) -> str:
    """A table of bytes, seconds and efficiency: seconds on one node over those on n."""
    lines = [
        f"on paper, for nodes of {cluster.node_ranks} ranks, {cluster.tflops:g} TFLOP/s and "
        f"{cluster.gpu_gbps:g} Gb/s inside a node each, {cluster.node_gbps:g} Gb/s",
        "into a node, nothing overlapped; each node brings its own batches to a step",
    ]
    head = f"{'nodes':<8}{'to a rank':>14}{'into a node':>14}{'seconds':>12}{'efficiency':>12}"
    for layout, of_nodes in steps.items():
        lines += ["", layout, head]
        for nodes, one in zip(NODES, of_nodes, strict=True):
            moved = f"{readable_bytes(one.inside):>14}{readable_bytes(one.across):>14}"
            share = of_nodes[0].seconds / one.seconds
            lines.append(f"{nodes:<8}{moved}{one.seconds:>12.4f}{share:>12.0%}")
    return "\n".join(lines)


def _step(planned: Plan, nodes: int, cluster: Cluster, *, replicas: bool) -> NodeStep:
    inside = sum(size for name, size in planned.moved.items() if name != OVER_REPLICAS)
    across = _across(planned.moved, nodes, cluster.node_ranks, replicas=replicas)
    assert cluster.node_gbps is not None
    seconds = sum(planned.flops.values()) / (cluster.tflops * 1e12)
    seconds += inside / (cluster.gpu_gbps * 1e9 / 8) + across / (cluster.node_gbps * 1e9 / 8)
    return NodeStep(inside, across, seconds)


def _across(moved: Mapping[str, float], nodes: int, ranks: int, *, replicas: bool) -> float:
    """Bytes that enter a node of so many ranks in a step."""
    others, total = 1 - 1 / nodes, 0.0
    for name, received in moved.items():
        if not received:
            continue
        whole = received / (1 - 1 / (nodes * ranks))  # of one rank, its own part included
        if name == OVER_REPLICAS:
            total += ranks * received
        elif name in OVER_ALL:
            total += whole * others
        elif not replicas:
            total += whole * others * (ranks if name in OF_EACH_RANK else 1)
    return total
