"""The metrics on the oldest torchmetrics they support, which torchrec's metadata pins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "1.0.3"
UNREACHABLE = "after connection broken by"  # what pip says when no index answers
METRICS = Path(__file__).with_name("test_metrics.py")


@pytest.mark.slow
def test_metrics_give_the_same_numbers_on_the_oldest_torchmetrics(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "2"]
    done = subprocess.run(
        [*install, "--target", str(tmp_path), f"torchmetrics=={OLDEST}"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    if done.returncode != 0 and UNREACHABLE in done.stderr:
        pytest.skip(f"torchmetrics {OLDEST} must be downloaded, and no package index answers")
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    version = [sys.executable, "-P", "-c", "import torchmetrics; print(torchmetrics.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == OLDEST
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(METRICS)]
    subprocess.run(command, env=environment, check=True, timeout=300)
