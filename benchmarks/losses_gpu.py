"""How fast and how lean is each loss alone, forward and backward, on a GPU?

For each loss: a check of the Triton kernels against the definition in float64, then medians of
ours and of whatever else fits the memory, peak memory beside the inputs and the table's gradient,
and whether twenty runs of ours give the same bits. ``limit_ms`` is the larger of counted operations
over the measured rate of a matrix product and counted bytes over the measured rate of a copy. The
kernels of other projects take part where they are installed (cut-cross-entropy, liger-kernel).

    python benchmarks/losses_gpu.py --catalog 100000 1000000 10000000
    python benchmarks/losses_gpu.py --dtype float32 --width 64
    TRITON_INTERPRET=1 python benchmarks/losses_gpu.py --toy        # the checks, without a GPU
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import baselines
from loss_checks import check_triton
from losses import LOSSES, NUM_NEGATIVES, counted, ours, stored_gib
from record import RESULTS, Results

from shardrec import kernels
from shardrec.kernels.cost import Workload

Operation = Callable[[Tensor, Tensor, Tensor], Tensor | None]
BLOCK = 1024
RUNS_OF_SAME_BITS = 20


def contestants(loss: str, options: argparse.Namespace, catalog: int) -> dict[str, Operation]:
    """Our function and what else there is for a loss and fits the memory."""
    found: dict[str, Operation] = {"ours": ours(loss)}
    if loss == "cce":
        loop = partial(baselines.chunked_cce, block=BLOCK)
        found |= {"eager": baselines.eager_cce, "chunked": loop, "compiled": torch.compile(loop)}
        found |= _of_other_projects()
    if loss == "cce_minus":
        found["ours_sparse"] = ours(loss, sparse_grad=True)
        found["ours_share_1"] = partial(
            kernels.sampled_cross_entropy, num_negatives=NUM_NEGATIVES, share=1, seed=7
        )
        found["fair"] = _fair
    if loss == "sce":
        found["ours_sparse"] = ours(loss, sparse_grad=True)
    room = options.memory_gib
    needed = {
        name: stored_gib(loss, name, options.positions, catalog, options.width)
        for name in found.keys() & {"eager", "fair"}
    }
    return {name: run for name, run in found.items() if needed.get(name, 0.0) <= room}


def _of_other_projects() -> dict[str, Operation]:
    """The full softmax of other projects that are installed."""
    found: dict[str, Operation] = {}
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = partial(linear_cross_entropy, filter_eps=None)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = lambda states, table, targets: liger(table, states, targets)
    return found


def _fair(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    negatives = torch.randint(len(table), (NUM_NEGATIVES,), device=states.device)
    return baselines.fair_cce_minus(states, table, targets, negatives)


def step(run: Operation, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward; the gradients stay."""
    batch[0].grad = batch[1].grad = None
    loss = run(*batch)
    if loss is not None:
        loss.backward()


def time_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds by events of the device, after two runs that warm up."""
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end)] * (repeat >= 2)
    return times


def peak_mib(run: Operation, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """Peak memory of a step beside its inputs and the table's gradient."""
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


def same_bits(run: Operation, batch: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether all runs give the same gradients to the last bit."""
    first: list[Tensor] = []
    for _ in range(RUNS_OF_SAME_BITS):
        step(run, batch)
        grads = [part.grad.to_dense() for part in batch[:2] if part.grad is not None]
        first = first or [grad.clone() for grad in grads]
        if not all(torch.equal(*pair) for pair in zip(first, grads, strict=True)):
            return False
    return True


def rates(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Measured TFLOP/s of a matrix product and TB/s of a copy."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    product = statistics.median(time_ms(lambda: left @ right, repeats))
    copy = statistics.median(time_ms(source.clone, repeats))
    return {"tflops": 2 * 8192**3 / product / 1e9, "tbps": 2 * source.nbytes / copy / 1e9}


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
    generator = torch.Generator("cuda").manual_seed(0)
    place: dict[str, Any] = {"device": "cuda", "generator": generator}
    states = torch.randn(options.positions, options.width, **place).to(dtype).requires_grad_()
    table = torch.randn(catalog, options.width, **place).mul_(options.width**-0.5).to(dtype)
    targets = torch.randint(catalog, (options.positions,), **place)
    batch = states, table.requires_grad_(), targets
    runs = contestants(loss, options, catalog)
    measured = rates(dtype, options.repeats)
    times = {
        name: time_ms(partial(step, run, batch), options.repeats) for name, run in runs.items()
    }
    work = Workload(
        num_positions=options.positions,
        num_items=catalog,
        num_ranks=1,
        width=options.width,
        element_bytes=dtype.itemsize,
        on_cpu=False,
    )
    cost = counted(loss, work)
    by_work = cost.flops / measured["tflops"] / 1e9
    by_bytes = cost.work.bytes / measured["tbps"] / 1e9
    results.append(
        key,
        times_ms=times,
        median_ms={name: round(statistics.median(values), 3) for name, values in times.items()},
        peak_mib={name: round(peak_mib(run, batch), 1) for name, run in runs.items()},
        same_bits={
            name: same_bits(run, batch) for name, run in runs.items() if name.startswith("ours")
        },
        limit_ms=round(max(by_work, by_bytes), 3),
        rates={name: round(value, 2) for name, value in measured.items()},
    )


def main() -> None:
    """Checks, then measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--catalog", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--positions", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--memory-gib", type=float, default=100.0, help="that a baseline may store")
    parser.add_argument("--toy", action="store_true", help="the checks alone, in the interpreter")
    parser.add_argument("--output", type=Path, default=RESULTS / "losses_gpu.jsonl")
    options = parser.parse_args()
    if options.toy:
        for loss in options.losses:
            check_triton(loss, "cpu", torch.float32)
            print(f"{loss}: the kernels give the loss and gradients of its definition", flush=True)
        return
    results = Results(options.output)
    for catalog in options.catalog:
        for loss in options.losses:
            measure(loss, catalog, options, results)


if __name__ == "__main__":
    main()
