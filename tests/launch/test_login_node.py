"""A CUDA environment on a machine without a driver, where fbgemm does not load."""

import subprocess
import sys

import pytest

WITHOUT_DRIVER = """
import sys

class NoDriver:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fbgemm_gpu", "torchrec"):
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")

sys.meta_path.insert(0, NoDriver())
from shardrec.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""
# Several commands that end well, in one process.
HELP = (
    WITHOUT_DRIVER.rpartition("\nsys.exit")[0]
    + """
for words in (["--help"], ["train", "--help"], ["gate", "--help"]):
    assert main(words) == 0, words
"""
)


def shardrec(*words: str, code: str = WITHOUT_DRIVER) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_plan_needs_no_driver() -> None:
    words = ["plan", "--num-items", "1000000", "--ranks", "8", "--device", "cuda"]
    done = shardrec(*words, "--recipe", "large_catalog")
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stdout


def test_help_needs_no_driver() -> None:
    done = shardrec(code=HELP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 3


def test_a_gate_fails_for_its_inputs_and_not_for_the_driver() -> None:
    words = ["gate", "--run", "none", "--prepared", "none", "--published", "none.json"]
    done = shardrec(*words)
    assert done.returncode == 2 and "nvidia" not in done.stderr


@pytest.mark.slow
def test_a_job_for_gpu_nodes_can_be_described() -> None:
    words = ["-s", "slurm", "--dryrun", "train", "-j", "2x8", "--gpu", "8", "--"]
    done = shardrec("launch", *words, "--prepared", "p", "--run", "r")
    assert done.returncode == 0, done.stderr
    assert "--gpus-per-task=8" in done.stdout


def test_training_says_what_is_missing() -> None:
    done = shardrec("train", "--prepared", "none", "--run", "none")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "libnvidia-ml.so.1" in done.stderr and "driver" in done.stderr
