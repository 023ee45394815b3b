r"""What single options are worth on a log: each row changes one thing of the same base.

The base is the exact softmax over unit-length vectors, D = 64, ten epochs. Rows are judged by the
validation users, seen items left out, at the best validation and at the last one.

    python benchmarks/ablations.py amazon_beauty_5core.parquet --seeds 0 1 2
"""

import argparse
import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, run_logged

BASE = [
    "loss=cce",
    "loss.normalize=true",
    "loss.temperature=0.07",
    "encoder.width=64",
    "encoder.max_length=20",
    "encoder.dropout=0.3",
    "batches.batch_size=128",
    "optimizer.learning_rate=1e-3",
    "catalog.learning_rate=1e-3",
    "limits.max_epochs=10",
    "validation.every_epochs=1",
    "validation.patience=none",
    "validation.measure.filter_seen=true",
    "checkpoints.every_minutes=none",
]
ABLATIONS: dict[str, list[str]] = {
    "base": [],
    "average, decay .999": ["optimizer.ema_decay=0.999"],
    "label smoothing .1": ["loss.label_smoothing=0.1"],
    "average, decay .99": ["optimizer.ema_decay=0.99"],
    "label smoothing .02": ["loss.label_smoothing=0.02"],
}
METRICS = ("NDCG@10", "HitRate@10")


def measure(settings: list[str], seed: int, data: Path, work: Path) -> dict[str, Any]:
    """Train in a fresh process; metrics of the best and the last validation, CPU seconds."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    before = _cpu_seconds()
    stage = ["train", "--prepared", str(data), "--run", str(run), "--recipe", "demo"]
    run_logged([*SHARDREC, *stage, *BASE, f"seed={seed}", *settings], 1, work / "train.log")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["metrics"] for line in lines if line["event"] == "validation"]
    best = max(found, key=lambda metrics: metrics["NDCG@10"])
    shutil.rmtree(run)
    return {
        "best": {name: round(best[name], 5) for name in METRICS},
        "last": {name: round(found[-1][name], 5) for name in METRICS},
        "best_epoch": found.index(best) + 1,
        "cpu_s": round(_cpu_seconds() - before, 1),
    }


def _cpu_seconds() -> float:
    """User and system seconds of the processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def summary(results: Results) -> str:
    """The rows as a Markdown table: means over the seeds."""
    lines = ["| | seeds | NDCG@10 | HR@10 | last NDCG@10 | CPU s |", "|---|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(row["key"]["name"] for row in results.rows):
        rows = [row for row in results.rows if row["key"]["name"] == name]
        best = [sum(row["best"][metric] for row in rows) / len(rows) for metric in METRICS]
        last = sum(row["last"]["NDCG@10"] for row in rows) / len(rows)
        seconds = sum(row["cpu_s"] for row in rows) / len(rows)
        numbers = " | ".join(f"{value:.4f}" for value in (*best, last))
        lines.append(f"| {name} | {len(rows)} | {numbers} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the missing rows, seed after seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="event Parquet")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="*", default=list(ABLATIONS), help="names of rows")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.jsonl")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data, results = options.work / options.log.stem, Results(options.output)
    prepare = ["prepare", "--events", str(options.log), "--output", str(data)]
    prepare += ["--split", "leave_one_out"]
    run_logged([*SHARDREC, *prepare], 1, options.work / "prepare.log")
    for seed in options.seeds:
        for name in options.only:
            settings = ABLATIONS[name]
            key = {"log": options.log.stem, "name": name, "settings": settings, "seed": seed}
            if not results.has(key):
                results.append(key, base=BASE, **measure(settings, seed, data, options.work))
    print(summary(results))


if __name__ == "__main__":
    main()
