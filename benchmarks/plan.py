"""Compare the memory of a run with the estimate of `shardrec plan`.

Runs of a few steps as `shardrec train` makes them, on generated sequences without padding, with a
checkpoint in the background every second step. Measured is the peak of the whole process that used
most, interpreter and libraries included; planned is the peak that `shardrec plan` prints, with its
term for libraries. Libraries are most of a small process, so the table also compares what each run
needs more than one of 1,000 items does. Runs are made under glibc's default settings, and with a
fixed size from which freed blocks go back to the system (MALLOC_MMAP_THRESHOLD_=1000000). It is
memory and not time: other work on the machine does not disturb.

    python benchmarks/plan.py --items 1_000 100_000 1_000_000 --workers 1 2
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, peak_rss_since_reset, rss_bytes, run_logged

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.launch.workers import process_group
from shardrec.pipeline.config import override
from shardrec.pipeline.plan import Machine, plan
from shardrec.pipeline.prepared.loader import Prepared
from shardrec.pipeline.recipes import RECIPES
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.train import train

ALLOCATORS = {"default": {}, "threshold": {"MALLOC_MMAP_THRESHOLD_": "1000000"}}
SMALLEST = {"items": 1_000, "batch": 32, "length": 20}
MIB = 1 << 20


def prepared(work: Path, num_items: int, length: int) -> Path:
    """A prepared folder where every item is in one training sequence, none of them padded."""
    name = f"items-{num_items}-length-{length}"
    log, output = work / f"{name}.parquet", work / name
    if output.exists():
        return output
    num_users = -(-num_items // (length + 1))
    items = np.random.default_rng(1).permutation(num_users * (length + 1)) % num_items
    users = np.repeat(np.arange(num_users), length + 1)
    # One event in a hundred more, after the others: they are the test part.
    tested = np.arange(0, num_users, 5)
    columns = {
        "user_id": np.concatenate([users, tested]),
        "item_id": np.concatenate([items, tested]),
        "timestamp": np.arange(len(users) + len(tested)),
    }
    pq.write_table(pa.table(columns), log)
    words = ["prepare", "--events", str(log), "--output", str(output), "--validation", "none"]
    run_logged([*SHARDREC, *words, "--test-time", str(len(users))], 1, work / "log.txt")
    log.unlink()
    return output


def config_of(key: dict[str, Any], data: str, run: str) -> TrainConfig:
    """The training config of a row."""
    options = [
        f"loss={key['loss']}",
        f"encoder.width={key['width']}",
        f"encoder.max_length={key['length']}",
        f"encoder.kind={key['encoder']}",
        f"batches.batch_size={key['batch']}",
        f"catalog.optimizer={key['optimizer']}",
        f"limits.max_steps={key['steps']}",
        "validation.every_steps=none",
        "checkpoints.every_steps=2",
        "show_progress=false",
    ]
    return override(RECIPES["tiny_cpu"](data, run), options)


def work(job: dict[str, Any]) -> None:
    """The work of one worker: train, and write its peak and initial memory next to the run."""
    torch.set_num_threads(1)
    run = Path(job["run"])
    with process_group() as (group, _):
        before = rss_bytes()
        train(config_of(job["key"], job["data"], str(run)))
        answer = [peak_rss_since_reset(), before]
        run.with_name(f"peak-{Communicator(group).rank}").write_text(json.dumps(answer))


def measured_bytes(key: dict[str, Any], data: Path, folder: Path) -> tuple[int, int]:
    """Peak of the worker that used most, and what it held before it trained."""
    place = Path(tempfile.mkdtemp(dir=folder))
    job = {"key": key, "data": str(data), "run": str(place / "run")}
    command = [__file__, "--job", json.dumps(job)]
    if key["workers"] > 1:
        launcher = ["-P", "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(key["workers"]), *command]
    try:
        run_logged(command, 1, place / "log", ALLOCATORS[key["allocator"]])
        peak, before = max(json.loads(file.read_text()) for file in place.glob("peak-*"))
        return peak, before
    finally:
        shutil.rmtree(place)


def main() -> None:
    """Run the missing measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "sce", "rece"])
    parser.add_argument("--items", nargs="+", type=int, default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--batch", type=int, default=32, help="sequences of all workers together")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--encoder", default="sasrec")
    parser.add_argument("--optimizer", default="rowwise_adagrad", help="of the table")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/plan"))
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_cpu.jsonl")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(options.job)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.output)
    names = ("batch", "length", "width", "encoder", "optimizer", "steps")
    shape = {name: getattr(options, name) for name in names}
    for num_items in options.items:
        for loss in options.losses:
            for workers in options.workers:
                for allocator in options.allocators:
                    key = {"loss": loss, "items": num_items, "workers": workers}
                    measure(key | {"allocator": allocator} | shape, results, options.work)
    print(summary(results))


def measure(key: dict[str, Any], results: Results, folder: Path) -> None:
    """Append the row of one run, unless it exists."""
    if results.has(key):
        return
    data = prepared(folder, key["items"], key["length"])
    planned = plan(
        config_of(key, "none", "none"),
        Prepared.open(str(data)).num_items,
        Machine(ranks=key["workers"]),
    )
    measured, before = measured_bytes(key, data, folder)
    results.append(
        key,
        planned_bytes=planned.peak_bytes,
        measured_bytes=measured,
        before_bytes=before,
        planned_over_measured=round(planned.peak_bytes / measured, 4),
        terms=planned.memory,
    )


def summary(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| loss | items | batch | encoder | workers | allocator | planned MiB | measured MiB "
        "| difference | of what is more than for 1,000 items |",
        "|---|--:|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        key = row["key"]
        cells = [key["loss"], f"{key['items']:,}", f"{key['batch']} x {key['length']}"]
        cells += [key["encoder"], key["workers"], key["allocator"]]
        cells += [f"{row[f'{name}_bytes'] / MIB:.0f}" for name in ("planned", "measured")]
        cells += [f"{row['planned_over_measured'] - 1:+.0%}", growth(results, row)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def growth(results: Results, row: dict[str, Any]) -> str:
    """Relative error of the plan in %, after subtracting the run of 1,000 items."""
    smallest = results.find(row["key"] | SMALLEST)
    if smallest is None or smallest is row:
        return ""
    planned, measured = (
        row[f"{name}_bytes"] - smallest[f"{name}_bytes"] for name in ("planned", "measured")
    )
    return f"{planned / measured - 1:+.0%}"


if __name__ == "__main__":
    main()
