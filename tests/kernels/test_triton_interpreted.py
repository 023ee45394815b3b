"""Runs every file of ``interpreted/`` in a process of its own, where Triton interprets kernels.

The variable is read when a kernel is declared, so it must not reach the tests that compile.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from tests.side_by_side import asked_for, side_by_side

# Minutes on one core, most of them in the interpreter.
pytestmark = pytest.mark.slow

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


Run = subprocess.CompletedProcess[str]


def interpret(file: Path) -> Run:
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
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        command, cwd=file.parents[3], env=env, capture_output=True, text=True, timeout=590
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future[Run]]]:
    with side_by_side(interpret, asked_for(request, "file")) as started:
        yield started


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_in_the_interpreter(file: Path, runs: dict[Path, Future[Run]]) -> None:
    run = runs[file].result()
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]
