"""Wall time, the kernels' own time, launches and waits of a step, and the rates of the card."""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_limits import Options, Rates, limit_ms
from losses_gpu import of_other_projects
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from verdict.checks import LOSSES, Batch, options_of, run

from shardrec.kernels.ranks.traffic import Workload

__all__ = ["Size", "contests", "measure_rates", "measured"]

_MOST_RUNS = 10
_MOST_PROFILED_MS = 3000.0
_LONGEST = 6
_LIMITED = {
    "cce": Options(num_negatives=0, share=1, items_per_bucket=0, rounds=0, reach=0),
    "cce_minus": Options(num_negatives=1024, share=128, items_per_bucket=0, rounds=0, reach=0),
    "cce_minus_1": Options(num_negatives=1023, share=1, items_per_bucket=0, rounds=0, reach=0),
    "sce": Options(num_negatives=0, share=1, items_per_bucket=256, rounds=0, reach=0),
    "rece": Options(num_negatives=0, share=1, items_per_bucket=0, rounds=8, reach=1),
}
Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Size:
    """A batch and a table, and the dtype of both."""

    N: int
    D: int
    V: int
    dtype: str = "bfloat16"

    def make(self, device: str) -> Batch:
        """Random states, table and targets."""
        place: dict[str, Any] = {"device": device}
        place["generator"] = torch.Generator(device).manual_seed(0)
        kind = getattr(torch, self.dtype)
        states, table = (
            torch.randn(lines, self.D, **place).mul_(self.D**-0.25).to(kind).requires_grad_()
            for lines in (self.N, self.V)
        )
        return states, table, torch.randint(self.V, (self.N,), **place)

    def limit_ms(self, loss: str, rates: Rates | None) -> dict[str, float]:
        """The least time of a loss at the rates of this run; nothing where none is counted."""
        if rates is None or loss not in _LIMITED:
            return {}
        work = Workload(
            num_positions=self.N,
            num_items=self.V,
            num_ranks=1,
            width=self.D,
            element_bytes=getattr(torch, self.dtype).itemsize,
            on_cpu=False,
        )
        name = loss.removesuffix("_1")
        return {"limit_ms": round(limit_ms(name, work, _LIMITED[loss], rates), 3)}


def measure_rates(device: str, size: int = 8192, num_bytes: int = 1 << 31) -> Rates:
    """Rates of a product in bfloat16 and of a copy, which the limits of this run are counted at."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _times(lambda: left @ right, device, 1.0)
    copy = _times(lambda: target.copy_(source), device, 1.0)
    return Rates(
        tflops=2 * size**3 / statistics.median(product) / 1e9,
        tbps=2 * num_bytes / statistics.median(copy) / 1e9,
    )


def contests(loss: str, size: Size, device: str) -> dict[str, Step]:
    """Ways to take a step: ours; and for the full softmax those of others that are installed."""
    batch = size.make(device)
    if device == "cuda":
        found: dict[str, Step] = {"ours": partial(run, loss, batch, "auto")}
    else:
        found = {"ours": partial(run, loss, batch, "triton", **options_of(loss, device))}
    if loss != "cce":
        return found
    return found | {name: partial(_step, one, batch) for name, one in of_other_projects().items()}


def measured(step: Step, device: str, most_s: float) -> dict[str, Any]:
    """Milliseconds by events, peak MiB beside what was there, and what the GPU did meanwhile."""
    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = _times(step, device, most_s)
    row: dict[str, Any] = {
        "ms": round(statistics.median(times), 3),
        "best_ms": round(min(times), 3),
        "runs": len(times),
    }
    if on_gpu:
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        if row["ms"] < _MOST_PROFILED_MS:
            row |= {"waits": _waits(step), **_kernels(step)}
            row["busy"] = round(row["kernels_ms"] / row["ms"], 2)
    return row


def _times(step: Step, device: str, most_s: float) -> list[float]:
    """Milliseconds of runs after two that warm up, until there are ten or the time is over."""
    if device != "cuda":
        return [_time_ms(step, device)]
    times: list[float] = []
    end = time.monotonic() + most_s
    while len(times) < 2 + _MOST_RUNS and (len(times) < 4 or time.monotonic() < end):
        times.append(_time_ms(step, device))
    return times[2:]


def _time_ms(step: Step, device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _waits(step: Step) -> int:
    """How often the host waits for the GPU in a step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return sum("synchroniz" in str(one.message) for one in caught)


def _kernels(step: Step) -> dict[str, Any]:
    """The kernels' own milliseconds, how many are launched, and the longest of them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    rows = [row for row in seen.key_averages() if row.self_device_time_total > 0]
    rows.sort(key=lambda row: -row.self_device_time_total)
    return {
        "kernels_ms": round(sum(row.self_device_time_total for row in rows) / 1e3, 3),
        "launches": sum(row.count for row in rows),
        "longest": [
            f"{row.key[:48]} x{row.count} {row.self_device_time_total / 1e3:.2f}"
            for row in rows[:_LONGEST]
        ],
    }


def _step(loss: Callable[..., Tensor | None], batch: Batch) -> None:
    batch[0].grad = batch[1].grad = None
    found = loss(*batch)
    if found is not None:
        found.backward()


assert set(_LIMITED) <= set(LOSSES)
