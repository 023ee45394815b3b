"""Time and memory of a training step compared with RePlay and RecTools, all else equal.

The same generated sequences, batch, length, width, blocks, heads, dropout, negatives and optimizer
(Adam); float32; every real target trained; each trainer in a process of its own. By default every
user has more events than the length, so that no trainer gains or loses by padding. Seconds per step
are medians of the time from the end of one step to the end of the next, data loading included, over
rounds in which the trainers take turns, because a machine is not equally fast all the time.

    pip install "torch==2.13.0"; pip install "replay-rec[torch]"                (in one venv)
    pip install "torch==2.13.0"; pip install "rectools[torch]" "pyarrow==23.0.1"  (in another)
    python benchmarks/peers.py --replay VENV/bin/python --rectools VENV2/bin/python --work peers
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent))
from losses import gemm_gflops
from record import RESULTS, Results, call_fresh, median

from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.prepared.loader import Prepared
from shardrec.pipeline.synth import SynthConfig, generate

FOLDER = Path(__file__).parent
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # row name: script, loss, options of ours
    "shardrec cce": ("shardrec", "full", {"loss": "cce"}),
    "shardrec cce_minus share=128": ("shardrec", "sampled", {"loss": "cce_minus"}),
    "shardrec cce_minus share=batch": ("shardrec", "sampled", {"loss": "cce_minus", "share": 0}),
    "RePlay CE": ("replay", "full", {}),
    "RePlay CESampled": ("replay", "sampled", {}),
    "RecTools softmax": ("rectools", "full", {}),
    "RecTools sampled_softmax": ("rectools", "sampled", {}),
}


def prepared_log(work: Path, users: int, items: int, spread: float) -> Path:
    """The prepared folder of the generated log, created if missing."""
    log = work / f"log-{users}-{items}-{spread:g}.parquet"
    folder = log.with_suffix("")
    if not log.exists():
        config = SynthConfig(
            users=users,
            items=items,
            events=users * 53,
            markov_events=0,
            length_spread=spread,
            # Nearly flat, so that nearly every item occurs: it does not change the speed.
            item_exponent=0.2,
            report_users=100,
        )
        generate(config, log)
    prepare(PrepareConfig(events=str(log), output=str(folder), split="leave_one_out"))
    sequences = sequences_of(folder)
    if not sequences.exists():
        sequences.parent.mkdir()
        tables = [pq.read_table(path) for path in Prepared.open(folder).train_files]
        # RePlay cannot have a column of the name "items".
        pq.write_table(pa.concat_tables(tables).rename_columns({"items": "item_id"}), sequences)
    return folder


def sequences_of(folder: Path) -> Path:
    """The training sequences of a prepared folder as the other trainers read them."""
    return folder.parent / f"{folder.name}-sequences" / "train.parquet"


def measure(name: str, folder: Path, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps in a fresh process; returns times, memory and losses."""
    which, loss, extra = TRAINERS[name]
    prepared = Prepared.open(folder)
    job = {
        "data": str(folder),
        "sequences": str(sequences_of(folder)),
        "num_items": prepared.num_items,
        "full": loss == "full",
        "batch": batch,
        "length": options.length,
        "width": options.width,
        "negatives": options.negatives,
        "threads": options.threads,
        "warmup": options.warmup,
        "steps": options.steps,
        **extra,
    }
    python = {"shardrec": sys.executable, "replay": options.replay, "rectools": options.rectools}
    # Libraries read the number of threads when they start.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    return call_fresh(str(FOLDER / f"peer_{which}.py"), job, python=python[which])


def main() -> None:
    """Run the missing measurements and print seconds and memory of each trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replay", help="python of the environment with RePlay")
    parser.add_argument("--rectools", help="python of the environment with RecTools")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="folder of the logs")
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--catalog", nargs="+", type=int, default=[20_000, 100_000])
    parser.add_argument("--batch", type=int, help="sequences (default: 128, from 100,000 items 32)")
    parser.add_argument("--spread", type=float, default=0.0, help="of the sequences' log-lengths")
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--output", default=str(RESULTS / "peers_cpu.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)  # for the rate of plain products
    results = Results(options.output)
    shape = ("users", "spread", "length", "width", "negatives", "threads")
    for catalog in options.catalog:
        batch = options.batch or (128 if catalog < 100_000 else 32)
        folder = prepared_log(options.work, options.users, catalog, options.spread)
        for turn in range(options.rounds):
            for name in available(options):
                key = {"trainer": name, "catalog": catalog, "batch": batch, "round": turn}
                key |= {part: getattr(options, part) for part in shape}
                if not results.has(key):
                    results.append(key, **row_of(name, folder, batch, options))
    print(summary(results))


def available(options: argparse.Namespace) -> list[str]:
    """The requested trainers that have an environment; prints which are left out."""
    lacking = [which for which in ("replay", "rectools") if not getattr(options, which)]
    for which in lacking:
        print(f"left out: no --{which} given")
    return [name for name in options.trainers if TRAINERS[name][0] not in lacking]


def row_of(name: str, folder: Path, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a trainer; for our full softmax also its share of the plain-product rate."""
    answer = measure(name, folder, batch, options)
    times = answer.pop("times_s")
    row = {"median_s": median(times), "times_s": times} | answer
    for part in ("peak", "import"):
        row[f"{part}_gib"] = round(row.pop(f"{part}_bytes") / 2**30, 3)
    if name == "shardrec cce":
        targets, width = answer["targets_per_step"], options.width
        row["gemm_gflops"] = round(gemm_gflops(int(targets), width), 1)
        flops = 6 * targets * answer["num_items"] * width
        row["share_of_gemm"] = round(flops / row["median_s"] / 1e9 / row["gemm_gflops"], 3)
    return row


def summary(results: Results) -> str:
    """The rows as a Markdown table, rounds together."""
    lines = [
        "| trainer | V | batch | s/step | peak GiB | of it imports | targets/step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    rounds: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        same = {name: value for name, value in row["key"].items() if name != "round"}
        rounds.setdefault(json.dumps(same), []).append(row)
    for written, rows in rounds.items():
        key, times = json.loads(written), [time for row in rows for time in row["times_s"]]
        peak, imports = (max(row[f"{part}_gib"] for row in rows) for part in ("peak", "import"))
        lines.append(
            f"| {key['trainer']} | {key['catalog']:,} | {key['batch']} | {median(times):.3f} "
            f"| {peak:.2f} | {imports:.2f} | {rows[0]['targets_per_step']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
