"""Checkpoints: how long training stalls, how large they are, and how long resuming takes.

A table of V rows with its optimizer state, and a small encoder, saved as the trainer saves them.
While a checkpoint is written, steps of the table go on: how much slower they are is measured too.
The first checkpoint allocates the buffers of the copy, so it is reported separately. A file counts
as written once it is on the disk (fsync); reads come from the system's page cache.

    python benchmarks/checkpoint.py --items 100_000 1_000_000 4_000_000 --workers 1 2
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results, median, run_logged

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.launch.workers import process_group
from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder
from shardrec.pipeline.checkpoint.store import Checkpoints, CheckpointState
from shardrec.pipeline.checkpoint.writer import CheckpointWriter, writing_group

CPU = torch.device("cpu")


class Trained:
    """A table, an encoder and their optimizers, after a step."""

    def __init__(self, job: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        """Create them and take one step."""
        config = CatalogConfig(optimizer=job["optimizer"])
        self.catalog = Catalog(job["items"], job["width"], config, group=group, device=CPU, seed=1)
        self.encoder = TransformerEncoder(EncoderConfig(width=job["width"], max_length=50))
        self.optimizer = torch.optim.AdamW(self.encoder.parameters())
        for parameter in self.encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        generator = torch.Generator().manual_seed(Communicator(group).rank)
        self.looked_up = torch.randint(job["items"], (job["lookups"],), generator=generator)

    def step(self) -> float:
        """Seconds of a look-up, its backward and the update of the rows it touched."""
        started = time.perf_counter()
        self.catalog.lookup(self.looked_up).square().sum().backward()
        self.catalog.step()
        return time.perf_counter() - started

    def state(self) -> CheckpointState:
        """The checkpoint state that the trainer would save."""
        return CheckpointState(
            encoder=self.encoder.state_dict(),
            optimizer=self.optimizer.state_dict(),
            table=self.catalog.state_dict(),
            progress={"step": 1},
            config={},
        )

    def resume(self, checkpoints: Checkpoints) -> float:
        """Seconds to restore everything from the last checkpoint."""
        started = time.perf_counter()
        shard = self.catalog.shard
        found = checkpoints.load_last(range(shard.first_row, shard.first_row + len(shard.rows)))
        assert found is not None
        self.encoder.load_state_dict(dict(found[1].encoder))
        self.optimizer.load_state_dict(dict(found[1].optimizer))
        self.catalog.load_state_dict(found[1].table)
        return time.perf_counter() - started


def work(job: dict[str, Any]) -> None:
    """The work of one worker; rank 0 writes the answer to ``job['answer']``."""
    torch.set_num_threads(1)
    folder = Path(job["answer"]).parent / "checkpoints"
    with process_group() as (group, _):
        trained = Trained(job, group)
        quiet = [trained.step() for _ in range(job["steps"])]
        with writing_group(group) as writing:
            writer = CheckpointWriter(Checkpoints(folder, writing), background=True)
            reports, busy = [], []
            for step in range(1, job["repeats"] + 2):
                writer.save(step, trained.state(), best=False)
                busy.append(trained.step())
                reports += writer.collect()
        resumes = [trained.resume(Checkpoints(folder, group)) for _ in range(job["repeats"])]
        if Communicator(group).rank:
            return
    times = {
        "stall": [report.stall_seconds for report in reports[1:]],
        "write": [report.seconds - report.stall_seconds for report in reports[1:]],
        "resume": resumes,
        "step": quiet,
        "step_while_writing": busy[1:],
    }
    first = reports[0]
    answer = {"bytes": first.num_bytes, "first_stall_s": first.stall_seconds, "times_s": times}
    Path(job["answer"]).write_text(json.dumps(answer))


def measure(job: dict[str, Any], workers: int, folder: str | None) -> dict[str, Any]:
    """Run the workers; returns the answer of rank 0."""
    place = Path(tempfile.mkdtemp(dir=folder))
    job = job | {"answer": str(place / "answer.json")}
    command = [__file__, "--job", json.dumps(job)]
    if workers > 1:
        launcher = ["-P", "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(workers), *command]
    try:
        run_logged(command, 1, place / "log")
        answer: dict[str, Any] = json.loads(Path(job["answer"]).read_text())
    finally:
        shutil.rmtree(place)
    return answer


def main() -> None:
    """Run the missing measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", nargs="+", type=int, default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--optimizers", nargs="+", default=["rowwise_adagrad"], help="of the table")
    parser.add_argument("--lookups", type=int, default=100_000, help="items a step, of each worker")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed undisturbed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where checkpoints go (default: the temporary folder)")
    parser.add_argument("--output", default=str(RESULTS / "checkpoint_cpu.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(options.job)
        return
    results = Results(options.output)
    common = {name: getattr(options, name) for name in ("width", "lookups", "steps", "repeats")}
    for items in options.items:
        for optimizer in options.optimizers:
            for workers in options.workers:
                job = {"items": items, "optimizer": optimizer} | common
                if not results.has(job | {"workers": workers}):
                    record(results, job, workers, options.folder)
    print(summary(results))


def record(results: Results, job: dict[str, Any], workers: int, folder: str | None) -> None:
    """Measures one row and appends it."""
    answer = measure(job, workers, folder)
    times = answer.pop("times_s")
    medians = {f"{name}_s": median(values) for name, values in times.items()}
    results.append(job | {"workers": workers}, **medians, **answer, times_s=times)


def summary(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| items | optimizer | workers | MB | stall s | first stall s | write s | resume s "
        "| step s | step while writing s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results.rows:
        key = row["key"]
        lines.append(
            f"| {key['items']:,} | {key['optimizer']} | {key['workers']} "
            f"| {row['bytes'] / 1e6:,.0f} | {row['stall_s']:.3f} | {row['first_stall_s']:.3f} "
            f"| {row['write_s']:.2f} "
            f"| {row['resume_s']:.2f} | {row['step_s']:.3f} | {row['step_while_writing_s']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
