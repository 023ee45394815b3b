"""Efficiency of many nodes, on paper: one table over all ranks, or a replica on each node.

Nothing is measured: the seconds are those of ``shardrec plan --node-gbps``, for several losses and
catalogs. The batch of a node stays the same: n nodes take n batches a step.

    python benchmarks/nodes.py
"""

import argparse

from shardrec.pipeline.config import override
from shardrec.pipeline.recipes import recipe_named
from shardrec.pipeline.run.machine import Machine
from shardrec.pipeline.scaling import NODES, Cluster, scaled

SIZES = (10**6, 10**7, 10**8, 10**9)


def seconds(loss: str, size: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """By layout, seconds of a step on each number of nodes."""
    config = override(
        recipe_named("large_catalog")("none", "none"),
        [
            f"loss={loss}",
            f"encoder.width={options.width}",
            f"batches.batch_size={options.sequences}",
            f"encoder.max_length={options.length}",
        ],
    )
    speeds = {name: getattr(options, name) for name in ("node_gbps", "gpu_gbps", "tflops")}
    steps = scaled(config, size, Machine(device="cuda"), Cluster(**speeds))
    return {layout: [one.seconds for one in found] for layout, found in steps.items()}


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
            for name, taken in seconds(loss, size, options).items():
                shares = " | ".join(f"{taken[0] / one:.0%}" for one in taken[1:])
                print(f"| {loss} | {size:,} | {name} | {taken[0]:.3f} | {shares} |")


if __name__ == "__main__":
    main()
