"""Time and peak memory of each loss alone, forward and backward, on a GPU.

For each loss: a check of the Triton kernels against the definition in float64, then medians of
ours and of whatever else fits the memory, peak memory in addition to the inputs and the table's
gradient, and whether twenty runs of ours give the same bits. Loops have the block size that a
search finds best, as written and compiled. ``limit_ms`` is what gpu_limits.py counts, at the rates
of ``--tflops`` and ``--tbps``; ``limit_as_measured_ms`` at those of a matrix product and a copy in
the same run. Kernels of other projects (cut-cross-entropy, liger-kernel) take part if installed.

    python benchmarks/losses_gpu.py --catalog 100000 1000000 10000000
    python benchmarks/losses_gpu.py --dtype float32 --width 64
    TRITON_INTERPRET=1 python benchmarks/losses_gpu.py --toy        # the checks, without a GPU
"""

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import baselines
from gpu_limits import H200, Options, Rates, limit_ms
from loss_checks import check_triton
from losses import (
    ITEMS_PER_BUCKET,
    LOSSES,
    NUM_NEGATIVES,
    REACH,
    SHARE,
    Operation,
    baseline,
    fair,
    largest_block,
    ours,
    search_block,
    stored_gib,
)
from record import RESULTS, Results

from shardrec import kernels
from shardrec.kernels.ranks.traffic import Workload

ROUNDS = 8
# Positions, buckets or chunks at a time where the search for the best begins.
FIRST_BLOCK = {"cce": 2048, "cce_minus": 1024, "sce": 64, "rece": 64}
RUNS_OF_SAME_BITS = 20
MOST_SECONDS = 20  # for all repeats of one contestant

Batch = tuple[Tensor, Tensor, Tensor]
CALLED_WITH = Options(
    num_negatives=NUM_NEGATIVES,
    share=SHARE,
    items_per_bucket=ITEMS_PER_BUCKET,
    rounds=ROUNDS,
    reach=REACH,
)


def ours_variants(loss: str) -> dict[str, Operation]:
    """Our functions of a loss."""
    found: dict[str, Operation] = {"ours": ours(loss, rounds=ROUNDS)}
    if loss in ("cce_minus", "sce"):
        found["ours_sparse"] = ours(loss, sparse_grad=True)
    if loss == "cce_minus":
        found["ours_share_1"] = partial(
            kernels.sampled_cross_entropy, num_negatives=NUM_NEGATIVES, share=1, seed=7
        )
    return found


def others(loss: str, work: Workload, memory_gib: float) -> dict[str, Operation]:
    """The contestants that need no search of a block size and fit the memory."""
    found: dict[str, Operation] = {"eager": baseline(loss, None, ROUNDS)}
    found |= {"fair": fair} if loss == "cce_minus" else {}
    found = {
        name: run
        for name, run in found.items()
        if stored_gib(loss, name, work, ROUNDS) <= memory_gib
    }
    return found | (of_other_projects() if loss == "cce" else {})


def chunked(
    loss: str, work: Workload, batch: Batch, memory_gib: float
) -> tuple[dict[str, Operation], dict[int, float]]:
    """The loop at its best block size, as written and compiled, and the seconds of the search."""
    most = largest_block(loss, work, memory_gib, ROUNDS)
    if not most:
        return {}, {}

    def seconds(block: int) -> float:
        run = partial(step, baseline(loss, block, ROUNDS), batch)
        try:
            return min(time_ms(run, 1)) / 1e3
        except torch.OutOfMemoryError:
            return math.inf

    found = search_block(FIRST_BLOCK[loss], most, seconds)
    searched = {block: time for block, time in found.items() if time < math.inf}
    if not searched:
        return {}, {}
    block = min(searched, key=lambda size: searched[size])
    loops = {
        f"chunked_{block}": baseline(loss, block, ROUNDS),
        f"compiled_{block}": baseline(loss, block, ROUNDS, compiled_loop(loss)),
    }
    return loops, searched


def compiled_loop(loss: str) -> Callable[..., Tensor | None]:
    """The chunked baseline compiled: its body where backward is inside the loop."""
    loop = getattr(baselines, f"chunked_{loss}")
    if loss in ("cce", "cce_minus"):
        return partial(loop, body=torch.compile(getattr(baselines, f"eager_{loss}")))
    compiled: Callable[..., Tensor] = torch.compile(loop)
    return compiled


def of_other_projects() -> dict[str, Operation]:
    """The full softmax of PyTorch and of other projects, as far as they are installed."""
    found: dict[str, Operation] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # from torch 2.13 on
        options = torch.nn.LinearCrossEntropyOptions()
        linear: Any = torch.nn.functional
        found["torch-chunked"] = partial(linear.linear_cross_entropy, options=options)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = partial(linear_cross_entropy, filter_eps=None)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = lambda states, table, targets: liger(table, states, targets)
    return found


def step(run: Operation, batch: Batch) -> None:
    """Forward and backward; keeps the gradients."""
    batch[0].grad = batch[1].grad = None
    loss = run(*batch)
    if loss is not None:
        loss.backward()


def time_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds by events of the device, after two runs that warm up."""
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        if len(times) > 2 and sum(times) > MOST_SECONDS * 1e3:
            break
    return times[2:]


def peak_mib(run: Operation, batch: Batch) -> float:
    """Peak memory of a step in addition to its inputs and the table's gradient."""
    batch[0].grad = batch[1].grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(run, batch)
    grad = batch[1].grad
    assert grad is not None
    parts = (grad._indices(), grad._values()) if grad.is_sparse else (grad,)
    gradient = sum(part.nbytes for part in parts)
    return (torch.cuda.max_memory_allocated() - before - gradient) / 2**20


def same_bits(run: Operation, batch: Batch) -> bool:
    """Whether all runs give the same gradients to the last bit."""
    first: list[Tensor] = []
    for _ in range(RUNS_OF_SAME_BITS):
        step(run, batch)
        grads = [part.grad.to_dense() for part in batch[:2] if part.grad is not None]
        first = first or [grad.clone() for grad in grads]
        if not all(torch.equal(*pair) for pair in zip(first, grads, strict=True)):
            return False
    return True


def measured_rates(dtype: torch.dtype, repeats: int) -> Rates:
    """Measured rates of a matrix product and of a copy."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    product = statistics.median(time_ms(lambda: left @ right, repeats))
    copy = statistics.median(time_ms(source.clone, repeats))
    return Rates(tflops=2 * 8192**3 / product / 1e9, tbps=2 * source.nbytes / copy / 1e9)


def make_gpu_batch(work: Workload, dtype: torch.dtype) -> Batch:
    """Random states, table and targets."""
    place: dict[str, Any] = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(0)}
    states = torch.randn(work.num_positions, work.width, **place).to(dtype)
    table = torch.randn(work.num_items, work.width, **place).mul_(work.width**-0.5).to(dtype)
    targets = torch.randint(work.num_items, (work.num_positions,), **place)
    return states.requires_grad_(), table.requires_grad_(), targets


def contest(
    runs: dict[str, Operation], batch: Batch, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds and peak MiB of each that does not run out of memory."""
    times, peaks = {}, {}
    for name, run in runs.items():
        try:
            peaks[name] = round(peak_mib(run, batch), 1)
            times[name] = time_ms(partial(step, run, batch), repeats)
        except torch.OutOfMemoryError:
            print(f"{name} ran out of memory", flush=True)
    return times, peaks


def measure(loss: str, catalog: int, options: argparse.Namespace, results: Results) -> None:
    """Appends the missing row of one loss and catalog size."""
    dtype = getattr(torch, options.dtype)
    key = {
        "loss": loss,
        "positions": options.positions,
        "width": options.width,
        "catalog": catalog,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(),
    }
    if results.has(key):
        return
    check_triton(loss, "cuda", dtype)
    work = Workload(
        num_positions=options.positions,
        num_items=catalog,
        num_ranks=1,
        width=options.width,
        element_bytes=dtype.itemsize,
        on_cpu=False,
    )
    batch = make_gpu_batch(work, dtype)
    loops, searched = chunked(loss, work, batch, options.memory_gib)
    mine = ours_variants(loss)
    runs = mine | others(loss, work, options.memory_gib) | loops
    times, peaks = contest(runs, batch, options.repeats)
    named = H200[options.dtype]
    rates = {
        "named": Rates(tflops=options.tflops or named.tflops, tbps=options.tbps or named.tbps),
        "measured": measured_rates(dtype, options.repeats),
    }
    results.append(
        key,
        times_ms=times,
        searched_s=searched,
        median_ms={name: round(statistics.median(values), 3) for name, values in times.items()},
        peak_mib=peaks,
        same_bits={name: same_bits(run, batch) for name, run in mine.items() if name in times},
        limit_ms=limits(loss, work, mine, rates["named"]),
        limit_as_measured_ms=limits(loss, work, mine, rates["measured"]),
        rates={name: asdict(of) for name, of in rates.items()},
    )


def limits(loss: str, work: Workload, names: Iterable[str], rates: Rates) -> dict[str, float]:
    """Least milliseconds of each of our functions."""
    return {
        name: round(
            limit_ms(
                loss,
                work,
                replace(CALLED_WITH, share=1) if name == "ours_share_1" else CALLED_WITH,
                rates,
            ),
            6,
        )
        for name in names
    }


def summary(results: Results) -> str:
    """The rows as a Markdown table; others over ours, above 1 where ours is better."""
    lines = [
        "| loss | dtype | D | V | ours ms | over limit | MiB | others: time, memory over ours |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in results.rows:
        key, times, peaks = row["key"], row["median_ms"], row["peak_mib"]
        for mine in (name for name in times if name.startswith("ours")):
            ratios = [
                f"{name} {times[name] / times[mine]:.2f}, {peaks[name] / max(peaks[mine], 1):.2f}"
                for name in times
                if not name.startswith("ours")
            ]
            cells = [key["loss"] + mine[4:], key["dtype"], key["width"], f"{key['catalog']:,}"]
            cells += [f"{times[mine]:.2f}", f"{times[mine] / row['limit_ms'][mine]:.2f}"]
            cells += [f"{peaks[mine]:.0f}", "; ".join(ratios)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Checks, then measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--catalog", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--positions", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(H200))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--memory-gib", type=float, default=100.0, help="that a baseline may store")
    parser.add_argument("--tflops", type=float, help="of the card; default: an H200's")
    parser.add_argument("--tbps", type=float, help="of the card's memory; default: an H200's")
    parser.add_argument("--toy", action="store_true", help="the checks alone, in the interpreter")
    parser.add_argument("--output", type=Path, default=RESULTS / "losses_gpu.jsonl")
    options = parser.parse_args()
    if options.toy:
        for loss in options.losses:
            for dtype in (torch.float32, torch.bfloat16):
                check_triton(loss, "cpu", dtype, positions=32, catalog=64)
                print(f"{loss} in {dtype}: as its definition", flush=True)
        return
    results = Results(options.output)
    for catalog in options.catalog:
        for loss in options.losses:
            measure(loss, catalog, options, results)
    print(summary(results))


if __name__ == "__main__":
    main()
