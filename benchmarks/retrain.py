r"""Retraining on newer data: warm start against random weights, for equal numbers of steps.

The log is cut by time: day 1 is its first ``--day-one`` share of events, day 2 adds what follows,
and what comes after ``--test`` is for testing. A run on day 1 is the start of the warm runs of
day 2; cold ones start from random weights. Both see the same data in the same order and take the
same number of steps. What is in --output is not measured again, and a run that is in --work is
resumed.

    cold                    day 2 from random weights
    warm                    from those of day 1, optimizer state kept, rows of new items random
    warm, new rows mean     the same, rows of new items are the mean of the table
    warm, optimizer reset   the same, without the optimizer state
    stale                   no training on day 2: the model of day 1, the rows of new items random

    python benchmarks/retrain.py log.parquet --recipe demo --set batches.windows=all \
        --day-one-steps 1000 --steps 100 300 --seeds 1 2 3 --variants cold warm stale
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, run_logged

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.prepared.manifest import read_manifest

METRICS = ("NDCG@10", "HitRate@10", "Coverage@10", "NDCG@10/known")
ALL_ITEMS = ("--no-filter-seen", "--min-count", "0")
FROZEN = ("limits.max_steps=1", "optimizer.learning_rate=0", "catalog.learning_rate=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "cold": (),
    "warm": ("init_from.new_rows=random",),
    "warm, new rows mean": ("init_from.new_rows=mean",),
    "warm, optimizer reset": ("init_from.optimizer=reset",),
    "stale": FROZEN,
}


def cut_log(options: argparse.Namespace) -> tuple[Path, Path, int]:
    """Write the logs of day 1 and day 2, in columns of our own; their paths and the test time."""
    first, second = options.work / "day-1.parquet", options.work / "day-2.parquet"
    columns = EventColumns(user=options.user, item=options.item, time=options.time)
    log = EventLog.open(str(options.log), columns)
    times = np.concatenate([table["time"].to_numpy() for table in log.tables()])
    ranks = [int(share * len(times)) for share in (options.day_one, options.test)]
    end_of_one, test = np.partition(times, ranks)[ranks].tolist()
    if not (first.exists() and second.exists()):
        tables = EventLog.open(str(options.log), columns).tables()
        kept = [table.select(["user_id", "item_id", "time"]) for table in tables]
        everything = pa.concat_tables(kept).rename_columns(["user_id", "item_id", "timestamp"])
        pq.write_table(everything, second)
        pq.write_table(everything.filter(everything["timestamp"].to_numpy() < end_of_one), first)
    return first, second, test


def shardrec(options: argparse.Namespace, *words: str) -> None:
    """Run one stage in a process of its own."""
    run_logged([*SHARDREC, *words], options.threads, options.work / "log.txt")


def trained(options: argparse.Namespace, data: Path, run: Path, *settings: str) -> Path:
    """Train a run, or resume it."""
    words = ["--prepared", str(data), "--run", str(run), "--recipe", options.recipe]
    often = "checkpoints.every_steps=50"
    shardrec(options, "train", "--resume=auto", *words, often, *options.set, *settings)
    return run


def chosen(options: argparse.Namespace) -> str:
    """The recipe and what was changed in it, as a name of a folder."""
    return "-".join([options.recipe, *options.set])


def judged(options: argparse.Namespace, data: Path, run: Path) -> dict[str, Any]:
    """Metrics of a run on the test events of day 2, and the counts of items taken over."""
    shardrec(options, "evaluate", "--prepared", str(data), "--run", str(run), *ALL_ITEMS)
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    taken = json.loads((run / "run.json").read_text())["init_from"] or {}
    return {
        **{name: round(metrics[name], 5) for name in METRICS},
        "users": metrics["users"],
        "init_from": {name: value for name, value in taken.items() if name != "run"},
    }


def main() -> None:
    """Train and evaluate the missing runs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="event Parquet with real times")
    parser.add_argument("--recipe", default="demo", help="of all runs (default: demo)")
    parser.add_argument("--set", nargs="*", default=[], help="options of train: dotted.name=value")
    parser.add_argument(
        "--day-one", type=float, default=0.8, help="share of the events (default: 0.8)"
    )
    parser.add_argument(
        "--test", type=float, default=0.9, help="share of the events before it (0.9)"
    )
    parser.add_argument("--day-one-steps", type=int, default=1000, help="of day 1 (default: 1000)")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[100, 300], help="of day 2, each a run (100 300)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1], help="each trains day 1 and day 2 (default: 1)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["cold", "warm"],
        metavar="VARIANT",
        help="of those above, in quotes (default: cold warm)",
    )
    parser.add_argument("--user", default="user_id", help="column of the user")
    parser.add_argument("--item", default="item_id", help="column of the item")
    parser.add_argument("--time", default="timestamp", help="column of the time")
    parser.add_argument("--threads", type=int, default=1, help="of every stage (default: 1)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/retrain"), help="for logs, prepared data and runs"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "retrain_cpu.jsonl", help="rows")
    options = parser.parse_args()
    options.work = options.work / f"{options.log.stem}-{options.day_one}-{options.test}"
    options.work.mkdir(parents=True, exist_ok=True)
    first, second, test = cut_log(options)
    day_one, day_two = options.work / "prepared-1", options.work / "prepared-2"
    words = ["--validation", "none", "--test-quantile", "0.99"]
    shardrec(options, "prepare", "--events", str(first), "--output", str(day_one), *words)
    words = ["--validation", "none", "--test-time", str(test)]
    words += ["--items", str(day_one / "items.parquet")]
    shardrec(options, "prepare", "--events", str(second), "--output", str(day_two), *words)
    results = Results(options.output)
    for seed in options.seeds:
        for variant in options.variants:
            for steps in [0] if variant == "stale" else options.steps:
                measure(options, results, variant, steps, seed)
    print(summary(results))


def measure(
    options: argparse.Namespace, results: Results, variant: str, steps: int, seed: int
) -> None:
    """Append the row of one run of day 2, unless it is there."""
    key = {
        "log": options.log.stem,
        "recipe": options.recipe,
        "settings": options.set,
        "day_one": options.day_one,
        "test": options.test,
        "day_one_steps": None if variant == "cold" else options.day_one_steps,
        "variant": variant,
        "steps": steps,
        "seed": seed,
        "threads": options.threads,
    }
    if results.has(key):
        return
    day_two = options.work / "prepared-2"
    settings = [f"seed={seed}", "validation.every_epochs=none", "limits.max_epochs=none"]
    runs = options.work / "".join(c if c.isalnum() or c in "-._=" else "_" for c in chosen(options))
    runs.mkdir(exist_ok=True)
    former = runs / f"day-1-{options.day_one_steps}-{seed}"
    start = []
    if variant != "cold":
        length = f"limits.max_steps={options.day_one_steps}"
        trained(options, options.work / "prepared-1", former, *settings, length)
        start = ["--init-from", str(former)]
    # What a variant says comes last, so that it counts.
    own = [*settings, f"limits.max_steps={max(1, steps)}", *VARIANTS[variant]]
    parts = [*variant.replace(",", "").split(), key["day_one_steps"], steps, seed]
    name = "-".join(map(str, parts))
    run = trained(options, day_two, runs / name, *start, *own)
    row = judged(options, day_two, run)
    counts = read_manifest(day_two).counts
    row["new_targets"] = round(counts["test_targets_new_items"] / counts["test_targets"], 4)
    results.append(key, num_items=counts["items"], **row)


def summary(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| log | start | steps | seed | NDCG@10 | HR@10 | Coverage@10 | known NDCG@10 |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        key = row["key"]
        cells = [key["log"], key["variant"], key["steps"], key["seed"]]
        cells += [f"{row[name]:.4f}" for name in METRICS]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
