"""The benchmark of the GPU holds the kernels to their definitions before it times anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_its_checks_pass_at_toy_size_in_float32_and_bfloat16() -> None:
    here = Path(__file__).parent
    script = here.parents[2] / "benchmarks" / "losses_gpu.py"
    code = "import runpy, shortcuts; shortcuts.take_shortcuts(); "
    code += f"runpy.run_path({str(script)!r}, None, '__main__')"
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{here}"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, "--toy"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for dtype in ("float32", "bfloat16"):
        assert run.stdout.count(f"in torch.{dtype}: as its definition") == 4, run.stdout
