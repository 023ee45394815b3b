"""Draw one training step: when each worker computes, and when collectives are in flight.

Trains a few steps with two workers on a prepared folder (generated where none is given), profiles
them with ``shardrec train --profile``, and draws the last one: for each worker what it works on and
the collectives in flight. Black is the time in which it computes while a collective is in flight.

    python benchmarks/timeline.py --loss cce
"""

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, run_logged

from shardrec.pipeline.model.profile_ranges import PART
from shardrec.pipeline.run.profiler import OPERATORS, Span, common, length, union

WIDTH, LANE, GAP, LEFT, RIGHT = 1030, 34, 10, 130, 50
COLOURS = {
    "look-up": "#8c6bb1",
    "encoder": "#4292c6",
    "loss": "#41ab5d",
    "next ids": "#bcbddc",
    "loss backward": "#238b45",
    "encoder backward": "#2171b5",
    "gradients over ranks": "#969696",
    "update": "#d94801",
}
# A reduce-scatter of gloo is an all-reduce inside.
COLLECTIVE_COLOURS = {
    "all_gather": "#e7298a",
    "all_reduce": "#fb9a99",
    "reduce_scatter": "#fb6a4a",
    "all_to_all": "#8c6bb1",
}
OVERLAP = "#222222"


@dataclass(frozen=True)
class Trace:
    """One worker's step: its parts and collectives; times in microseconds of the wall clock."""

    parts: list[tuple[str, Span]]
    collectives: list[tuple[str, Span]]
    work: list[Span]

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """The events of a Chrome trace."""
        with gzip.open(path, "rt") as file:
            data = json.load(file)
        base = data.get("baseTimeNanoseconds", 0) / 1000
        parts, collectives, work = [], [], []
        for name, span in _spans(data["traceEvents"], base):
            if name.startswith(PART):
                parts.append((name.removeprefix(PART), span))
            elif name.startswith(("gloo:", "nccl")):
                collectives.append((name.partition(":")[2], span))
            elif name.startswith(OPERATORS):
                work.append(span)
        return cls(parts, collectives, union(work))


def _spans(events: Sequence[dict[str, Any]], base: float) -> Iterator[tuple[str, Span]]:
    """Names and spans of complete events, and of the pairs that begin and end of others are."""
    begun: dict[tuple[Any, ...], float] = {}
    for event in sorted(events, key=lambda event: float(event.get("ts", 0))):
        key = event.get("id"), event.get("name"), event.get("pid")
        if event.get("ph") == "X":
            start = base + float(event["ts"])
            yield event["name"], (start, start + float(event["dur"]))
        elif event.get("ph") == "b":
            begun[key] = base + float(event["ts"])
        elif event.get("ph") == "e" and key in begun:
            yield event["name"], (begun.pop(key), base + float(event["ts"]))


def last_step(traces: Sequence[Trace]) -> Span:
    """From the first part to the last one of the last step that all workers have whole."""
    starts = [max(span[0] for name, span in trace.parts if name == "look-up") for trace in traces]
    ends = [max(span[1] for name, span in trace.parts if name == "update") for trace in traces]
    return min(starts), max(ends)


def draw(traces: Sequence[Trace], step: Span, title: str) -> str:
    """An SVG of two lanes a worker."""
    scale = (WIDTH - LEFT - RIGHT) / (step[1] - step[0])
    height = 80 + len(traces) * (2 * LANE + 2 * GAP) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
    ]
    lines += _legend()
    for rank, trace in enumerate(traces):
        top = 84 + rank * (2 * LANE + 2 * GAP)
        lines += _worker(trace, rank, top, step, scale)
    lines += _axis(step, scale, height - 40)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _worker(trace: Trace, rank: int, top: int, step: Span, scale: float) -> Iterator[str]:
    """Two lanes: work above, collectives below."""
    yield f'<text x="10" y="{top + 21}">rank {rank} works on</text>'
    yield f'<text x="10" y="{top + LANE + 21}">collectives</text>'
    # A waiting worker runs no operator: its part is drawn pale there.
    for name, span in trace.parts:
        colour = COLOURS.get(name, "#bbbbbb")
        yield from _bars([span], step, scale, top, LANE - 4, colour, 0.25, name)
        busy = common([span], trace.work)
        yield from _bars(_joined(busy, 2 / scale), step, scale, top, LANE - 4, colour, 1.0, name)
    for name, span in trace.collectives:
        below = top + LANE
        colour = next(
            (c for kind, c in COLLECTIVE_COLOURS.items() if kind in name.lower()), "#bbbbbb"
        )
        yield from _bars([span], step, scale, below, LANE / 2 - 4, colour, 1.0, name)
    both = _joined(common(trace.work, union(span for _, span in trace.collectives)), 2 / scale)
    yield from _bars(both, step, scale, top + LANE * 1.5, 6, OVERLAP, 1.0, "at the same time")


def _bars(
    spans: Sequence[Span],
    step: Span,
    scale: float,
    top: float,
    height: float,
    colour: str,
    opacity: float,
    name: str,
) -> Iterator[str]:
    for start, end in spans:
        start, end = max(start, step[0]), min(end, step[1])
        if end <= start:
            continue
        x, wide = LEFT + (start - step[0]) * scale, max((end - start) * scale, 0.3)
        yield (
            f'<rect x="{x:.1f}" y="{top:.0f}" width="{wide:.1f}" height="{height:.0f}" '
            f'fill="{colour}" fill-opacity="{opacity}"><title>{escape(name)} '
            f"{(end - start) / 1000:.2f} ms</title></rect>"
        )


def _joined(spans: Sequence[Span], gap: float) -> list[Span]:
    """Spans with gaps too small to be seen closed, which keeps the file small."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def _legend() -> Iterator[str]:
    for y, colours in ((32, COLOURS), (52, COLLECTIVE_COLOURS | {"both at once": OVERLAP})):
        x = 10.0
        for name, colour in colours.items():
            yield f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{colour}"/>'
            yield f'<text x="{x + 16:.0f}" y="{y + 10}">{name}</text>'
            x += 28 + 6.2 * len(name)
    x += 10
    yield f'<text x="{x:.0f}" y="62">pale: nothing is computed</text>'


def _axis(step: Span, scale: float, y: int) -> Iterator[str]:
    whole = (step[1] - step[0]) / 1000
    every = next(t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1e9) if whole / t <= 12)
    tick = 0.0
    while tick <= whole:
        x = LEFT + tick * 1000 * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y}" stroke="black"/>'
        yield f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{tick:g} ms</text>'
        tick += every


def facts(traces: Sequence[Trace], step: Span) -> str:
    """Text: milliseconds of collectives in the step, and how many overlap with work."""
    lines = []
    for rank, trace in enumerate(traces):
        in_flight = common(union(span for _, span in trace.collectives), [step])
        overlap = common(in_flight, trace.work)
        lines.append(
            f"rank {rank}: step {(step[1] - step[0]) / 1000:.1f} ms, collectives in flight "
            f"{length(in_flight) / 1000:.1f} ms, of it during work {length(overlap) / 1000:.1f} ms"
        )
    return "\n".join(lines)


def profiled_run(options: argparse.Namespace, folder: Path) -> Path:
    """A run folder with a profile of a few steps of each worker."""
    log, prepared = folder / "log", options.prepared
    if prepared is None:
        prepared = folder / "prepared"
        events = folder / "log.parquet"
        sizes = ["--items", str(options.items), "--users", "20000", "--events", "500000"]
        run_logged([*SHARDREC, "synth", "--output", str(events), *sizes], 1, log)
        run_logged(
            [*SHARDREC, "prepare", "--events", str(events), "--output", str(prepared)], 1, log
        )
    run = folder / "run"
    settings = [f"loss={options.loss}", *options.set, "limits.max_epochs=none"]
    settings += ["limits.max_steps=9", "validation.every_epochs=none", "show_progress=false"]
    command = [*SHARDREC, "launch", "train", "-j", "1x2", "--env", "OMP_NUM_THREADS=1", "--"]
    command += ["--prepared", str(prepared), "--run", str(run), "--recipe", "demo"]
    command += ["--profile", "3", *settings]
    run_logged(command, 1, log)
    return run


def title_of(run: Path, workers: int) -> str:
    """What the run trained, in words."""
    config = json.loads((run / "config.json").read_text())
    num_items = json.loads((run / "run.json").read_text())["data"]["num_items"]
    return (
        f"One training step of {config['loss']['type']} on {workers} workers: {num_items:,} items, "
        f"width {config['encoder']['width']}, {config['batches']['batch_size']} sequences of up to "
        f"{config['encoder']['max_length']}"
    )


def main() -> None:
    """Trains, draws, and prints what the picture shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepared", help="folder of `shardrec prepare`; generated when left out")
    parser.add_argument("--items", type=int, default=100_000, help="of the generated catalog")
    parser.add_argument("--loss", default="cce")
    parser.add_argument("--set", nargs="*", default=[], help="options of the run, name=value")
    parser.add_argument("--run", type=Path, help="draw the profile of this run folder instead")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or profiled_run(options, Path(folder))
        paths = sorted((run / "profile").glob("rank*.json.gz"))
        traces = [Trace.read(path) for path in paths]
        title = title_of(run, len(traces))
        print((run / "profile" / "rank0.txt").read_text())
    step = last_step(traces)
    output = options.output or RESULTS / f"timeline_{options.loss}.svg"
    output.write_text(draw(traces, step, title))
    print(facts(traces, step), output.name, sep="\n")


if __name__ == "__main__":
    main()
