"""The benchmark of the GPU holds the kernels to their definitions before it times anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_its_checks_pass_at_toy_size_in_float32_and_bfloat16() -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "losses_gpu.py"
    run = subprocess.run([sys.executable, script, "--toy"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for dtype in ("float32", "bfloat16"):
        assert run.stdout.count(f"in torch.{dtype}: as its definition") == 4, run.stdout
