"""What a Slurm job is asked for, and what its states mean; test_slurm.py runs jobs for real."""

import os
from pathlib import Path

import pytest
from torchx.specs import AppState

from shardrec.launch.runner import Job, describe, wait
from shardrec.launch.slurm import create_scheduler, sentence

STAGE = ("--", "--prepared", "data", "--run", "run")


def script(*words: str, component: str = "train") -> list[str]:
    """The lines of the script that would be submitted."""
    job = Job(component=component, arguments=words, scheduler="slurm", settings="partition=test")
    return describe(job).splitlines()


def line_of(lines: list[str], beginning: str) -> str:
    return next(line for line in lines if line.startswith(beginning))


def test_srun_keeps_the_cpus_of_the_job() -> None:
    lines = script("-j", "1x8", "--cpu", "64", *STAGE)
    assert "--cpus-per-task=64" in line_of(lines, "#SBATCH")
    assert "--cpus-per-task=64" in line_of(lines, "srun")


def test_a_variable_with_commas_reaches_the_workers_whole() -> None:
    given = "NCCL_IB_HCA=mlx5_0,mlx5_1,NCCL_DEBUG=INFO"
    lines = script("-j", "2x1", "--env", given, *STAGE)
    assert "export NCCL_IB_HCA=mlx5_0,mlx5_1" in lines
    assert "NCCL_DEBUG=INFO" in line_of(lines, "srun") and "mlx5" not in line_of(lines, "srun")
    assert lines.index("export NCCL_IB_HCA=mlx5_0,mlx5_1") < lines.index("set +e")


def test_only_a_job_that_can_start_twice_is_put_back_in_the_queue() -> None:
    assert "--no-requeue" in line_of(script(*STAGE), "#SBATCH")
    other = ("--", "--prepared", "train", "--run", "run")
    for lines in (script(*STAGE, "--resume=auto"), script(*other, component="evaluate")):
        assert " --requeue" in line_of(lines, "#SBATCH")


def test_a_job_that_may_lose_nodes_is_not_ended_by_the_first() -> None:
    lines = script("-j", "2:4x8", "--max_restarts", "9", *STAGE, "--resume=auto")
    assert len([line for line in lines if " --no-kill" in line and "#SBATCH" in line]) == 4
    srun = line_of(lines, "srun")
    assert "--no-kill" in srun and "--kill-on-bad-exit=0" in srun and "--wait=0" in srun
    assert "--nnodes 2:4 --nproc_per_node 8" in srun
    assert "--kill-on-bad-exit=1" in line_of(script("-j", "4x8", *STAGE), "srun")


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose lines a program named sacct prints."""
    states, program = tmp_path / "states", tmp_path / "sacct"
    program.write_text(f"#!/bin/sh\ncat {states}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return states


@pytest.mark.parametrize(
    ("parts", "state", "message"),
    [
        (["COMPLETED", "COMPLETED"], AppState.SUCCEEDED, "COMPLETED"),
        (["CANCELLED by 1000", "COMPLETED"], AppState.CANCELLED, "CANCELLED by 1000"),
        (["RUNNING", "FAILED"], AppState.RUNNING, "RUNNING"),
        (["COMPLETED", "OUT_OF_MEMORY"], AppState.FAILED, "OUT_OF_MEMORY"),
        (["LAUNCH_FAILED"], AppState.FAILED, "LAUNCH_FAILED"),
        (["NEW_IN_SLURM_30", "FAILED"], AppState.UNKNOWN, "NEW_IN_SLURM_30"),
        ([], AppState.PENDING, "PENDING"),
    ],
)
def test_every_state_is_taken(sacct: Path, parts: list[str], state: AppState, message: str) -> None:
    sacct.write_text("".join(f"{part}\n" for part in parts))
    found = create_scheduler("test").describe("7")
    assert (found.state, found.msg) == (state, message)


def test_a_cancelled_job_is_told_in_one_sentence(sacct: Path) -> None:
    sacct.write_text("CANCELLED by 1000\n")
    assert wait("slurm://torchx/7") == "CANCELLED by 1000: it was cancelled"
    sacct.write_text("COMPLETED\n")
    assert wait("slurm://torchx/7") == ""


@pytest.mark.parametrize(
    ("state", "way_out"),
    [("TIMEOUT", "-cfg time="), ("OUT_OF_MEMORY", "--memMB"), ("PREEMPTED", "--resume=auto")],
)
def test_an_end_names_the_way_out(state: str, way_out: str) -> None:
    assert way_out in sentence(state)
