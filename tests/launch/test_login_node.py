"""A CUDA environment on a machine without a driver, where fbgemm does not load."""

import json
import subprocess
import sys

import pytest

WITHOUT_DRIVER = """
import contextlib, io, json, sys

class NoDriver:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fbgemm_gpu", "torchrec"):
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")

sys.meta_path.insert(0, NoDriver())
from shardrec.launch.cli import main

ended = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    ended.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""

HELP = (["--help"], ["train", "--help"], ["gate", "--help"])
PLAN = "plan --num-items 1000000 --ranks 8 --device cuda --recipe large_catalog".split()
GATE = "gate --run none --prepared none --published none.json".split()
TRAIN = "train --prepared none --run none".split()

Ended = list[tuple[int, str, str]]
"""Exit code, output and errors of each command."""


def shardrec(*commands: list[str]) -> Ended:
    """Commands one after another, in one process."""
    command = [sys.executable, "-P", "-c", WITHOUT_DRIVER, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def ended() -> Ended:
    return shardrec(*HELP, PLAN, GATE, TRAIN)


def test_help_needs_no_driver(ended: Ended) -> None:
    for code, out, err in ended[:3]:
        assert code == 0 and "usage: shardrec" in out, err


def test_a_plan_needs_no_driver(ended: Ended) -> None:
    code, out, err = ended[3]
    assert code == 0, err
    assert "peak" in out


def test_a_gate_fails_for_its_inputs_and_not_for_the_driver(ended: Ended) -> None:
    code, _, err = ended[4]
    assert code == 2 and "nvidia" not in err


def test_training_says_what_is_missing(ended: Ended) -> None:
    code, _, err = ended[5]
    assert code == 1
    assert err.count("\n") == 1
    assert "libnvidia-ml.so.1" in err and "driver" in err


@pytest.mark.slow
def test_a_job_for_gpu_nodes_can_be_described() -> None:
    words = ["-s", "slurm", "--dryrun", "train", "-j", "2x8", "--gpu", "8", "--"]
    ((code, out, err),) = shardrec(["launch", *words, "--prepared", "p", "--run", "r"])
    assert code == 0, err
    assert "--gpus-per-task=8" in out
