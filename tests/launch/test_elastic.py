"""Workers are killed for real, and the run ends as if nothing had happened."""

import dataclasses
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.launch.killing import (
    TARGETS,
    Job,
    Kill,
    assert_same_end,
    kill_at_random,
    kill_during_a_write,
    last_step,
    last_whole,
    lines,
    stage,
    stopped,
    train_undisturbed,
    until,
    wait_for_workers,
)
from tests.pipeline.small_data import prepare_small
from tests.ranks import Ranks

from shardrec.launch import cli, components
from shardrec.launch.orphans import logs_of_launch

STEPS = 90
# A checkpoint is written when it is asked for, and never else.
ENDLESS = ["limits.max_steps=1_000_000", "validation.every_steps=none"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("data"))


def options(steps: int) -> list[str]:
    return [f"limits.max_steps={steps}", "checkpoints.every_steps=2", "validation.every_steps=25"]


@pytest.fixture(scope="module")
def undisturbed(data: str, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks(2).run(train_undisturbed, stage(data, run, *options(STEPS)))
    return run


@pytest.mark.slow
def test_a_run_killed_twice_and_preempted_ends_as_if_nothing_had_happened(
    data: str, undisturbed: Path, ranks: Ranks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = stage(data, run, *options(STEPS))
    killed = []
    with Job(words, tmp_path / "log", max_restarts=2) as job:
        for number, rank in enumerate((1, 0)):
            victims = [wait_for_workers(job)[rank]]
            killed.append(kill_during_a_write(run, job, victims, after_step=10 + 16 * number))
            for _ in until(60, "step after the restart", job):
                if len(lines(run, "resume")) > number and last_step(run) > 16 + 16 * number:
                    break
        job.process.send_signal(signal.SIGTERM)
        assert job.end(timeout=40) == 75, job.said()
    said = job.said().splitlines()
    assert any("[0]:" in line and "step" in line for line in said), "rank 0's progress is shown"
    assert not any("PYTHONSAFEPATH" in line for line in said)
    restarts = [line["step"] for line in lines(run, "resume")]
    assert len(restarts) == 2
    for step, name in zip(restarts, killed, strict=True):
        assert 0 < step < int(name.removeprefix("step-"))

    stopped = last_step(run)
    assert stopped < STEPS and not (run / "end.json").exists()
    assert f"shardrec launch: the run stopped after step {stopped}" in job.said()
    ranks(2).run(train_undisturbed, words)
    resumed = lines(run, "resume")[-1]
    assert resumed["step"] == stopped, "the checkpoint was of the step at which the ranks agreed"
    assert_same_end(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "number"), [("launcher", 1), ("torchrun", 1), ("both", 2)])
def test_workers_end_with_a_checkpoint_when_what_started_them_is_killed(
    lost: str, number: int, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, run = tmp_path / "logs", tmp_path / "run"
    logs.mkdir()
    monkeypatch.setenv("TMPDIR", str(logs))
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    words = stage(data, run, *ENDLESS)
    with Job(words, tmp_path / "log", workers=number) as job:
        workers = wait_for_workers(job)
        for _ in until(60, "step", job):
            if last_step(run) > 3:
                break
        torchrun = psutil.Process(workers[0].ppid())
        with stopped(workers.values()):  # so that it is still held when another one starts
            assert cli.main(["train", *words]) == 75, "busy: try again"
        for name, process in (("torchrun", torchrun), ("launcher", job.process)):
            if lost in (name, "both"):
                process.kill()
        job.process.wait(40)
        gone, alive = psutil.wait_procs([*workers.values(), torchrun], timeout=40)
        assert not alive
    assert last_whole(run) == last_step(run) > 3, "the last step is in a checkpoint"
    with logs_of_launch() as folder:
        assert list(logs.glob("shardrec-launch-*")) == [folder], "those of the dead are removed"
    assert not list(logs.glob("torchx_*"))


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_of_a_launch(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = stage(data, run, *ENDLESS)
    with Job(words, tmp_path / "log") as job:
        for _ in until(60, "step", job):
            if last_step(run) > 3:
                break
        job.process.send_signal(signal.SIGINT)
        assert job.end(timeout=40) == 130, job.said()
    assert "shardrec launch: Ctrl-C: the workers are asked to end" in job.said()
    assert f"shardrec launch: the run stopped after step {last_step(run)}" in job.said()
    assert last_whole(run) == last_step(run) > 3
    with Job(words, tmp_path / "log") as job:
        workers = wait_for_workers(job)
        for worker in workers.values():  # they cannot answer
            worker.suspend()
        job.process.send_signal(signal.SIGINT)
        time.sleep(1)
        job.process.send_signal(signal.SIGINT)
        assert job.end(timeout=20) == 130, job.said()
        assert not psutil.wait_procs(workers.values(), timeout=20)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 1), (signal.SIGHUP, 1), (signal.SIGKILL, 2)]
)
def test_plain_torchrun_leaves_a_checkpoint_however_it_ends(
    number: signal.Signals, workers: int, data: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run"]
    ours = ["-m", "shardrec.launch.cli", "--", "train", *stage(data, run, *ENDLESS)]
    words = [*torchrun, "--nproc-per-node", str(workers), *ours]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while last_step(run) <= 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= workers
        process.send_signal(number)
        process.wait(40)
        _, alive = psutil.wait_procs(children, timeout=40)
    finally:
        process.kill()
        process.wait()
    assert not alive, (tmp_path / "log").read_text()[-3000:]
    assert last_whole(run) == last_step(run) > 3, (tmp_path / "log").read_text()[-3000:]


def test_workers_are_started_again_only_where_they_may_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--prepared", "data", "--run", "run"]
    assert cli.main(["launch", "train", "-j", "1x2", "--max_restarts", "1", "--", *words]) == 2
    said = capsys.readouterr().err
    assert "--resume=auto must follow the --" in said and said.count("\n") == 1
    app = components.train("--run", "run", "--resume=auto", j="1x2", max_restarts=3, grace=60)
    assert app.roles[0].env["PET_MAX_RESTARTS"] == "3"
    assert app.roles[0].env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "65"


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_kills_of_workers_and_launchers_lose_nothing(
    data: str, ranks: Ranks, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, seed = (int(request.config.getoption(name)) for name in ("--kills", "--kills-seed"))
    run, whole, rng = tmp_path / "run", tmp_path / "whole", random.Random(seed)
    settings = options(1000 + 100 * count)
    ranks(2).run(train_undisturbed, stage(data, whole, *settings), timeout=1800)
    kills: list[Kill] = []
    with Job(stage(data, run, *settings), tmp_path / "log", max_restarts=count) as job:
        for _ in until(60, "checkpoint", job):
            if last_whole(run):
                break
        while len(kills) < count:
            kills.append(kill_at_random(run, job, rng))
            print(f"kill {len(kills)} of {count}: {kills[-1]}", flush=True)
        assert job.end(timeout=1800) == 0, job.said()
    assert all(kill.resumed >= kill.whole for kill in kills), "a whole checkpoint was passed over"
    assert {kill.target for kill in kills} == set(TARGETS) or count < 20
    assert_same_end(run, whole)
    # One line, which benchmarks/kills.py reads.
    print(json.dumps(figures(kills)))


def figures(kills: list[Kill]) -> dict[str, Any]:
    """What the kills cost, and each of them."""
    seconds = [kill.seconds for kill in kills]
    return {
        "kills": len(kills),
        "of": dict(Counter(kill.target for kill in kills)),
        "during_a_write": sum(kill.moment == "write" for kill in kills),
        "in_a_step": sum(kill.moment == "step" for kill in kills),
        "at_the_start": sum(kill.moment == "start" for kill in kills),
        "steps_taken_again": sum(max(0, kill.step - kill.resumed) for kill in kills),
        "seconds_to_next_step_median": statistics.median(seconds),
        "seconds_to_next_step_most": max(seconds),
        "bit_equal_to_undisturbed": True,  # the test ended here otherwise
        "each": [dataclasses.asdict(kill) for kill in kills],
    }
