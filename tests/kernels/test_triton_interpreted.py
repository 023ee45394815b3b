"""Runs every file of ``interpreted/`` in a process of its own, where Triton interprets kernels.

The variable is read when a kernel is declared, so it must not reach the tests that compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A minute on one core, most of it in the interpreter.
pytestmark = pytest.mark.slow

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    root = file.parents[3]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=590)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]
