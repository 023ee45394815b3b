"""Training as a job of a real Slurm: two nodes, one worker on each, as one process trains.

`make test-slurm`; needs root and `apt-get install slurm-wlm slurmdbd munge mariadb-server`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.launch.test_runner import SMALL, free_port, losses
from tests.pipeline.small_data import prepare_small

from shardrec.launch import cli

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = Path(__file__).resolve().parent / "slurm" / "cluster.sh"
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
BIN = Path(sys.executable).parent
COMPONENT = f"{ROOT}/launch/components.py:train"
TORCHX = [str(BIN / "torchx"), "run", "--wait", "--workspace", "", "-s", "slurm"]
SIZE = ["--cpu", str(os.cpu_count()), "--memMB", "3000"]  # fills a node, so two jobs take two


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of somebody who submits to the cluster."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.getuid():
        pytest.fail(f"needs root and slurm-wlm slurmdbd munge mariadb-server; missing: {missing}")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([CLUSTER, "start", folder], check=True, timeout=300)
        path = f"{BIN}:{os.environ['PATH']}"
        own = {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PATH": path}
        yield os.environ | own
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["train", "--prepared", prepared, "--run", str(folder), *SMALL]) == 0
    return folder


def run(
    words: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, timeout=280
    )


def logs(folder: Path) -> str:
    """What the nodes wrote, for the message of a failed test."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("slurm-*")))


def handle_in(printed: str) -> str:
    """The name of the job that was submitted."""
    return next(word for word in printed.split() if word.startswith("slurm://"))


def parts(handle: str, environment: dict[str, str], folder: Path) -> set[tuple[str, str]]:
    """Node and state of each part of a job."""
    job = handle.rpartition("/")[2]
    words = ["sacct", "-n", "-P", "-X", "-j", job, "--format", "NodeList,State"]
    lines = run(words, environment, folder).stdout.split()
    return {(line.partition("|")[0], line.partition("|")[2]) for line in lines}


def test_torchx_submits_a_job_that_two_nodes_train_as_one_process_does(
    cluster: dict[str, str], prepared: str, alone: Path, tmp_path: Path
) -> None:
    trains_on_two_nodes([*TORCHX, "-cfg", "partition=test", COMPONENT], cluster, prepared, tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


def test_two_nodes_train_as_one_process_does(
    cluster: dict[str, str], prepared: str, alone: Path, tmp_path: Path
) -> None:
    submit = [str(BIN / "shardrec"), "launch", "-s", "slurm", "-cfg", "partition=test", "--wait"]
    trains_on_two_nodes([*submit, "train"], cluster, prepared, tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


def trains_on_two_nodes(
    submit: list[str], environment: dict[str, str], prepared: str, folder: Path
) -> None:
    """Submits one worker on each of two nodes and waits until both are done."""
    job = ["-j", "2x1", "--rdzv_port", str(free_port()), *SIZE]
    stage = ["--", "--prepared", prepared, "--run", str(folder / "run"), *SMALL]
    done = run([*submit, *job, *stage], environment, folder)
    assert done.returncode == 0, done.stderr + logs(folder)
    found = parts(handle_in(done.stdout), environment, folder)
    assert found == {("node1", "COMPLETED"), ("node2", "COMPLETED")}


def test_torchx_submits_by_path_and_tells_how_a_job_failed(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    stage = ["--", "--prepared", str(tmp_path / "nothing"), "--run", str(tmp_path / "run")]
    done = run([*TORCHX, COMPONENT, *SIZE, *stage], cluster, tmp_path)
    assert done.returncode != 0
    assert "FAILED" in done.stderr + done.stdout
    assert "nothing" in logs(tmp_path)
    assert {state for _, state in parts(handle_in(done.stdout), cluster, tmp_path)} == {"FAILED"}
