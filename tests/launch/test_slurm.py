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
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("data"))


def run(
    words: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, timeout=280
    )


def logs(folder: Path) -> str:
    """What the nodes wrote, for the message of a failed test."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("slurm-*")))


def parts(handle: str, environment: dict[str, str], folder: Path) -> set[tuple[str, str]]:
    """Node and state of each part of a job."""
    job = handle.rpartition("/")[2]
    words = ["sacct", "-n", "-P", "-X", "-j", job, "--format", "NodeList,State"]
    lines = run(words, environment, folder).stdout.split()
    return {(line.partition("|")[0], line.partition("|")[2]) for line in lines}


def test_two_nodes_train_as_one_process_does(
    cluster: dict[str, str], prepared: str, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert cli.main(["train", "--prepared", prepared, "--run", str(alone), *SMALL]) == 0
    submit = [str(BIN / "shardrec"), "launch", "-s", "slurm", "-cfg", "partition=test", "--wait"]
    job = ["train", "-j", "2x1", "--rdzv_port", str(free_port()), *SIZE]
    stage = ["--prepared", prepared, "--run", str(together), *SMALL]
    done = run([*submit, *job, "--", *stage], cluster, tmp_path)
    assert done.returncode == 0, done.stderr + logs(tmp_path)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    found = parts(done.stdout.split()[-1], cluster, tmp_path)
    assert found == {("node1", "COMPLETED"), ("node2", "COMPLETED")}


def test_torchx_submits_by_path_and_tells_how_a_job_failed(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    path = f"{ROOT}/launch/components.py:train"
    environment = cluster | {"PATH": f"{BIN}:{cluster['PATH']}"}
    submit = [str(BIN / "torchx"), "run", "--wait", "--workspace", "", "-s", "slurm", path]
    stage = ["--", "--prepared", str(tmp_path / "nothing"), "--run", str(tmp_path / "run")]
    done = run([*submit, *SIZE, *stage], environment, tmp_path)
    assert done.returncode != 0
    assert "FAILED" in done.stderr + done.stdout
    assert "nothing" in logs(tmp_path)
    handle = next(word for word in done.stdout.split() if word.startswith("slurm://"))
    assert {state for _, state in parts(handle, environment, tmp_path)} == {"FAILED"}
