"""Time and peak memory of each loss alone, forward and backward, on a CPU.

For each loss: a check against its definition in float64, then medians of our function and of the
baselines in one process, then peak memory of each in a process of its own, apart from the table's
gradient. A chunked baseline has the block size that a search finds best. Where memory is measured,
the allocator gives blocks of 64 KiB or more back as they are freed, for all alike, so that what it
would keep does not count. No figure is written for an operation that fails its check. A baseline
that would not fit in memory, by a count of what it stores, is left out and the row says so.

    python benchmarks/losses.py --threads 2
    python benchmarks/losses.py --losses cce sce --catalog 100000 --positions 512 --repeats 1
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import baselines
from loss_checks import check, make_batch, mean_sce
from record import (
    RESULTS,
    Results,
    call_fresh,
    median,
    peak_rss_since_reset,
    reset_peak_rss,
    rss_bytes,
    timed,
)

from shardrec import kernels
from shardrec.kernels.buckets import default_num_buckets as num_sce_buckets
from shardrec.kernels.cce import cut_cross_entropy_cost
from shardrec.kernels.cce_minus import sampled_cross_entropy_cost
from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.ranks.traffic import Workload
from shardrec.kernels.rece import default_num_buckets, reduced_cross_entropy_cost
from shardrec.kernels.sce import scalable_cross_entropy_cost

Operation = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Takes states, table and targets; gives the mean loss, or does its own backward."""

NUM_NEGATIVES, SHARE, ITEMS_PER_BUCKET, ROUNDS, REACH, SEED = 1024, 128, 256, 4, 1, 7
LOSSES = ("cce", "cce_minus", "sce", "rece")
# Positions, buckets or chunks at a time where the search for the best begins.
FIRST_BLOCK = {"cce": 64, "cce_minus": 512, "sce": 64, "rece": 64}
# Left to itself glibc keeps freed blocks, and how many varies from run to run.
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def ours(loss: str, sparse_grad: bool = False, rounds: int = ROUNDS) -> Operation:
    """Our function with the options of the table."""
    sparse: dict[str, Any] = {"sparse_grad": True} if sparse_grad else {}
    by_name: dict[str, Operation] = {
        "cce": kernels.cut_cross_entropy,
        "cce_minus": partial(
            kernels.sampled_cross_entropy,
            num_negatives=NUM_NEGATIVES,
            share=SHARE,
            seed=SEED,
            **sparse,
        ),
        "sce": partial(mean_sce, items_per_bucket=ITEMS_PER_BUCKET, seed=SEED, **sparse),
        "rece": partial(
            kernels.reduced_cross_entropy,
            num_rounds=rounds,
            num_neighbor_chunks=REACH,
            seed=SEED,
        ),
    }
    return by_name[loss]


def baseline(
    loss: str,
    block: int | None,
    rounds: int = ROUNDS,
    loop: Callable[..., Tensor | None] | None = None,
) -> Operation:
    """Everything in memory, or ``block`` positions, buckets or chunks at a time.

    ``loop`` replaces the chunked baseline.
    """
    loop = loop or getattr(baselines, f"chunked_{loss}")

    def run(states: Tensor, table: Tensor, targets: Tensor) -> Tensor | None:
        N, V = len(states), len(table)
        chosen: tuple[Any, ...] = ()
        if loss == "cce_minus":
            chosen = (torch.randint(V, (N, NUM_NEGATIVES), device=states.device),)
        elif loss == "sce":
            n_b = num_sce_buckets(N)
            mix = torch.randn(n_b, N, dtype=states.dtype, device=states.device)
            chosen = (mix @ states.detach(), min(n_b, N), ITEMS_PER_BUCKET)
        elif loss == "rece":
            n_b = default_num_buckets(N, V, REACH)
            sizes = (rounds, n_b, states.shape[1])
            chosen = (torch.randn(sizes, dtype=states.dtype, device=states.device), REACH)
        if block is None:
            eager: Callable[..., Tensor] = getattr(baselines, f"eager_{loss}")
            return eager(states, table, targets, *chosen)
        return loop(states, table, targets, *chosen, block)

    return run


def fair(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """CE- as one matrix product, its negatives shared by the batch."""
    negatives = torch.randint(len(table), (NUM_NEGATIVES,), device=states.device)
    return baselines.fair_cce_minus(states, table, targets, negatives)


def operation(loss: str, name: str) -> Operation:
    """The operation of a name: ours, ours_sparse, eager, chunked_BLOCK, torch or fair."""
    if name in ("fair", "torch"):
        return fair if name == "fair" else baselines.torch_cce
    if name.startswith("ours"):
        return ours(loss, sparse_grad=name == "ours_sparse")
    return baseline(loss, int(name.removeprefix("chunked_")) if name != "eager" else None)


def num_lines(loss: str, work: Workload) -> int:
    """Positions, buckets or chunks of the loop of the chunked baseline."""
    N = work.num_positions
    n_c = default_num_buckets(N, work.num_items, REACH)
    return {"cce": N, "cce_minus": N, "sce": num_sce_buckets(N), "rece": n_c}[loss]


def stored_gib(loss: str, name: str, work: Workload, rounds: int = ROUNDS) -> float:
    """GiB that a baseline stores: logits and what backward keeps of them, counted, not measured.

    ``chunked`` without a number is the loop at its leanest, as is ``torch``, which chooses itself.
    """
    N, V, D, size = work.num_positions, work.num_items, work.width, work.element_bytes
    lines = num_lines(loss, work)
    met = N * V * (1 + 2 * REACH) // lines
    whole = {
        "cce": 3 * size * N * V,  # logits, log-softmax, gradient
        "cce_minus": 3 * size * N * NUM_NEGATIVES * D,  # rows, products, gradient
        "sce": size * lines * (N + V) + 6 * size * lines * lines * ITEMS_PER_BUCKET,
        "rece": (rounds if name == "eager" else 1) * met * (3 * size + 4 * 8),
    }
    held = 2 * size * V * D  # gradient of the table, and the one that is added to it
    if name == "fair":
        return (6 * size * N * NUM_NEGATIVES + held) / 2**30
    held += size * lines * V if loss == "rece" else 0  # hashes, of the loop too
    block = {"eager": lines, "chunked": 1, "torch": 1}.get(name) or int(
        name.removeprefix("chunked_")
    )
    return (whole[loss] * block / lines + held) / 2**30


def largest_block(loss: str, work: Workload, memory_gib: float, rounds: int = ROUNDS) -> int:
    """The largest block size with which the loop stores at most ``memory_gib``; 0 if none fits."""
    one, two = (stored_gib(loss, f"chunked_{block}", work, rounds) for block in (1, 2))
    fit = int((memory_gib - (2 * one - two)) // (two - one))
    return min(max(fit, 0), num_lines(loss, work))


def search_block(first: int, most: int, seconds: Callable[[int], float]) -> dict[int, float]:
    """Seconds by block size, doubled or halved until the best lies between two others.

    A block of 1 and one of ``most`` have only one neighbour.
    """
    times: dict[int, float] = {}
    block = min(first, most)
    while True:
        for size in (block, max(1, block // 2), min(2 * block, most)):
            if size not in times:
                times[size] = seconds(size)
        best = min(times, key=lambda size: times[size])
        if best == block:
            return times
        block = best


def counted(loss: str, work: Workload, rounds: int = ROUNDS) -> LossCost:
    """The cost of our function as ``plan`` counts it."""
    return {
        "cce": lambda: cut_cross_entropy_cost(work),
        "cce_minus": lambda: sampled_cross_entropy_cost(work, NUM_NEGATIVES, SHARE),
        "sce": lambda: scalable_cross_entropy_cost(work, None, None, ITEMS_PER_BUCKET),
        "rece": lambda: reduced_cross_entropy_cost(work, None, None, rounds, REACH),
    }[loss]()


def step(function: Operation, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward; keeps the gradients."""
    loss = function(*batch)
    if loss is not None:
        loss.backward()


def gemm_gflops(N: int, D: int) -> float:
    """GFLOP/s of the three products of a tile of the softmax: the best of calls and tiles."""
    return max(_tile_gflops(N, D, width) for width in (1024, 8192))


def _tile_gflops(N: int, D: int, width: int) -> float:
    states, rows, logits = torch.randn(N, D), torch.randn(width, D), torch.empty(N, width)
    grad_states, grad_rows = torch.empty(N, D), torch.empty(width, D)

    def products() -> None:
        torch.mm(states, rows.T, out=logits)
        torch.mm(logits, rows, out=grad_states)
        torch.mm(logits.T, states, out=grad_rows)

    products()
    return 6 * N * D * width / min(timed(products) for _ in range(7)) / 1e9


def time_job(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and CPU seconds of operations, run in turn so that noise affects all."""
    batch = make_batch(job["positions"], job["width"], job["catalog"])
    functions = {name: operation(job["loss"], name) for name in job["operations"]}
    times: dict[str, list[float]] = {name: [] for name in functions}
    of_cpu: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(job["repeats"] + 1):
        for name, function in functions.items():
            # Giving 256 MB back to the system would count for whoever comes next.
            batch[0].grad = batch[1].grad = None
            used = process_time()
            seconds = timed(partial(step, function, batch))
            times[name] += [seconds] * (repeat > 0)  # the first one warms up
            of_cpu[name] += [round(process_time() - used, 4)] * (repeat > 0)
    gflops = gemm_gflops(job["positions"], job["width"])
    return {"times_s": times, "cpu_s": of_cpu, "gemm_gflops": gflops}


def search_job(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the chunked baseline by block size; each the quicker of two runs."""
    batch = make_batch(job["positions"], job["width"], job["catalog"])

    def seconds(block: int) -> float:
        run = baseline(job["loss"], block)
        found = []
        for _ in range(2):
            batch[0].grad = batch[1].grad = None
            found.append(timed(lambda: step(run, batch)))
        return round(min(found), 4)

    return {"times_s": search_block(FIRST_BLOCK[job["loss"]], job["most"], seconds)}


def memory_job(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one step in addition to its inputs and the table's gradient."""
    function = operation(job["loss"], job["operation"])
    step(function, make_batch(1024, job["width"], 4096))
    batch = make_batch(job["positions"], job["width"], job["catalog"])
    gc.collect()
    before = rss_bytes()
    reset_peak_rss()
    step(function, batch)
    grad = batch[1].grad
    assert grad is not None
    parts = (grad._indices(), grad._values()) if grad.is_sparse else (grad,)
    gradient = sum(part.nbytes for part in parts)
    return {"peak_bytes": max(0, peak_rss_since_reset() - before - gradient)}


def measure(loss: str, catalog: int, options: argparse.Namespace, results: Results) -> None:
    """Appends the missing row of one loss and catalog size."""
    key = {
        "loss": loss,
        "positions": options.positions,
        "width": options.width,
        "catalog": catalog,
        "threads": options.threads,
    }
    if results.has(key):
        return
    check(loss)
    work = Workload(
        num_positions=options.positions, num_items=catalog, num_ranks=1, width=options.width
    )
    job = key | {"repeats": options.repeats}
    names = ["ours"] + ["ours_sparse"] * (loss in ("cce_minus", "sce"))
    run, not_run = baselines_to_run(loss, work, options)
    searched: dict[str, float] = {}
    if "chunked" in run:
        most = largest_block(loss, work, options.memory_gib)
        searched = call_fresh(__file__, job | {"kind": "search", "most": most})["times_s"]
        run[run.index("chunked")] = "chunked_" + min(searched, key=lambda block: searched[block])
    names += run
    answer = call_fresh(__file__, job | {"kind": "time", "operations": names})
    row: dict[str, Any] = answer | {"gemm_gflops": round(answer["gemm_gflops"], 1)}
    row |= {"searched_s": searched, "peak_mib": {}}
    row["median_s"] = {name: median(times) for name, times in answer["times_s"].items()}
    for name in names:
        memory = job | {"kind": "memory", "operation": name}
        peak = call_fresh(__file__, memory, environment=RETURN_AT_ONCE)["peak_bytes"]
        row["peak_mib"][name] = round(peak / 2**20, 2)
    cost = counted(loss, work)
    rate = cost.flops / row["median_s"]["ours"] / 1e9
    row["share_of_gemm"] = round(rate / row["gemm_gflops"], 3)
    row["counted"] = {"gflop": round(cost.flops / 1e9, 2), "mib": cost.workspace_bytes >> 20}
    row |= {"not_run": not_run} if not_run else {}
    results.append(key, **row, ratios=ratios(row))


def baselines_to_run(
    loss: str, work: Workload, options: argparse.Namespace
) -> tuple[list[str], dict[str, str]]:
    """Baselines, and why others are left out."""
    run, not_run = [], {}
    more = ["fair"] * (loss == "cce_minus")
    more += ["torch"] * (loss == "cce" and hasattr(F, "linear_cross_entropy"))
    for name in ["chunked", "eager", *more]:
        needed = stored_gib(loss, name, work)
        if needed > options.memory_gib:
            not_run[name] = f"stores {needed:.1f} GiB"
        elif work.num_items > options.largest_baseline:
            not_run[name] = f"takes too long above V={options.largest_baseline:,}"
        else:
            run.append(name)
    return run, not_run


def ratios(row: dict[str, Any]) -> dict[str, Any]:
    """Ours over each baseline: time and memory."""
    found = {}
    for mine in (name for name in row["median_s"] if name.startswith("ours")):
        for other in (name for name in row["median_s"] if not name.startswith("ours")):
            found[f"{mine}/{other}"] = {
                part: round(row[part][mine] / max(row[part][other], 1e-6), 4)
                for part in ("median_s", "peak_mib")
            }
    return found


def summary(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| loss | V | ours s | ours MiB | against | time | memory |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in results.rows:
        key = row["key"]
        for mine in (name for name in row["median_s"] if name.startswith("ours")):
            head = f"| {key['loss']}{mine[4:]} | {key['catalog']:,} "
            head += f"| {row['median_s'][mine]:.3f} | {row['peak_mib'][mine]:.1f} "
            start = len(lines)
            pairs = {
                k.split("/")[1]: v for k, v in row["ratios"].items() if k.startswith(mine + "/")
            }
            for other, ratio in pairs.items():
                lines.append(
                    f"{head}| {other} | {ratio['median_s']:.3f} | {ratio['peak_mib']:.4f} |"
                )
            tenth = results.find(key | {"catalog": key["catalog"] // 10})
            if tenth is not None and mine in tenth["median_s"]:
                time, memory = (
                    row[part][mine] / max(tenth[part][mine], 1e-6)
                    for part in ("median_s", "peak_mib")
                )
                lines.append(f"{head}| ours at V/10 | {time:.3f} | {memory:.4f} |")
            if len(lines) == start:
                lines.append(f"{head}| - | - | - |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--catalog", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest-baseline", type=int, default=100_000, help="V of the baselines")
    parser.add_argument("--memory-gib", type=float, default=8.0, help="that a baseline may store")
    parser.add_argument("--output", default=str(RESULTS / "losses_cpu.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(options.job["threads"])
        jobs = {"time": time_job, "search": search_job, "memory": memory_job}
        print(json.dumps(jobs[options.job["kind"]](options.job)))
        return
    results = Results(options.output)
    for catalog in options.catalog:
        for loss in options.losses:
            measure(loss, catalog, options, results)
    print(summary(results))


if __name__ == "__main__":
    main()
