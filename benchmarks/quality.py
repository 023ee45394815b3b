r"""Quality, time and memory of each loss on a log.

Runs the public stages, prepare, train and evaluate, for every loss, seed and setting, and appends
one row each. A loss may carry options: ``sce:items_per_bucket=512,mix=false``.

    python benchmarks/quality.py beauty.parquet --prepare split=leave_one_out --recipe beauty \
        --losses cce cce_minus sce rece --seeds 1 2 3
    python benchmarks/quality.py epinions.parquet --prepare test_time=10000000 --recipe epinions \
        --losses cce cce_minus sce rece eager_ce --workers 2
    python benchmarks/quality.py beauty.parquet --prepare split=leave_one_out --recipe beauty \
        --losses cce --cut-table-gradient --require NDCG@10=0.05     # must fail
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, run_logged

from shardrec.launch.cli import main as shardrec
from shardrec.modules.losses import LOSSES
from shardrec.pipeline.prepared.loader import Prepared

METRICS = ("NDCG@10", "HitRate@10", "Coverage@10", "NDCG@10/known")
PROTOCOLS = {
    "test": ["--no-filter-seen", "--min-count", "0"],
    "test_unseen": ["--filter-seen", "--min-count", "0"],
}


def cut_table_gradient() -> None:
    """Detach the table in every loss, so that it gets no gradient, as in two public ports."""
    for loss in LOSSES.values():
        original = loss.__call__

        def cut(self, states, table, *arguments, original=original, **options):  # type: ignore
            table = dataclasses.replace(table, rows=table.rows.detach())
            return original(self, states, table, *arguments, **options)

        loss.__call__ = cut  # type: ignore[method-assign]


def overrides(loss: str, seed: int, settings: list[str]) -> list[str]:
    """Dotted options of one run; ``cce_minus:share=1`` names a loss with options of its own."""
    name, _, own = loss.partition(":")
    return [f"loss={name}", *(f"loss.{o}" for o in own.split(",") if o), f"seed={seed}", *settings]


def run_once(key: dict[str, Any], options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train and evaluate in fresh processes; returns metrics, time and memory."""
    settings = overrides(key["loss"], key["seed"], key["settings"])
    name = "-".join(
        [data.name, *settings, f"w{key['workers']}", "cut" * options.cut_table_gradient]
    )
    run = options.work / "".join(c if c.isalnum() or c in "-._" else "_" for c in name)[:200]
    shutil.rmtree(run, ignore_errors=True)
    log = run.parent / f"{run.name}.log"
    stage = ["train", "--prepared", str(data), "--run", str(run), "--recipe", options.recipe]
    if options.workers > 1:
        threads = f"OMP_NUM_THREADS={options.threads}"
        stage = [
            "launch",
            "train",
            "-j",
            f"1x{options.workers}",
            "--env",
            threads,
            "--",
            *stage[1:],
        ]
    cut = ["--cut-table-gradient"] if options.cut_table_gradient else []
    # This script again, as the command, so that it can cut the gradient.
    command = [__file__, "--shardrec", *cut, *stage, *settings]
    run_logged(command, options.threads, log)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    end = next(line for line in lines if line["event"] == "end")
    validations = [line for line in lines if line["event"] == "validation"]
    row: dict[str, Any] = {name: end[name] for name in ("reason", "epoch", "step", "seconds")}
    row["seconds_per_step"] = round(end["seconds_per_step"], 4)
    row["peak_gib"] = round(end["memory_bytes"] / 2**30, 3)
    row["padding_share"] = round(end["padding_share"], 3)
    row["validation"] = [
        [round(line["epoch"], 2), round(line["metrics"]["NDCG@10"], 5)] for line in validations
    ]
    for part, flags in PROTOCOLS.items():
        stage = ["evaluate", "--prepared", str(data), "--run", str(run), "--force", *flags]
        run_logged([*SHARDREC, *stage], options.threads, log)
        metrics = json.loads((run / "metrics.json").read_text())["metrics"]
        row[part] = {name: round(metrics[name], 5) for name in METRICS}
    if not options.keep_runs:
        shutil.rmtree(run)
    return row


def main() -> None:
    """Run the missing measurements and print the table."""
    if sys.argv[1:2] == ["--shardrec"]:
        arguments = sys.argv[2:]
        if arguments[0] == "--cut-table-gradient":
            cut_table_gradient()
            arguments = arguments[1:]
        sys.exit(shardrec(arguments))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="event Parquet")
    parser.add_argument("--prepare", nargs="*", default=[], help="options of prepare: name=value")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "sce", "rece"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--set", nargs="*", default=[], help="options of train: dotted.name=value")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--cut-table-gradient", action="store_true", help="the loss must then fail")
    parser.add_argument("--require", default="", help="METRIC=VALUE; exit 1 where a row is below")
    parser.add_argument("--judge", choices=PROTOCOLS, default="test_unseen", help="for the table")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--keep-runs", action="store_true")
    parser.add_argument("--output", type=Path, help="default: results/quality_NAME.jsonl")
    options = parser.parse_args()
    if options.cut_table_gradient and options.workers > 1:
        parser.error("--cut-table-gradient reaches one worker only; leave --workers at 1")
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "-".join(["prepared", options.log.stem, *options.prepare])
    pairs = [pair.split("=", 1) for pair in options.prepare]
    flags = [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]
    prepare = ["prepare", "--events", str(options.log), "--output", str(data), *flags]
    run_logged([*SHARDREC, *prepare], options.threads, options.work / "prepare.log")
    results = Results(options.output or RESULTS / f"quality_{options.log.stem}.jsonl")
    for seed in options.seeds:
        for loss in options.losses:
            key = {
                "log": options.log.stem,
                "prepare": options.prepare,
                "recipe": options.recipe,
                "loss": loss,
                "seed": seed,
                "settings": options.set,
                "workers": options.workers,
                "threads": options.threads,
                "cut_table_gradient": options.cut_table_gradient,
            }
            if not results.has(key):
                items = {"num_items": Prepared.open(data).num_items}
                results.append(key, **items, **run_once(key, options, data))
    print(summary(results, options.judge))
    sys.exit(failures(results, options))


def failures(results: Results, options: argparse.Namespace) -> int:
    """1 if a row of these losses and settings is below a required value."""
    metric, _, least = options.require.partition("=")
    asked = [
        row
        for row in results.rows
        if row["key"]["loss"] in options.losses
        and row["key"]["settings"] == options.set
        and row["key"]["cut_table_gradient"] == options.cut_table_gradient
    ]
    below = [row for row in asked if least and row[options.judge][metric] < float(least)]
    for row in below:
        print(f"{row['key']['loss']}: {metric} {row[options.judge][metric]} is below {least}")
    return 1 if below else 0


def summary(results: Results, judge: str) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| loss | seed | settings | NDCG@10 | HR@10 | Coverage@10 | known NDCG@10 "
        "| epochs | s | s/step | GiB |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        key, metrics = row["key"], row[judge]
        cells = [key["loss"] + " (cut)" * key["cut_table_gradient"], key["seed"]]
        cells += [" ".join(key["settings"]), *(f"{metrics[name]:.4f}" for name in METRICS)]
        cells += [f"{row['epoch']:.0f}", f"{row['seconds']:.0f}"]
        cells += [f"{row['seconds_per_step']:.3f}", f"{row['peak_gib']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
