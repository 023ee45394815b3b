"""How often the choices of sce and rece differ between one rank and several.

Random batches with many copies of each vector, scattered over the shards, so that most lists end
among copies. A batch is chosen from as 1, 2, 3 and 4 ranks would, in one process: positions and
rows are cut unevenly, every part is searched by itself, and lists are merged. Counted are lists of
sce that hold other positions or items than with one rank, and vectors with another hash (rece).

- exact: copies are equal, and all numbers of ranks have the same vectors and centres. Hashed are
  vectors with which many directions are equally good.
- near: every number of ranks has vectors of its own, which differ by a relative 1e-7, as encoders
  give them, and centres that are sums over its ranks.

Libraries of matrix products add in an order that depends on the shape, each in its way. So that the
count does not depend on the processor, products add in an order drawn for each shape and row.

    python benchmarks/near_ties.py --batches 10000
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results

from shardrec.kernels.select import best_direction, cpu, merge_topk, topk_rows

KINDS = ("exact", "near")
NUM_BUCKETS, POSITIONS_PER_BUCKET, ITEMS_PER_BUCKET, NUM_DIRECTIONS = 16, 20, 30, 64
COPIES, NOISE = 6, 1e-7
# How 1, 2, 3 and 4 ranks share eight equal parts: unevenly, and some have none.
SPLITS: list[list[tuple[int, ...]]] = [
    [(8,)],
    [(5, 3), (1, 7), (8, 0)],
    [(3, 1, 4), (4, 0, 4), (1, 1, 6)],
    [(2, 3, 1, 2), (1, 0, 5, 2)],
]


def count_flips(kind: str, steps: Iterable[int]) -> Counter[str]:
    """Count the choices that differ between one rank and two, three or four, and all choices.

    Args:
        kind: one of ``KINDS``.
        steps: numbers of the batches.
    """
    counts = Counter[str]()
    with mock.patch.object(cpu, "times_transposed", times_transposed_in_some_order):
        for step in steps:
            alone, *found = choices(kind, step)
            flips = Counter[str]()
            for several in found:
                for name, lists in several.items():
                    flips[name] += int((lists != alone[name]).any(1).sum())
                    counts[f"{name} compared"] += len(lists)
            counts.update(flips, batches=any(flips.values()))
    return counts


def choices(kind: str, step: int) -> list[dict[str, Tensor]]:
    """Lists of sce, as (n_b, n) bool, and hashes of rece, as (n, 1), of a batch on 1 to 4 ranks."""
    generator = torch.Generator().manual_seed(step)
    width = (8, 16, 48, 64, 100)[step % 5]
    states, rows = (copied(size + step % 17, width, generator) for size in (120, 250))
    mix, directions = (
        torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
        for shape in ((len(states), NUM_BUCKETS), (NUM_DIRECTIONS, width))
    )
    centres, found = mix.T @ states, []
    for split in (splits[step % len(splits)] for splits in SPLITS):
        hashed = of_two_sizes(states)
        if kind == "near":
            states, rows = (moved(vectors, generator) for vectors in (states, rows))
            shares = zip(cut(mix, split), cut(states, split), strict=True)
            centres, hashed = torch.stack([a.T @ b for a, b in shares]).sum(0), states
        hashes = [best_direction(directions, part) for part in cut(hashed, split)]
        found.append(
            {
                "positions": listed(centres, states, POSITIONS_PER_BUCKET, split),
                "items": listed(centres, rows, ITEMS_PER_BUCKET, split),
                "hashes": torch.cat(hashes)[:, None],
            }
        )
    return found


def times_transposed_in_some_order(left: Tensor, right: Tensor) -> Tensor:
    """(n, m) ``left @ right.T``, summed in one of three orders per row, which depend on n."""
    result = left.new_empty(len(left), len(right))
    for first in range(3):
        generator = torch.Generator().manual_seed(3 * len(left) + first)
        order = torch.randperm(left.shape[1], generator=generator)
        result[first::3] = left[first::3, order] @ right[:, order].T
    return result


def copied(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width) random vectors, about ``COPIES`` copies of each, in random order."""
    of = torch.randint(0, count // COPIES, (count,), generator=generator)
    return torch.randn(count // COPIES, width, generator=generator)[of]


def of_two_sizes(vectors: Tensor) -> Tensor:
    """Vectors for which many random directions are equally good; the same shape."""
    sizes = vectors.abs()[:, :2]
    return torch.where(vectors.abs() > 0.7, sizes[:, :1], sizes[:, 1:]) * vectors.sign()


def moved(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """The vectors with a relative error of about 1e-7 on each number."""
    return vectors * (1 + NOISE * torch.randn(vectors.shape, generator=generator))


def cut(vectors: Tensor, split: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The part of the vectors that each rank holds."""
    ends = [len(vectors) * sum(split[: rank + 1]) // 8 for rank in range(len(split) - 1)]
    return vectors.tensor_split(ends)


def listed(centres: Tensor, vectors: Tensor, k: int, split: tuple[int, ...]) -> Tensor:
    """(n_b, n) bool, which vectors are in the list of each centre."""
    lists, first = [], 0
    for part in cut(vectors, split):
        scores, rows = topk_rows(centres, part, k)
        missing = k - scores.shape[1]
        rows = F.pad(rows + first, (0, missing), value=torch.iinfo(torch.int64).max)
        lists.append((F.pad(scores, (0, missing), value=-torch.inf), rows))
        first += len(part)
    scores, rows = (torch.cat(parts, dim=1) for parts in zip(*lists, strict=True))
    best = merge_topk(scores, rows, k)[1]
    return torch.zeros(len(centres), len(vectors)).scatter_(1, best, 1.0).bool()


def main() -> None:
    """Append a row for each kind that is missing in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--note", default="", help="which code was measured")
    parser.add_argument("--output", type=Path, default=RESULTS / "near_ties.jsonl")
    options = parser.parse_args()
    results = Results(options.output)
    for kind in options.kinds:
        key = {"kind": kind, "batches": options.batches, "note": options.note}
        if results.has(key):
            continue
        shares = [
            range(first, options.batches, options.processes) for first in range(options.processes)
        ]
        differ = Counter[str]()
        with ProcessPoolExecutor(options.processes) as pool:
            for counts in pool.map(partial(count_flips, kind), shares):
                differ.update(counts)
        results.append(key, differ=dict(differ))


if __name__ == "__main__":
    main()
