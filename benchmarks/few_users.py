"""What does a list cost when few users ask: our search beside a plain product and ``topk``?

Random states and items of width 64, lists of ten, one thread. CPU milliseconds, the median of the
calls; the target is at most three times the plain product for 1, 8 and 64 users.

    python benchmarks/few_users.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import RESULTS, Results
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.modules.ranking import top_items


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[42_000, 1_000_000])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "few_users_cpu.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.output)
    for items in options.items:
        table = torch.randn(items, 64, generator=torch.Generator().manual_seed(1))
        for users in options.users:
            key = {"items": items, "users": users, "width": 64, "k": 10}
            if not results.has(key):
                states = torch.randn(users, 64, generator=torch.Generator().manual_seed(2))
                results.append(key, **measure(states, table, options.calls))


def measure(states: Tensor, table: Tensor, calls: int) -> dict[str, float]:
    """CPU milliseconds of both, and their ratio, after checking that both find the same items."""
    shard = RowShard(table, 0, len(table), None)
    _, ours = top_items(states, shard, 10)
    assert torch.equal(ours, (states @ table.T).topk(10).indices)
    search = cpu_ms(lambda: top_items(states, shard, 10), calls)
    product = cpu_ms(lambda: (states @ table.T).topk(10), calls)
    return {"search_ms": search, "product_ms": product, "ratio": round(search / product, 2)}


def cpu_ms(work: Callable[[], object], calls: int) -> float:
    """Median CPU time of the calls, in milliseconds."""
    times = []
    for _ in range(calls):
        started = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started))
    return round(statistics.median(times), 2)


if __name__ == "__main__":
    main()
