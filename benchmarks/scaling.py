"""Speed-up of a step with two workers over one, and its share of communication.

One thread a worker and the same global batch, so that half the time is ideal. Seconds per step are
medians; the share of communication is that of the time in which a collective is in flight on rank
0, waiting for the other rank included, from a profile of the steps after the timed ones.

    python benchmarks/scaling.py PREPARED --losses cce cce_minus sce rece --workers 1 2

With ``--layouts`` the workers are replicas x shards and a step is two batches of half the size; CPU
seconds of all workers and the bytes that a rank sends by group are counted too, because on a
machine with fewer cores than workers seconds say nothing.

    python benchmarks/scaling.py PREPARED --layouts 1x1 1x2 2x1 2x2
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "tests"))
from group_traffic import Traffic, counted_traffic  # type: ignore[import-not-found]
from record import RESULTS, Results, median, run_logged

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.launch.workers import process_group
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import LOSSES
from shardrec.pipeline.prepared.loader import BatchConfig, Prepared
from shardrec.pipeline.run.callbacks import StepReport
from shardrec.pipeline.run.config import (
    LimitConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.step import StepOutcome, Stepper
from shardrec.pipeline.train import train


class Probe:
    """Times ``steps`` steps after a warm-up, then profiles ``profiled`` more."""

    def __init__(self, warmup: int, steps: int, profiled: int) -> None:
        """Starts before the first step."""
        self.timed = range(warmup + 1, warmup + steps + 1)
        self.last = self.timed.stop - 1 + profiled
        self.seconds: list[float] = []
        self.profiled_seconds: list[float] = []
        self.positions: list[int] = []
        self.memory_bytes = 0
        self.cpu_seconds = 0.0
        self.traffic: Traffic = Counter()
        self._counting = contextlib.ExitStack()
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def on_step(self, report: StepReport) -> None:
        """Notes a step."""
        (self.seconds if report.step in self.timed else []).append(report.seconds)
        self.positions.append(report.positions)
        self.memory_bytes = report.memory_bytes
        if report.step == self.timed.start - 1:
            self.cpu_seconds = -time.process_time()
        if report.step == self.timed.stop - 1:
            self.cpu_seconds += time.process_time()
            self._profile.start()
            self.traffic = self._counting.enter_context(counted_traffic())
        elif report.step >= self.timed.stop:
            self.profiled_seconds.append(report.seconds)
        if report.step == self.last:
            self._profile.stop()
            self._counting.close()

    def on_validation(self, report: Any) -> None:
        """Nothing to note."""

    def on_checkpoint(self, report: Any) -> None:
        """Nothing to note."""

    def on_end(self, report: Any) -> None:
        """Nothing to note."""

    def communication_seconds(self) -> float:
        """Time in which at least one collective was in flight in the profiled steps."""
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            if event.name.startswith(("gloo:", "nccl:"))
        )
        total, reached = 0.0, 0.0
        for start, end in spans:
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total / 1e6

    def bytes_sent(self, job: dict[str, Any]) -> dict[str, float]:
        """Of a step: by this rank, to those that share its table, to its copies, to all.

        With one shard the copies are all ranks, and count as copies.
        """
        sent: Counter[str] = Counter()
        for (ranks, _), number in self.traffic.items():
            if len(ranks) > 1:
                distance = ranks[1] - ranks[0]
                if (len(ranks), distance) == (job["shards"], 1):
                    sent["shards"] += number
                elif (len(ranks), distance) == (job["replicas"], job["shards"]):
                    sent["replicas"] += number
                else:
                    sent["all ranks"] += number
        return {name: number / len(self.profiled_seconds) for name, number in sent.items()}


def send_ids_late() -> None:
    """Makes a step send its own ids at its start, not those of the next during its backward."""
    take = Stepper.take

    def late(self: Stepper, batches: Any, step: int, flags: Any, _: Any) -> StepOutcome:
        return take(self, batches, step, flags)

    mock.patch.object(Stepper, "take", late).start()


def work(job: dict[str, Any]) -> None:
    """The work of one worker; rank 0 writes the answer to ``job['answer']``."""
    torch.set_num_threads(1)
    if job["late_ids"]:
        send_ids_late()
    probe = Probe(job["warmup"], job["steps"], job["profiled"])
    folder = Path(job["answer"]).parent / "run"
    loss: Any = LOSSES[job["loss"]]()  # one of those that TrainConfig names
    config = TrainConfig(
        data=job["data"],
        output=str(folder),
        loss=loss,
        catalog=CatalogConfig(optimizer=job["optimizer"]),
        encoder=EncoderConfig(width=job["width"], max_length=job["length"], num_heads=2),
        batches=BatchConfig(batch_size=job["batch"] // job["accumulate"]),
        optimizer=OptimizerConfig(accumulate=job["accumulate"]),
        parallel=ParallelConfig(shards=job["shards"]),
        limits=LimitConfig(max_epochs=None, max_steps=probe.last),
        validation=ValidationConfig(every_epochs=None),
        show_progress=False,
    )
    with process_group() as (group, _):
        train(config, callbacks=[probe])
        cpu = torch.tensor(probe.cpu_seconds / len(probe.timed))
        if group is not None:
            dist.all_reduce(cpu, group=group)
        if Communicator(group).rank:
            return
    answer: dict[str, Any] = {
        "cpu_s": float(cpu),
        "sent": probe.bytes_sent(job),
        "times_s": probe.seconds,
        "communication_share": probe.communication_seconds() / sum(probe.profiled_seconds),
        "peak_gib": probe.memory_bytes / 2**30,
        "positions_per_step": sum(probe.positions) / len(probe.positions),
    }
    Path(job["answer"]).write_text(json.dumps(answer))


def measure(job: dict[str, Any], workers: int) -> dict[str, Any]:
    """Run the workers; returns the answer of rank 0."""
    folder = Path(tempfile.mkdtemp())
    job = job | {"answer": str(folder / "answer.json")}
    command = [__file__, "--job", json.dumps(job)]
    if workers > 1:
        launcher = ["-P", "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(workers), *command]
    run_logged(command, 1, folder / "log")
    answer: dict[str, Any] = json.loads(Path(job["answer"]).read_text())
    shutil.rmtree(folder)
    return answer


def main() -> None:
    """Run the missing measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="folder of `shardrec prepare`")
    parser.add_argument("--losses", nargs="+", default=["cce", "cce_minus", "sce", "rece"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layouts", nargs="+", help="replicas x shards, such as 2x1")
    parser.add_argument("--late-ids", action="store_true", help="of each step at its start")
    parser.add_argument("--batch", type=int, default=128, help="sequences of all workers together")
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--optimizer", default="rowwise_adagrad", help="of the table")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--profiled", type=int, default=5)
    parser.add_argument("--output", default=str(RESULTS / "scaling_cpu.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(options.job)
        return
    results = Results(options.output)
    names = ("batch", "length", "width", "optimizer", "warmup", "steps", "profiled")
    shape = {name: getattr(options, name) for name in names}
    num_items = Prepared.open(options.data).num_items
    for loss in options.losses:
        for name, layout in layouts(options):
            key = {"loss": loss, **name, "data": Path(options.data).name} | shape
            key |= {"late_ids": True} if options.late_ids else {}
            if results.has(key):
                continue
            job = shape | layout | {"loss": loss, "data": options.data}
            job |= {"late_ids": options.late_ids}
            answer = measure(job, layout["replicas"] * layout["shards"])
            times, sent = answer.pop("times_s"), answer.pop("sent")
            answer = {name: round(value, 4) for name, value in answer.items()}
            figures = {"median_s": median(times), "times_s": times, "sent": sent, **answer}
            results.append(key, num_items=num_items, **figures)
    print(layout_summary(results) if options.layouts else summary(results))


def layouts(options: argparse.Namespace) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """What names each layout in a row, and its sizes."""
    if not options.layouts:
        return [
            ({"workers": one}, {"replicas": 1, "shards": one, "accumulate": 1})
            for one in options.workers
        ]
    found = []
    for one in options.layouts:
        replicas, shards = map(int, one.split("x"))
        sizes = {"replicas": replicas, "shards": shards, "accumulate": 2}
        found.append(({"layout": one}, sizes))
    return found


def layout_summary(results: Results) -> str:
    """The rows with a layout as a Markdown table."""
    groups = ("shards", "replicas", "all ranks")
    lines = [
        "| loss | replicas x shards | CPU s/step, all workers | communication | MB sent by a rank "
        f"to its {' | '.join(groups)} |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        if "layout" in row["key"]:
            sent = " | ".join(f"{row['sent'].get(name, 0) / 1e6:.2f}" for name in groups)
            layout = row["key"]["layout"] + ", late ids" * row["key"].get("late_ids", False)
            cost = f"{row['cpu_s']:.3f} | {row['communication_share']:.0%}"
            lines.append(f"| {row['key']['loss']} | {layout} | {cost} | {sent} |")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| loss | workers | s/step | against 1 worker | communication | GiB a worker |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        if "layout" in row["key"]:
            continue
        alone = results.find(row["key"] | {"workers": 1}) or row
        lines.append(
            f"| {row['key']['loss']} | {row['key']['workers']} | {row['median_s']:.3f} "
            f"| {row['median_s'] / alone['median_s']:.2f} | {row['communication_share']:.0%} "
            f"| {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
