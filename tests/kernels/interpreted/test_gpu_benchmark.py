"""The benchmark of the GPU holds the kernels to their definitions before it times anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_its_checks_pass_at_toy_size() -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "losses_gpu.py"
    run = subprocess.run([sys.executable, script, "--toy"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("of its definition") == 4, run.stdout
