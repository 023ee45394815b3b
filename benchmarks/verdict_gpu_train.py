"""A verdict on whole training runs on one GPU: does a run of each loss live through all stages.

For each loss: half of the steps, an interrupt and its checkpoint, the other half resumed and
profiled, an evaluation over the whole catalog, an export that is opened and asked. Results are
lines of JSON in ``$OUT/verdict_gpu_train.jsonl`` while it runs: a failure is a line, and so is a
loss that the budget leaves out.

The GPU machine needs torch, fbgemm-gpu and torchrec of one release, tensordict, iopath, pyarrow,
torchmetrics and safetensors. Where it has no duckdb, prepare elsewhere and bring the folder:

    python benchmarks/verdict_gpu_train.py --prepare verdict_data    # here
    make verdict-gpu-train ARGS="--prepared verdict_data"            # on the GPU
    python benchmarks/verdict_gpu_train.py --toy                     # tiny, on a CPU
"""

import argparse
import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from verdict.lines import Lines

from shardrec.pipeline.config import override
from shardrec.pipeline.log.generator import SynthConfig
from shardrec.pipeline.recipes import recipe_named
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.interruption import Preempted
from shardrec.pipeline.train import TrainConfig, train

LOSSES = ("cce_minus", "cce", "sce", "rece", "hce")
LOG = SynthConfig(users=200_000, items=1_000_000, events=5_000_000)
TOY_LOG = SynthConfig(users=200, items=60, events=3_000, clusters=8, report_users=50)
# 2,048 sequences of up to 20 positions, about 32,000 positions a step.
OPTIONS = ("encoder.width=128", "batches.batch_size=2048")
TOY_OPTIONS = ("encoder.width=8", "batches.batch_size=16", "device=cpu")
TOY_LOSS = {"cce_minus": ("loss.num_negatives=8", "loss.share=4")}


class Losses(Callback):
    """The losses of the steps so far."""

    def __init__(self) -> None:
        """Starts with none."""
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        """Adds one."""
        self.seen.append(report.loss)


@dataclass(frozen=True)
class Job:
    """What is trained, and where."""

    prepared: Path
    folder: Path
    steps: int
    options: tuple[str, ...]

    def config(self, loss: str, *more: str) -> TrainConfig:
        """The config of a loss."""
        start = recipe_named("demo")(str(self.prepared), str(self.folder / loss))
        limits = ("limits.max_epochs=none", f"limits.max_steps={self.steps}")
        rest = ("validation.every_epochs=none", "validation.patience=none", "show_progress=false")
        return override(start, [f"loss={loss}", *limits, *rest, *self.options, *more])


def lived_through(job: Job, loss: str, *more: str) -> dict[str, Any]:
    """What training, resuming, evaluating and exporting found; raises where a stage fails."""
    from shardrec import evaluate, export

    run, losses = job.folder / loss, Losses()
    half = job.steps // 2
    config = job.config(loss, *more)
    with contextlib.suppress(Preempted):
        train(config, callbacks=[losses], interrupted=lambda: len(losses.seen) >= half)
    stopped = len(losses.seen)
    profiled = job.config(loss, *more, "profile.steps=3", "profile.warmup=2")
    end = train(profiled, callbacks=[losses], resume="yes")
    summary = (run / "profile" / "rank0.txt").read_text()
    if not (0 < stopped < end.step == len(losses.seen) == job.steps):
        raise RuntimeError(f"steps must be {job.steps}, got {stopped}, then {losses.seen}")
    metrics = dict(evaluate(run, job.prepared).metrics)
    model = export(run, job.prepared, job.folder / f"{loss}-export").open()
    return {
        "stopped_after": stopped,
        "ms_per_step": round(1000 * end.seconds_per_step, 3),
        "positions_per_s": round(end.positions_per_second),
        "peak_mib": end.memory_bytes >> 20,
        "skipped": end.num_skipped,
        "losses": [round(value, 4) for value in losses.seen],
        "metrics": metrics,
        "items": len(model.recommend([model.ids.of(np.arange(2)).to_pylist()], k=3)[0]),
        "profile": summary,
    }


def make_data(folder: Path, log: SynthConfig) -> Path:
    """A generated log, prepared; does nothing where it is there."""
    from shardrec import prepare
    from shardrec.pipeline.synth import generate

    generate(log, folder / "log.parquet")
    return Path(prepare(folder / "log.parquet", folder / "prepared").path)


def main() -> int:
    """Runs the losses; 0 if all of them lived through all stages, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, help="only make the data, in this folder")
    parser.add_argument("--prepared", type=Path, help="folder that --prepare has made")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=440.0, help="of the whole verdict")
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "verdict")))
    options = parser.parse_args()
    log = TOY_LOG if options.toy else LOG
    if options.prepare:
        make_data(options.prepare, log)
        return 0
    lines = Lines(options.out / "verdict_gpu_train.jsonl", options.seconds)
    has_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if has_gpu else "none"
    lines.say("begin", torch=torch.__version__, card=card)
    given: Path | None = options.prepared
    prepared = given / "prepared" if given else make_data(options.out / "data", log)
    folder = options.out / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    job = Job(prepared, folder, options.steps, TOY_OPTIONS if options.toy else OPTIONS)
    for loss in options.losses:
        more = TOY_LOSS.get(loss, ()) if options.toy else ()
        live = partial(lived_through, job, loss, *more)
        lines.attempt("train", {"loss": loss}, live, needs=30)
    bad = [row for row in lines.rows if row["kind"] == "train_failed"]
    lines.say("end", bad=len(bad), left_s=round(lines.left))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
