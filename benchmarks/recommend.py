"""Users per second and peak memory of recommending, compared with RePlay and RecTools.

The same histories of equal length, width, blocks, heads, batch and k; items of the history are left
out; float32; random weights, because the speed does not depend on them; each in a process of its
own. The time is that of one call, from a model in memory and histories on the disk (RecTools: in
its data set) to lists on the disk (ours) or in a data frame (the others).

    python benchmarks/recommend.py --replay VENV/bin/python --rectools VENV2/bin/python --threads 2

`benchmarks/README.md` says how to make the two environments.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, call_fresh, run_logged

FOLDER = Path(__file__).parent
TRAINERS = ("shardrec", "replay", "rectools")
FIRST_STEP = (
    "loss=cce_minus",
    "catalog.optimizer=rowwise_adagrad",
    "encoder.num_heads=2",
    "limits.max_steps=1",
    "limits.max_epochs=none",
    "validation.every_epochs=none",
    "validation.patience=none",
    "show_progress=no",
)


def histories(folder: Path, users: int, catalog: int, length: int) -> Path:
    """Histories in which every item occurs; created if missing."""
    path = folder / "histories.parquet"
    if not path.exists():
        order = np.random.default_rng(1).permutation(catalog)
        values = np.resize(order, users * length).astype(np.int64)
        offsets = np.arange(users + 1, dtype=np.int32) * length
        lists = pa.ListArray.from_arrays(offsets, values)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"user_id": np.arange(users), "item_id": lists}), path)
    return path


def model_of(folder: Path, source: Path, options: argparse.Namespace) -> None:
    """A prepared folder and a run of one step on the events of the histories."""
    log = folder / "log.parquet"
    if not log.exists():
        items = pq.read_table(source).column("item_id").combine_chunks().flatten()
        users = np.repeat(np.arange(len(items) // options.length), options.length)
        times = np.tile(np.arange(options.length), len(items) // options.length)
        pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), log)
    data, run, said = str(folder / "prepared"), folder / "run", folder / "log.txt"
    stage = ["prepare", "--events", str(log), "--output", data, "--split", "leave_one_out"]
    run_logged([*SHARDREC, *stage], options.threads, said)
    if not (run / "checkpoints").exists():
        sizes = [f"encoder.width={options.width}", f"encoder.max_length={options.length}"]
        stage = ["train", "--prepared", data, "--run", str(run), *FIRST_STEP, *sizes]
        run_logged([*SHARDREC, *stage], options.threads, said)


def measure(name: str, catalog: int, options: argparse.Namespace) -> dict[str, Any]:
    """Recommend once in a fresh process; returns seconds and peak memory."""
    folder = options.work / f"{options.users}-{catalog}-{options.length}-{options.width}"
    source = histories(folder, options.users, catalog, options.length)
    if name == "shardrec":
        model_of(folder, source, options)
    sizes = ("users", "length", "width", "batch", "k", "threads")
    job = {size: getattr(options, size) for size in sizes}
    job |= {"folder": str(folder), "histories": str(source), "catalog": catalog}
    # Libraries read the number of threads when they start.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    python = getattr(options, name, None) or sys.executable
    answer = call_fresh(str(FOLDER / f"recommend_{name}.py"), job, python=python)
    answer["users_per_second"] = round(options.users / answer["seconds"], 1)
    answer["seconds"] = round(answer["seconds"], 3)
    for part in ("peak", "import"):
        answer[f"{part}_gib"] = round(answer.pop(f"{part}_bytes") / 2**30, 3)
    return answer


def main() -> None:
    """Run the missing measurements and print users per second and memory of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replay", help="python of the environment with RePlay")
    parser.add_argument("--rectools", help="python of the environment with RecTools")
    parser.add_argument("--work", type=Path, default=Path("runs/recommend"))
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--catalog", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--length", type=int, default=50, help="items of each history")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256, help="users at a time")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--output", default=str(RESULTS / "recommend_cpu.jsonl"))
    options = parser.parse_args()
    for catalog in options.catalog:
        if options.users * options.length < catalog:
            parser.error(f"--users times --length must be at least {catalog:,}; raise --users")
    results = Results(options.output)
    sizes = ("users", "length", "width", "batch", "k", "threads")
    for repeat in range(options.repeats):  # they take turns, so that a slow minute hits all
        for catalog in options.catalog:
            for name in options.trainers:
                if name != "shardrec" and not getattr(options, name):
                    print(f"left out {name}: no --{name} given")
                    continue
                key = {"trainer": name, "catalog": catalog, "repeat": repeat}
                key |= {size: getattr(options, size) for size in sizes}
                if not results.has(key):
                    results.append(key, **measure(name, catalog, options))
    print(summary(results))


def summary(results: Results) -> str:
    """Best users a second and largest peak of each, as a Markdown table."""
    lines = ["| | V | users/s | peak GiB | of it imports |", "|---|--:|--:|--:|--:|"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results.rows:
        groups.setdefault((row["key"]["trainer"], row["key"]["catalog"]), []).append(row)
    for (name, catalog), rows in groups.items():
        rate = max(row["users_per_second"] for row in rows)
        peak, imports = (max(row[f"{part}_gib"] for row in rows) for part in ("peak", "import"))
        lines.append(f"| {name} | {catalog:,} | {rate:,.0f} | {peak:.2f} | {imports:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
