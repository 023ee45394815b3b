r"""Time and peak memory of ``prepare``, or with ``--describe`` of ``describe``, for an event log.

Each run is a process of its own, so its peak memory is the stage's whole: Python, Arrow, DuckDB.
Without a log, one is generated first, of a kind that ``logs.py`` makes. With ``--keep-items`` a
tenth as many events of another seed are prepared before, and their items keep their indices. On
Spark the memory limit is the heap of the driver's JVM, which is the executor of a local master.

    python benchmarks/prepare.py --generate integers --events 20_000_000
    python benchmarks/prepare.py --generate one-user --events 6_000_000 --repeats 1
    python benchmarks/prepare.py --generate strings --keep-items
    python benchmarks/prepare.py --generate integers --engine spark --memory-limit 4g
    python benchmarks/prepare.py --log events.parquet split=leave_one_out user_column=customer
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from logs import KINDS, write_log
from record import RESULTS, Results, Watch, call_fresh, median, peak_rss_bytes, timed

from shardrec.pipeline.config import override
from shardrec.pipeline.describe import DescribeConfig, describe
from shardrec.pipeline.prepare import PrepareConfig, prepare

ALIKE = (
    *("types", "output_bytes", "counts", "quantiles", "cpu_seconds", "peak_by_process"),
    *("peak_disk_bytes", "peak_disk_by_name", "shuffle_bytes", "spilled_bytes", "fingerprint"),
    "refused",
)
# DuckDB's spilled rows and its tables; Spark's shuffled and spilled rows, and the held tables.
ON_DISK = ("spill", "events.duckdb", "blockmgr", "table")


def run_once(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds, peak memory and counts of one ``prepare`` in this process."""
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        output = str(Path(folder) / "prepared")
        config = PrepareConfig(events=job["events"], items=job["items"], output=output)
        on_spark = "engine=spark" in job["options"]
        if on_spark:
            set_spark(folder, job["memory_limit"])
        else:
            limits = {"threads": job["threads"], "memory_limit": job["memory_limit"]}
            config = dataclasses.replace(config, **limits)
        config = override(config, job["options"])
        results: list[dict[str, Any]] = []
        work = described if job["describe"] else prepared
        with Watch(folder, ON_DISK) as watch:
            seconds = timed(lambda: results.append(work(config, folder)))
        moved = spark_bytes(Path(folder)) if on_spark else {}
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": watch.cpu_seconds,
            "peak_bytes": peak_rss_bytes(),
            "peak_by_process": watch.memory,
            "peak_disk_bytes": watch.disk,
            "peak_disk_by_name": {name: held for name, held in watch.disk_by_name.items() if held},
            "spilled_bytes": watch.disk_by_name["spill"],
            **moved,
            **results[0],
        }


def prepared(config: PrepareConfig, folder: str) -> dict[str, Any]:
    """What ``prepare`` counts; or the line in which it refuses, if memory does not suffice."""
    try:
        manifest = prepare(config)
    except MemoryError as error:
        return {"refused": str(error).replace(folder, "")}
    return {
        "fingerprint": manifest.fingerprint,
        "output_bytes": sum(file.bytes for file in manifest.files),
        "types": {name: manifest.columns[name]["type"] for name in ("user", "item", "time")},
        "counts": manifest.counts,
        "quantiles": manifest.quantiles,
    }


def described(config: PrepareConfig, folder: str) -> dict[str, Any]:
    """What ``describe`` counts, with its temporary files in ``folder``."""
    tempfile.tempdir = folder
    limits = DescribeConfig(memory_limit=config.memory_limit or "512MB", threads=config.threads)
    facts = describe(config.events, limits).facts
    return {"counts": {name: facts[name] for name in ("events", "users", "items")}}


def set_spark(folder: str, heap: str) -> None:
    """Keep Spark's files in ``folder``, and a log of its events."""
    (Path(folder) / "spark-events").mkdir()
    os.environ["SPARK_LOCAL_DIRS"] = folder
    settings = {
        "spark.driver.memory": heap,
        "spark.eventLog.enabled": "true",
        "spark.eventLog.compress": "false",
        "spark.eventLog.rolling.enabled": "false",
        "spark.eventLog.dir": f"file://{folder}/spark-events",
        "spark.ui.enabled": "false",
    }
    words = [f"--conf {name}={value}" for name, value in settings.items()]
    given = shlex.split(os.environ.get("PYSPARK_SUBMIT_ARGS", ""))
    os.environ["PYSPARK_SUBMIT_ARGS"] = " ".join([*words, *given, "pyspark-shell"])


def spark_bytes(folder: Path) -> dict[str, int]:
    """What all tasks wrote for a shuffle, and spilled, from the log of Spark's events."""
    shuffled = spilled = 0
    (path,) = (folder / "spark-events").iterdir()
    for line in path.read_text().splitlines():
        metrics = json.loads(line).get("Task Metrics") or {}
        spilled += metrics.get("Disk Bytes Spilled", 0)
        shuffled += metrics.get("Shuffle Write Metrics", {}).get("Shuffle Bytes Written", 0)
    return {"shuffle_bytes": shuffled, "spilled_bytes": spilled}


def measure(options: argparse.Namespace, results: Results, key: dict[str, Any]) -> None:
    """Append one row: median seconds and largest peak over the repeats."""
    job = {
        "events": options.log,
        "items": options.items,
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "options": options.options,
        "folder": options.folder,
        "describe": options.describe,
    }
    answers = [call_fresh(__file__, job) for _ in range(options.repeats)]
    times = [answer["seconds"] for answer in answers]
    results.append(
        key,
        seconds=median(times),
        peak_bytes=max(answer["peak_bytes"] for answer in answers),
        times_s=times,
        **{name: answers[0][name] for name in ALIKE if name in answers[0]},
    )


def generate(options: argparse.Namespace, folder: Path) -> None:
    """Make the log, and the items to keep, that the options ask for."""
    path = folder / f"{options.generate}-{options.events}.parquet"
    write_log(options.generate, path, options.events)
    options.log = str(path)
    if options.keep_items:
        former, prepared = folder / "former.parquet", folder / "former"
        write_log(options.generate, former, options.events // 10, seed=1, like=options.events)
        prepare(PrepareConfig(events=str(former), output=str(prepared), threads=options.threads))
        options.items = str(prepared / "items.parquet")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("options", nargs="*", help="options of prepare, as name=value")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", default="512MB", help="DuckDB's, or heap of Spark")
    parser.add_argument("--engine", choices=("duckdb", "spark"), default="duckdb")
    parser.add_argument("--master", default="local[2]", help="of Spark")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", help="name of the log in the results; default its file name")
    parser.add_argument("--folder", help="where outputs go meanwhile; default the system's")
    parser.add_argument("--again", action="store_true", help="measure even if a row is there")
    parser.add_argument("--log", help="file, folder, glob or URI; default: one is generated")
    parser.add_argument("--generate", choices=KINDS, default="integers", help="kind of log")
    parser.add_argument("--events", type=int, default=20_000_000, help="of a generated log")
    parser.add_argument("--describe", action="store_true", help="measure describe instead")
    parser.add_argument("--keep-items", action="store_true", help="of a log prepared before")
    parser.set_defaults(items=None)
    parser.add_argument("--results", default=str(RESULTS / "prepare.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(run_once(options.job)))
        return
    if options.log is not None and options.keep_items:
        parser.error("--keep-items needs a generated log; use items=PATH with your own")
    if options.engine == "spark":
        options.options += ["engine=spark", f"master={options.master}"]
    generated = f"{options.generate}-{options.events}"
    key = {
        "log": options.name or (Path(options.log).stem if options.log else generated),
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "options": options.options,
        "keep_items": options.keep_items,
    }
    key |= {"stage": "describe"} if options.describe else {}
    results = Results(options.results)
    if results.has(key) and not options.again:
        print(f"measured already: {key}")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.log is None:
            generate(options, Path(folder))
        measure(options, results, key)


if __name__ == "__main__":
    main()
