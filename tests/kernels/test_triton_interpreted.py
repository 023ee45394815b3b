"""Runs the files of ``interpreted/`` in processes of their own, where Triton interprets kernels.

The variable is read when a kernel is declared, so it must not reach the tests that compile. Two
processes share the files: each imports PyTorch and Triton once.
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


def interpret(part: int) -> Run:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *map(str, FILES[part::2])],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[int, Future[Run]]]:
    with side_by_side(interpret, asked_for(request, "part")) as started:
        yield started


@pytest.mark.parametrize("part", [0, 1])
def test_kernels_in_the_interpreter(part: int, runs: dict[int, Future[Run]]) -> None:
    run = runs[part].result()
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]
