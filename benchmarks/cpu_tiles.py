"""Sweep the tile sizes of the CPU path of ``shardrec.kernels``.

For each shape and number of threads all candidates run in turn in one process, so that changes in
the machine's speed affect all of them; a row holds every repetition of every candidate.
``two_pass`` and ``fused`` are the full softmax, forward and backward; ``listed`` are blocks of 128
positions and 1024 draws.

    python benchmarks/cpu_tiles.py --threads 1 2        # some minutes
    python benchmarks/cpu_tiles.py --paths fused --threads 2 --repeats 1 --output smoke.jsonl
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from loss_checks import make_batch
from record import RESULTS, Results, call_fresh, timed

from shardrec.kernels.block_logsumexp import Blocks, EveryPair, cpu
from shardrec.kernels.block_logsumexp.cpu_tiles import (
    LEAST_FUSED,
    CpuTiles,
    cpu_tiles,
    fused_positions,
)
from shardrec.kernels.loss.fused import fused_cross_entropy
from shardrec.kernels.loss.inputs import Scaling, prepare_inputs

# N, V, D: of each path a middle one, and others that differ from it in one of the three.
SHAPES = {
    "two_pass": [
        (1024, 50_000, 64),
        (256, 50_000, 64),
        (4096, 50_000, 64),
        (1024, 200_000, 64),
        (1024, 50_000, 16),
        (1024, 50_000, 256),
    ],
    "fused": [
        (1024, 10_000, 64),
        (256, 10_000, 64),
        (4096, 10_000, 64),
        (1024, 3_000, 64),
        (1024, 30_000, 64),
        (1024, 100_000, 64),
        (1024, 10_000, 256),
    ],
    "listed": [
        (4096, 100_000, 64),
        (1024, 100_000, 64),
        (4096, 10_000, 64),
        (4096, 100_000, 256),
    ],
}
TILE_LOGITS = [1 << power for power in (18, 19, 20, 21)]
TILE_POSITIONS = (256, 1024, 4096)
GROUPS = (16, 32, 64, 128, 256, 512)
LISTED = [(1 << logits, 1 << floats) for logits in (18, 19, 20) for floats in (17, 18, 19, 20)]
PATHS = tuple(SHAPES)

Run = Callable[[], object]


def two_pass(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Run]:
    """The full softmax in two passes, by the shape of its tiles."""
    states, table, targets = (part.detach() for part in batch)
    blocks = EveryPair(len(table), targets)
    grad = torch.full((len(states),), 1 / len(states))
    grad_rows = torch.zeros_like(table)

    def run(tiles: CpuTiles) -> None:
        logsumexp, _ = cpu.forward(states, table, blocks, tiles)
        cpu.backward(states, table, blocks, logsumexp, grad, -grad, grad_rows, tiles)

    shapes = [(p, q // p) for q in TILE_LOGITS for p in TILE_POSITIONS if p <= len(states)]
    made = {
        f"{p}x{q}": lambda p=p, q=q: run(CpuTiles(logits=p * q, positions=p))
        for p, q in shapes
        if q >= 64
    }
    return made | {"rule": lambda: run(cpu_tiles())}


def fused(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Run]:
    """The full softmax with its gradient in forward, by the number of positions per chunk."""
    states, table, targets = (part.detach() for part in batch)
    problem = prepare_inputs(
        states, table, targets, weights=None, reduction="mean", scaling=Scaling(False, 1.0)
    )
    coefficients = problem.coefficients("mean")
    groups = [g for g in GROUPS if g <= len(states) and g * len(table) <= 1 << 24]
    made: dict[str, Run] = {
        str(group): partial(fused_cross_entropy, problem, coefficients, group) for group in groups
    }
    made["two passes"] = two_pass(batch)["rule"]
    rule = fused_positions(len(table))
    made["rule"] = (
        made["two passes"]
        if rule < LEAST_FUSED
        else made.get(str(rule)) or (lambda: fused_cross_entropy(problem, coefficients, rule))
    )
    return made


def listed(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Run]:
    """Blocks of positions that share draws, by the number of logits and rows per batch."""
    states, table, targets = (part.detach() for part in batch)
    num_positions, num_draws, share = len(states), 1024, 128
    num_blocks = num_positions // share
    items = torch.randint(len(table), (num_blocks, num_draws)).sort(dim=1).values
    starts = torch.arange(num_blocks) * num_draws
    blocks = Blocks(
        pair_positions=None,
        pair_starts=torch.arange(num_blocks + 1) * share,
        items=items.flatten(),
        item_starts=starts,
        item_ends=starts + num_draws,
        targets=targets,
        num_slots=num_positions,
    )
    grad, grad_rows = torch.full((num_positions,), 1 / num_positions), torch.zeros_like(table)

    def run(tiles: CpuTiles) -> None:
        logsumexp, _ = cpu.forward(states, table, blocks, tiles)
        cpu.backward(states, table, blocks, logsumexp, grad, -grad, grad_rows, tiles)

    made = {
        f"{logits}/{floats}": lambda a=logits, b=floats: run(
            CpuTiles(logits=a, floats=b, wide_rows=1)
        )
        for logits, floats in LISTED
    }
    return made | {"rule": lambda: run(cpu_tiles())}


def time_job(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each candidate, in turn."""
    runs = {"two_pass": two_pass, "fused": fused, "listed": listed}[job["path"]](
        make_batch(job["positions"], job["width"], job["catalog"])
    )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(job["repeats"] + 1):
        for name, run in runs.items():
            seconds = timed(run)
            if repeat:  # the first is for the libraries and the allocator
                times[name].append(round(seconds, 5))
    return {"times_s": times}


def main() -> None:
    """Run the missing measurements and print each candidate's time relative to the best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", default=str(RESULTS / "cpu_tiles.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(options.job["threads"])
        print(json.dumps(time_job(options.job)))
        return
    results = Results(options.output)
    for path in options.paths:
        for positions, catalog, width in SHAPES[path]:
            for threads in options.threads:
                key = {"path": path, "positions": positions, "catalog": catalog, "width": width}
                key |= {"threads": threads}
                if results.has(key):
                    continue
                answer = call_fresh(__file__, key | {"repeats": options.repeats})
                quickest = {name: min(times) for name, times in answer["times_s"].items()}
                best = min(quickest.values())
                over = {name: round(value / best, 3) for name, value in quickest.items()}
                results.append(key, times_s=answer["times_s"], best_s=best, over_best=over)


if __name__ == "__main__":
    main()
