"""How long and how much memory does ``prepare`` need for an event log?

Each run is a process of its own, so its peak memory is the stage's whole: Python, Arrow, DuckDB.
Without a log, 20 million events are generated first (``--generate`` says how many).

    python benchmarks/prepare.py events.parquet --threads 2 --repeats 3
    python benchmarks/prepare.py events.parquet split=leave_one_out user_column=customer
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results, call_fresh, median, peak_rss_bytes, timed

from shardrec.pipeline.config import override
from shardrec.pipeline.prepare import PrepareConfig, prepare


def run_once(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds, peak memory and counts of one ``prepare`` in this process."""
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        config = PrepareConfig(
            events=job["events"],
            output=str(Path(folder) / "prepared"),
            threads=job["threads"],
            memory_limit=job["memory_limit"],
        )
        config = override(config, job["options"])
        manifests = []
        seconds = timed(lambda: manifests.append(prepare(config)))
        manifest = manifests[0]
        return {
            "seconds": round(seconds, 2),
            "peak_bytes": peak_rss_bytes(),
            "output_bytes": sum(file.bytes for file in manifest.files),
            "types": {name: manifest.columns[name]["type"] for name in ("user", "item", "time")},
            "counts": manifest.counts,
            "quantiles": manifest.quantiles,
        }


def measure(options: argparse.Namespace) -> None:
    """Append one row: median seconds and largest peak over the repeats."""
    job = {
        "events": options.events,
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "options": options.options,
        "folder": options.folder,
    }
    key = {
        "log": options.name or Path(options.events).name,
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "options": options.options,
    }
    results = Results(options.results)
    if results.has(key) and not options.again:
        print(f"measured already: {key}")
        return
    answers = [call_fresh(__file__, job) for _ in range(options.repeats)]
    times = [answer["seconds"] for answer in answers]
    results.append(
        key,
        seconds=median(times),
        peak_bytes=max(answer["peak_bytes"] for answer in answers),
        times_s=times,
        **{name: answers[0][name] for name in ("types", "output_bytes", "counts", "quantiles")},
    )


def generate(num_events: int, folder: str) -> str:
    """The path of a generated log with a twentieth as many users and a hundredth as many items."""
    from shardrec.pipeline.synth import SynthConfig, generate

    config = SynthConfig(users=num_events // 20, items=num_events // 100, events=num_events)
    path = Path(folder) / f"synth-{num_events}.parquet"
    generate(config, path)
    return str(path)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("events", nargs="?", help="file, folder, glob or URI")
    parser.add_argument("options", nargs="*", help="options of prepare, as name=value")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", default="512MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", help="name of the log in the results; default its file name")
    parser.add_argument("--folder", help="where outputs go meanwhile; default the system's")
    parser.add_argument("--again", action="store_true", help="measure even if a row is there")
    parser.add_argument("--generate", type=int, default=20_000_000, metavar="EVENTS")
    parser.add_argument("--results", default=str(RESULTS / "prepare.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(run_once(options.job)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.events is None:
            options.events = generate(options.generate, folder)
        measure(options)


if __name__ == "__main__":
    main()
