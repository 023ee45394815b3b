"""Kills for real: starts jobs, finds their workers, kills them, and compares how they end."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from shardrec.launch.commands import read_train
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.train import train

CLI = [sys.executable, "-P", "-m", "shardrec.launch.cli"]
# Dropout, validations, more than one epoch, the optimizer with the most memory: all must come back.
RECIPE = ("--recipe", "tiny_cpu", "catalog.optimizer=adam", "batches.batch_size=20", "log_every=1")


def stage(data: str, run: Path, *options: str) -> list[str]:
    """What follows the ``--`` of a training job."""
    return ["--prepared", data, "--run", str(run), "--resume=auto", *RECIPE, *options]


class Job:
    """``shardrec launch train`` with two workers or one, and the lines it has written."""

    def __init__(
        self, words: list[str], log: Path, max_restarts: int = 0, workers: int = 2
    ) -> None:
        self.log, self.num_workers = log, workers
        component = ["-j", f"1x{workers}", "--max_restarts", str(max_restarts), "--cpu", "2"]
        self.command = [*CLI, "launch", "train", *component, "--", *words]
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        """A launcher, whose lines follow those of the one before."""
        with self.log.open("a") as file:
            return subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def workers(self) -> dict[int, psutil.Process]:
        """Its workers that live, by rank."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
                    if child.status() != psutil.STATUS_ZOMBIE and "cli" in str(child.cmdline()):
                        found[int(child.environ()["RANK"])] = child
        return found

    def said(self) -> str:
        return self.log.read_text()

    def end(self, timeout: float) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end:\n{self.said()[-4000:]}") from None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers().values():
            worker.kill()
        self.process.kill()
        self.process.wait()


def until(seconds: float, what: str, job: Job) -> Iterator[None]:
    """Goes round until somebody leaves the loop; fails when time is over or the job has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert job.process.poll() is None, f"ended before {what}:\n{job.said()[-4000:]}"
        yield
        time.sleep(0.005)  # the workers need the core
    raise AssertionError(f"no {what} in {seconds} s:\n{job.said()[-4000:]}")


def kill_during_a_write(
    run: Path, job: Job, victims: Sequence[psutil.Process], after_step: int = 0
) -> str:
    """SIGKILL processes while a checkpoint has no manifest yet; the name of that checkpoint.

    Both workers are stopped first, so that it is certain that the manifest was not written.
    """
    checkpoints, workers = run / "checkpoints", wait_for_workers(job)
    for _ in until(60, "unfinished checkpoint", job):
        if newest(checkpoints) <= f"step-{after_step:08d}":
            continue
        with stopped(workers.values()):
            name = newest(checkpoints)
            if not (checkpoints / name / "manifest.json").exists():
                for victim in victims:
                    victim.kill()
                return name
    raise AssertionError


@contextlib.contextmanager
def stopped(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Processes that stand still in a ``with``."""
    for process in processes:
        process.suspend()
    for process in processes:
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def wait_for_workers(job: Job) -> dict[int, psutil.Process]:
    for _ in until(60, f"{job.num_workers} workers", job):
        if len(workers := job.workers()) == job.num_workers:
            return workers
        time.sleep(0.05)
    raise AssertionError


def newest(checkpoints: Path) -> str:
    """The last checkpoint, complete or not; "" where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return max(os.listdir(checkpoints), default="")
    return ""


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    """Whole lines of the metrics."""
    with contextlib.suppress(FileNotFoundError):
        read = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in read if line.endswith("\n")]
        return [line for line in found if line["event"] == event]
    return []


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run, "step")), default=0)


def train_undisturbed(words: list[str]) -> None:
    """The same run in the processes of the test pool."""
    _, config = read_train(words)
    train(config, resume="auto")


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """Table, encoder, optimizers, losses and metrics bit by bit, and every step told once."""
    found, expected = (
        load_checkpoint(Checkpoints(folder / "checkpoints", None).find("last"))
        for folder in (run, undisturbed)
    )
    whole, rows = found.tensors()
    theirs = {name: one for part in expected.tensors() for name, one in part.items()}
    assert theirs.keys() == (whole | rows).keys()
    for name, value in (whole | rows).items():
        assert torch.equal(value, theirs[name]), name
    for event, names in (("step", ("step", "loss")), ("validation", ("step", "metrics"))):
        told = [
            [tuple(line[name] for name in names) for line in lines(folder, event)]
            for folder in (run, undisturbed)
        ]
        assert told[0] == told[1], event
    ends = [json.loads((folder / "end.json").read_text()) for folder in (run, undisturbed)]
    assert [end["step"] for end in ends] == [ends[1]["step"]] * 2
    assert ends[0]["best_metrics"] == ends[1]["best_metrics"]


@dataclass(frozen=True, slots=True)
class Kill:
    """What was killed when, and how the run went on.

    Attributes:
        target: "worker", "torchrun", "launcher", or "all" of them.
        rank: of the worker; None where it was no worker alone.
        moment: "write" of a checkpoint, "step", or "start" of the workers.
        step: the last one told before.
        whole: step of the last whole checkpoint before; 0 where there was none.
        resumed: step from which the run went on.
        seconds: from the kill to the next step told.
    """

    target: str
    rank: int | None
    moment: str
    step: int
    whole: int
    resumed: int
    seconds: float


TARGETS = ("worker", "worker", "launcher", "torchrun", "all")


def kill_at_random(run: Path, job: Job, rng: random.Random) -> Kill:
    """SIGKILL something at a random moment, start a lost launcher again, and wait for a step."""
    workers, step, starts = wait_for_workers(job), last_step(run), len(lines(run, "resume"))
    target, rank = rng.choice(TARGETS), rng.randrange(2)
    moment = rng.choice(["write", "step", "step", "start"])
    everybody = [
        psutil.Process(job.process.pid),
        psutil.Process(workers[0].ppid()),
        *workers.values(),
    ]
    victims = {"worker": [workers[rank]], "launcher": everybody[:1], "torchrun": everybody[1:2]}
    hit = victims.get(target, everybody)
    if moment == "write":
        kill_during_a_write(run, job, hit, step)
    else:
        wanted = step + rng.randint(1, 60)
        for _ in until(60, f"step {wanted}", job) if moment == "step" else ():
            if last_step(run) >= wanted:
                break
        time.sleep(rng.uniform(0, 0.05 if moment == "step" else 6))
        for victim in hit:
            victim.kill()
    killed_at, step, whole = time.time(), last_step(run), last_whole(run)
    if target != "worker":
        job.process.wait(60)
        assert not psutil.wait_procs(everybody[1:], timeout=60)[1], "they train on"
        job.process = job.start()
    for _ in until(120, "step after a restart", job):
        if len(lines(run, "resume")) > starts and lines(run, "step")[-1]["time"] > killed_at:
            break
    resumed = int(lines(run, "resume")[-1]["step"])
    seconds = lines(run, "step")[-1]["time"] - killed_at
    own_rank = rank if target == "worker" else None
    return Kill(target, own_rank, moment, step, whole, resumed, seconds)


def last_whole(run: Path) -> int:
    """Step of the last complete checkpoint; 0 where there is none."""
    manifests = (run / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=0)
