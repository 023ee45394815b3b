"""Is a source tree slower than another? Calls of each loss, forward and backward, in turns.

Two processes, one for each tree, are asked in alternating order, so that a slow minute of the
machine meets both. A row holds the median of the ratios of pairs, and their range.

    git worktree add ../old v0.1.0
    python benchmarks/old_and_new.py ../old/src src --pairs 9
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, Results
from torch import Tensor

NUM_POSITIONS, NUM_ITEMS, WIDTH = 8192, 100_000, 64
CASES = ("cce", "cce_minus", "cce_minus share=1", "sce", "rece")


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Each case as a function of states, table and targets."""
    from shardrec import kernels

    sampled = partial(kernels.sampled_cross_entropy, seed=1, sparse_grad=True)
    functions: tuple[Callable[..., Any], ...] = (
        kernels.cut_cross_entropy,
        partial(sampled, num_negatives=1024, share=128),
        lambda x, w, y: sampled(x[:1024], w, y[:1024], num_negatives=512, share=1),
        partial(kernels.scalable_cross_entropy, seed=1, sparse_grad=True),
        partial(kernels.reduced_cross_entropy, seed=1),
    )
    return dict(zip(CASES, functions, strict=True))


def answer(threads: int) -> None:
    """In a process of its own: the seconds of a call for each line that names a case."""
    torch.set_num_threads(threads)
    generator, cases = torch.Generator().manual_seed(0), losses()
    states = torch.randn(NUM_POSITIONS, WIDTH, generator=generator)
    table = torch.randn(NUM_ITEMS, WIDTH, generator=generator) * 0.3
    targets = torch.randint(0, NUM_ITEMS, (NUM_POSITIONS,), generator=generator)
    for line in sys.stdin:
        inputs = states.clone().requires_grad_(), table.clone().requires_grad_()
        start = time.perf_counter()
        cases[line.strip()](*inputs, targets).backward()
        print(time.perf_counter() - start, flush=True)


class Tree:
    """A process that computes with one source tree."""

    def __init__(self, source: str, threads: int) -> None:
        """Starts it."""
        environment = os.environ | {"PYTHONPATH": str(Path(source).resolve())}
        command = [sys.executable, __file__, "--answer", "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, case: str) -> float:
        """Of one call."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(case, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    """Measures each case that is not in the file of results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", metavar="SOURCE", help="the old tree, then the new one")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what the trees are")
    parser.add_argument("--output", default=str(RESULTS / "old_and_new.jsonl"))
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(options.threads)
        return
    old, new = (Tree(source, options.threads) for source in options.trees)
    results = Results(options.output)
    for case in CASES:
        key = {"case": case, "trees": options.note, "threads": options.threads}
        if results.has(key):
            continue
        old.seconds(case), new.seconds(case)  # loads the libraries
        pairs = []
        for index in range(options.pairs):
            first = (old, new) if index % 2 else (new, old)
            taken = {tree: tree.seconds(case) for tree in first}
            pairs.append((taken[old], taken[new]))
        ratios = [after / before for before, after in pairs]
        results.append(
            key,
            ratio=statistics.median(ratios),
            range=[min(ratios), max(ratios)],
            old_s=statistics.median(before for before, _ in pairs),
            new_s=statistics.median(after for _, after in pairs),
        )


if __name__ == "__main__":
    main()
