"""Seconds of a step on many nodes, on paper: one table over all ranks, or a replica on each node.

Nothing is measured: bytes and FLOP are those of ``shardrec plan``, divided by bandwidths and speed
that are options here. Nothing overlaps, so the efficiencies are pessimistic; a real network adds
latency. The batch of a node stays the same (weak scaling): n nodes take n batches a step, as one
step of ``optimizer.accumulate=n``. States of an all-gather enter each node once, as NCCL's rings
do it, and rows of an all-to-all once for each rank.

    python benchmarks/nodes.py
"""

import argparse
from collections.abc import Mapping

from shardrec.pipeline.config import override
from shardrec.pipeline.plan import Machine, Plan, plan
from shardrec.pipeline.recipes import recipe_named

GPUS = 8  # of a node
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (10**6, 10**7, 10**8, 10**9)
# Received from each rank apart, and not by all ranks alike.
OF_EACH_RANK = ("ids and vectors looked up", "gradients of vectors", "candidates")
OVER_ALL = ("encoder gradients", "attribute gradients")


def across(moved: Mapping[str, float], nodes: int, *, replicas: bool) -> float:
    """Bytes that enter a node in a step."""
    ranks, others = nodes * GPUS, 1 - 1 / nodes
    total = 0.0
    for name, received in moved.items():
        whole = received / (1 - 1 / ranks)  # of one rank, its own part included
        if name == "row gradients of replicas":
            total += GPUS * received
        elif name in OVER_ALL:
            total += whole * others
        elif not replicas:
            total += whole * others * (GPUS if name in OF_EACH_RANK else 1)
    return total


def inside(moved: Mapping[str, float]) -> float:
    """Bytes that a rank receives, over the links of its node."""
    return sum(value for name, value in moved.items() if name != "row gradients of replicas")


def seconds(planned: Plan, nodes: int, options: argparse.Namespace, *, replicas: bool) -> float:
    """Of a step: products, links inside the node, network."""
    products = sum(planned.flops.values()) / (options.tflops * 1e12)
    links = inside(planned.moved) / (options.gpu_gbps * 1e9 / 8)
    network = across(planned.moved, nodes, replicas=replicas) / (options.node_gbps * 1e9 / 8)
    return float(products + links + network)


def efficiencies(loss: str, size: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """By layout, seconds of one node over those of each number of nodes."""
    config = override(
        recipe_named("large_catalog")("none", "none"),
        [
            f"loss={loss}",
            f"encoder.width={options.width}",
            f"batches.batch_size={options.sequences}",
            f"encoder.max_length={options.length}",
        ],
    )
    found: dict[str, list[float]] = {"one table": [], "replicas": []}
    for nodes in NODES:
        for name, shards in (("one table", 0), ("replicas", GPUS)):
            asked = [f"optimizer.accumulate={nodes}", f"parallel.shards={shards}"]
            machine = Machine(ranks=nodes * GPUS, device="cuda")
            planned = plan(override(config, asked), size, machine)
            found[name].append(seconds(planned, nodes, options, replicas=name == "replicas"))
    return found


def main() -> None:
    """Print a table of seconds and efficiency, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "sce", "rece"])
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--sequences", type=int, default=2048, help="of the batch of a node")
    parser.add_argument("--length", type=int, default=128, help="positions of a sequence")
    parser.add_argument("--tflops", type=float, default=200.0, help="of a GPU, reached")
    parser.add_argument("--gpu-gbps", type=float, default=3600.0, help="inside a node, a GPU")
    parser.add_argument("--node-gbps", type=float, default=400.0, help="into a node")
    options = parser.parse_args()
    print("| loss | V | layout | 1 node, s | " + " | ".join(f"{n}" for n in NODES[1:]) + " |")
    print("|---|--:|---|--:|" + "--:|" * (len(NODES) - 1))
    for loss in options.losses:
        for size in SIZES:
            for name, taken in efficiencies(loss, size, options).items():
                shares = " | ".join(f"{taken[0] / one:.0%}" for one in taken[1:])
                print(f"| {loss} | {size:,} | {name} | {taken[0]:.3f} | {shares} |")


if __name__ == "__main__":
    main()
