r"""The sweep behind ``recipe=default``: validation metrics of options of train on seven logs.

A plan names one run a line: a log of LOGS, then options that differ from BASE. It is read again
after each run, so that lines can be added meanwhile; a run that has its row is not repeated. Users
of the test part are never ranked. Each run is trained, ranked and memorized in a process of its
own; the row has its CPU seconds (user and system, all threads).

    python benchmarks/default_recipe.py plan.txt --data DIR --work runs/default
    # plan.txt:  beauty encoder.width=128
    #            sessions seed=2 batches.windows=last
    #            beauty_all recipe=default judge=test
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results, call_fresh, peak_rss_bytes

from shardrec.pipeline.baseline import BaselineConfig, Kind, baseline
from shardrec.pipeline.config import override
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.memorize import MemorizeConfig, memorize
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.recipes import recipe_named
from shardrec.pipeline.report.paired import paired
from shardrec.pipeline.synth import SynthConfig, generate
from shardrec.pipeline.train import train

LATE = "timestamp > (SELECT quantile_cont(timestamp, 0.93) FROM read_parquet('{0}'))"
LOO = ["split=leave_one_out"]
# The file, or users, items and events of a generated log; the events that are used; options of
# prepare. Parts of the larger logs, so that a run takes a minute.
LOGS: dict[str, tuple[str, str, list[str]]] = {
    "beauty": ("amazon_beauty_5core", "true", [*LOO, "validation_users=4000"]),
    "beauty_all": ("amazon_beauty_5core", "true", [*LOO, "validation=none"]),
    "sessions": ("diginetica_sessions", "user_id % 10 = 0", [*LOO, "validation_users=3000"]),
    "baskets": ("complete_journey", LATE, ["validation=time"]),
    "ratings": ("epinions", "user_id % 10 = 0", [*LOO, "min_item_events=2"]),
    "synth_shop": ("6000,6000,60000", "true", [*LOO, "validation_users=3000"]),
    "synth_long": ("2000,20000,80000", "true", ["validation_users=1500"]),
}
BASE = [
    *("loss=cce_minus", "loss.num_negatives=1024", "loss.share=128"),
    *("loss.normalize=true", "loss.temperature=0.07"),
    *("encoder.width=64", "encoder.num_heads=2", "encoder.dropout=0.3", "encoder.max_length=50"),
    *("batches.batch_size=128", "batches.windows=all"),
    *("catalog.learning_rate=0.002", "optimizer.learning_rate=0.002", "optimizer.clip_norm=5"),
    *("optimizer.warmup_steps=100", "optimizer.decay=cosine"),
    *("limits.max_epochs=6", "validation.every_epochs=1", "validation.patience=3"),
    *("show_progress=no", "log_every=100", "checkpoints.keep=1"),
]
METRIC = "NDCG@10"
SHOWN = (METRIC, "HitRate@10", "Coverage@10")
MEASURE = MeasureConfig(ks=(10,))
BASELINES: tuple[Kind, ...] = ("popularity", "next", "knn_next")


def prepared_log(name: str, data: Path, work: Path) -> Path:
    """The prepared folder of a log, made if missing."""
    file, chosen, options = LOGS[name]
    log, folder = work / f"{name}.parquet", work / name
    if not log.exists():
        if file[0].isdigit():
            users, items, events = map(int, file.split(","))
            generate(SynthConfig(users=users, items=items, events=events), log)
        else:
            source = str(data / f"{file}.parquet")
            duckdb.sql(
                f"COPY (SELECT * FROM read_parquet('{source}') WHERE {chosen.format(source)}) "
                f"TO '{log}' (FORMAT parquet)"
            )
    config = PrepareConfig(events=str(log), output=str(folder), threads=1)
    prepare(override(config, options))
    return folder


def ranked(run: Path, data: Path) -> dict[str, float]:
    """NDCG@10 and its standard error on the validation users."""
    report = evaluate(str(run), str(data), MEASURE, split="validation", force=True)
    error = report["standard_errors"][METRIC]
    return {"value": round(report["metrics"][METRIC], 5), "error": round(error, 5)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train, rank and memorize in this process."""
    data, run = Path(job["data"]), Path(job["run"])
    shutil.rmtree(run, ignore_errors=True)
    start = time.process_time()
    config = recipe_named(job["recipe"])(str(data), str(run))
    config = override(config, job["options"])
    report = train(config)
    row: dict[str, Any] = {"cpu_s": round(time.process_time() - start, 1)}
    row |= {"reason": report.reason, "steps": report.step, "best_step": report.best_step}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row["curve"] = [
        round(line["metrics"][METRIC], 5) for line in lines if line["event"] == "validation"
    ]
    if job["judge"] == "test":
        return row | judged(run, data) | {"peak_bytes": peak_rss_bytes()}
    row["model"] = ranked(run, data)
    memory = memorize(
        MemorizeConfig(
            run=str(run), prepared=str(data), scales=(0.0, 2.0, 4.0, 8.0, 16.0, 32.0), force=True
        )
    )
    row["memory"] = {f"{one['scale']:g}": round(one[METRIC], 5) for one in memory.manifest["tried"]}
    return row | {"peak_bytes": peak_rss_bytes()}


def judged(run: Path, data: Path) -> dict[str, Any]:
    """Metrics of the test users, and the paired difference to knn_next, without and with seen."""
    row: dict[str, Any] = {"scale": json.loads((run / "memory/manifest.json").read_text())["scale"]}
    folders: dict[str, Path] = {"default": run} | {str(kind): data / kind for kind in BASELINES}
    for kind in BASELINES:
        baseline(BaselineConfig(prepared=str(data), kind=kind, output=str(folders[kind])))
    for name, filter_seen in (("unseen", True), ("all", False)):
        how, found, values = replace(MEASURE, filter_seen=filter_seen), dict[str, Any](), {}
        for label, folder in folders.items():
            report = evaluate(str(folder), str(data), how, force=True)
            found[label] = {metric: round(report["metrics"][metric], 5) for metric in SHOWN}
            lists = pq.read_table(folder / report["users"]["file"])["ranks"].to_pylist()
            values[label] = np.array([gain(ranks[0]) for ranks in lists])
        mean, error = paired(values["default"] - values["knn_next"])
        row[name] = {**found, "above_knn_next": [round(mean, 5), round(error, 5)]}
    return row


def gain(rank: int) -> float:
    """NDCG@10 of a user with one target at this rank, 0 the best and -1 if it is not listed."""
    return 1 / math.log2(rank + 2) if 0 <= rank < 10 else 0.0


def counted(job: dict[str, Any]) -> dict[str, Any]:
    """The baselines of a log."""
    data, row = Path(job["data"]), dict[str, Any]()
    for kind in BASELINES:
        folder = data / "measured"
        shutil.rmtree(folder, ignore_errors=True)
        baseline(BaselineConfig(prepared=str(data), kind=kind, output=str(folder)))
        row[kind] = ranked(folder, data)
    manifest = json.loads((data / "manifest.json").read_text())
    return row | {"counts": manifest["counts"], "quantiles": manifest["quantiles"]}


def run_line(line: str, options: argparse.Namespace, results: Results) -> bool:
    """Measure a line of the plan if it has no row; whether it was measured."""
    name, *changes = line.split()
    recipe = next((word[7:] for word in changes if word.startswith("recipe=")), "demo")
    judge = "test" if "judge=test" in changes else "validation"
    changes = [word for word in changes if not word.startswith(("recipe=", "judge="))]
    base = BASE if recipe == "demo" else ["show_progress=no", "log_every=100"]
    key = {"log": name, "recipe": recipe, "options": changes, "judge": judge}
    if results.has(key):
        return False
    data = prepared_log(name, options.data, options.work)
    own = {"log": name, "recipe": "baselines", "options": []}
    if judge == "validation" and not results.has(own):
        results.append(own, **call_fresh(__file__, {"data": str(data), "kind": "baselines"}))
    job = {
        "kind": "run",
        "judge": judge,
        "data": str(data),
        "run": str(options.work / "run"),
        "recipe": recipe,
        "options": [*base, *changes],
    }
    try:
        row = call_fresh(__file__, job)
    except RuntimeError as error:
        print(error, flush=True)
        row = {"failed": str(error)[-200:]}
    results.append(key, **row)
    return True


def main() -> None:
    """Measure the lines of the plan that have no row, until there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, help="folder of the logs")
    parser.add_argument("--work", type=Path, default=Path("runs/default"))
    parser.add_argument("--output", default=str(RESULTS / "default_recipe.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        stage = counted if options.job["kind"] == "baselines" else measure
        print(json.dumps(stage(options.job)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.output)
    while True:
        lines = [line for line in options.plan.read_text().splitlines() if line.split("#")[0]]
        if not any(run_line(line, options, results) for line in lines):  # the first without a row
            return


if __name__ == "__main__":
    main()
