"""Speed-up of a step with two workers over one, and its share of communication.

One thread a worker and the same global batch, so that half the time is ideal. Seconds per step are
medians; the share of communication is that of the time in which a collective is in flight on rank
0, waiting for the other rank included, from a profile of the steps after the timed ones.

    python benchmarks/scaling.py PREPARED --losses cce cce_minus sce rece --workers 1 2
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results, median, run_logged

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.launch.workers import process_group
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import LOSSES
from shardrec.pipeline.prepared.loader import BatchConfig, Prepared
from shardrec.pipeline.run.callbacks import StepReport
from shardrec.pipeline.run.config import LimitConfig, TrainConfig, ValidationConfig
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
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def on_step(self, report: StepReport) -> None:
        """Notes a step."""
        (self.seconds if report.step in self.timed else []).append(report.seconds)
        self.positions.append(report.positions)
        self.memory_bytes = report.memory_bytes
        if report.step == self.timed.stop - 1:
            self._profile.start()
        elif report.step >= self.timed.stop:
            self.profiled_seconds.append(report.seconds)
        if report.step == self.last:
            self._profile.stop()

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


def work(job: dict[str, Any]) -> None:
    """The work of one worker; rank 0 writes the answer to ``job['answer']``."""
    torch.set_num_threads(1)
    probe = Probe(job["warmup"], job["steps"], job["profiled"])
    folder = Path(job["answer"]).parent / "run"
    loss: Any = LOSSES[job["loss"]]()  # one of those that TrainConfig names
    config = TrainConfig(
        data=job["data"],
        output=str(folder),
        loss=loss,
        catalog=CatalogConfig(optimizer=job["optimizer"]),
        encoder=EncoderConfig(width=job["width"], max_length=job["length"], num_heads=2),
        batches=BatchConfig(batch_size=job["batch"]),
        limits=LimitConfig(max_epochs=None, max_steps=probe.last),
        validation=ValidationConfig(every_epochs=None),
        show_progress=False,
    )
    with process_group() as (group, _):
        train(config, callbacks=[probe])
        if Communicator(group).rank:
            return
    answer = {
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
        for workers in options.workers:
            key = {"loss": loss, "workers": workers, "data": Path(options.data).name} | shape
            if results.has(key):
                continue
            answer = measure(shape | {"loss": loss, "data": options.data}, workers)
            times = answer.pop("times_s")
            answer = {name: round(value, 4) for name, value in answer.items()}
            results.append(
                key, num_items=num_items, median_s=median(times), times_s=times, **answer
            )
    print(summary(results))


def summary(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| loss | workers | s/step | against 1 worker | communication | GiB a worker |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        alone = results.find(row["key"] | {"workers": 1}) or row
        lines.append(
            f"| {row['key']['loss']} | {row['key']['workers']} | {row['median_s']:.3f} "
            f"| {row['median_s'] / alone['median_s']:.2f} | {row['communication_share']:.0%} "
            f"| {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
