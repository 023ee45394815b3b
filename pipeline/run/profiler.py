"""Profile a few steps: a Chrome trace of every rank, and a table of the parts of a step.

A part is a profiler range named ``step/...``. Collectives are the events of gloo or NCCL. On a CPU
the time of a part is that of its calls. On a GPU it is that of the kernels launched while the part
ran, by any thread: autograd launches those of backward from its own, which ranges of the main
thread do not reach.
"""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from shardrec.pipeline.model.profile_ranges import PART
from shardrec.pipeline.run.callbacks import Callback, EndReport, StepReport
from shardrec.pipeline.run.config import ProfileConfig

__all__ = ["OPERATORS", "Profiler", "Span", "common", "length", "summary", "union"]

COLLECTIVES = ("gloo:", "nccl")
OPERATORS = ("aten::", "mkldnn::")  # the CPU's
# Start and end of a time span, in microseconds.
Span = tuple[float, float]


class Profiler(Callback):
    """Writes ``rank<r>.json.gz``, for chrome://tracing or Perfetto, and ``rank<r>.txt``."""

    def __init__(self, folder: Path, config: ProfileConfig, rank: int) -> None:
        """Store where to write; nothing is recorded before the warm-up is over."""
        self.folder, self.config, self.rank = folder, config, rank
        self.num_steps = 0
        self.started = 0.0
        self.profile: profile | None = None

    @override
    def on_step(self, report: StepReport) -> None:
        self.num_steps += 1
        if self.profile is not None and self.num_steps == self.config.warmup + self.config.steps:
            self._write(self.profile)
        if self.num_steps == self.config.warmup:
            self.profile = profile(activities=_activities())
            self.profile.start()
            self.started = time.perf_counter()

    @override
    def on_end(self, report: EndReport) -> None:
        if self.num_steps <= self.config.warmup:
            warnings.warn(
                f"profile.warmup must be below the steps of the run, got {self.config.warmup} of "
                f"{self.num_steps}; nothing was profiled",
                stacklevel=2,
            )
        if self.profile is not None:
            self._write(self.profile)

    def _write(self, recorded: profile) -> None:
        """Ends the recording and writes it."""
        seconds = time.perf_counter() - self.started
        recorded.stop()
        self.profile = None
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / f"rank{self.rank}.json.gz"))
        text = summary(recorded.events() or [], seconds, self.num_steps - self.config.warmup)
        (self.folder / f"rank{self.rank}.txt").write_text(text + "\n")


def summary(events: Iterable[FunctionEvent], seconds: float, num_steps: int) -> str:
    """A table, as text, of the time of each part of a step and of its collectives, in s and %.

    On a GPU kernels on several streams count one by one, and "idle" is when none runs.

    Args:
        events: profiler events of the profiled steps.
        seconds: wall time of all profiled steps.
        num_steps: number of profiled steps.
    """
    events = list(events)
    on_gpu = any(event.device_type.name == "CUDA" for event in events)
    chosen = [event for event in events if (event.device_type.name == "CUDA") == on_gpu]
    in_flight = union(_span(event) for event in chosen if event.name.startswith(COLLECTIVES))
    work = union(_span(event) for event in chosen if _is_work(event, on_gpu))
    parts = _parts(event for event in events if event.device_type.name == "CPU")
    if on_gpu:
        taken = _kernel_times(events, parts)
        running = union(_span(event) for event in chosen if not event.name.startswith(PART))
        taken["idle"] = max(0.0, seconds * 1e6 - length(running))
    else:
        taken = {name: length(union(spans)) for name, spans in parts.items()}
        taken["between steps"] = max(0.0, seconds * 1e6 - sum(taken.values()))
    taken["collectives in flight"] = length(in_flight)
    taken["  during other work"] = length(common(in_flight, work))
    lines = [f"{num_steps} steps, {seconds / num_steps:.4f} s each", f"{'':<28}s/step   share"]
    for name, micros in taken.items():
        lines.append(f"{name:<28}{micros / 1e6 / num_steps:>6.4f} {micros / seconds / 1e6:>7.1%}")
    return "\n".join(lines)


def _parts(events: Iterable[FunctionEvent]) -> dict[str, list[Span]]:
    """The spans of each part of a step."""
    parts: dict[str, list[Span]] = {}
    for event in events:
        if event.name.startswith(PART):
            parts.setdefault(event.name.removeprefix(PART), []).append(_span(event))
    return parts


def _kernel_times(
    events: Iterable[FunctionEvent], parts: Mapping[str, list[Span]]
) -> dict[str, float]:
    """Microseconds of the kernels launched during each part, and outside of all of them."""
    taken = dict.fromkeys([*parts, "outside of parts"], 0.0)
    for event in events:
        spent = sum(kernel.duration for kernel in event.kernels)
        if event.device_type.name == "CPU" and spent:
            at = event.time_range.start
            within = (name for name, spans in parts.items() if _holds(spans, at))
            taken[next(within, "outside of parts")] += spent
    return taken


def _holds(spans: Iterable[Span], at: float) -> bool:
    return any(start <= at <= end for start, end in spans)


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint, sorted spans that cover the same time as the given ones.

    >>> union([(5, 6), (0, 2), (1, 3)])
    [(0, 3), (5, 6)]
    """
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def common(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """The intersection of two lists of disjoint, sorted spans.

    >>> common([(0, 3), (5, 9)], [(2, 6), (8, 10)])
    [(2, 3), (5, 6), (8, 9)]
    """
    found, left, right = [], 0, 0
    while left < len(one) and right < len(other):
        start, end = max(one[left][0], other[right][0]), min(one[left][1], other[right][1])
        if start < end:
            found.append((start, end))
        if one[left][1] < other[right][1]:
            left += 1
        else:
            right += 1
    return found


def length(spans: Iterable[Span]) -> float:
    """The sum of the lengths of disjoint spans.

    >>> length([(0, 3), (5, 6)])
    4
    """
    return sum(end - start for start, end in spans)


def _activities() -> list[ProfilerActivity]:
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *on_gpu]


def _span(event: FunctionEvent) -> Span:
    return event.time_range.start, event.time_range.end


def _is_work(event: FunctionEvent, on_gpu: bool) -> bool:
    """Whether something is computed: an operator, or on a GPU a kernel; no wait for a rank."""
    if event.name.startswith((PART, *COLLECTIVES)):
        return False
    return on_gpu or event.name.startswith(OPERATORS)
