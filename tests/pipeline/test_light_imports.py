"""Configs, recipes and plans load no training stack."""

import subprocess
import sys

import pytest

HEAVY = ("torchrec", "fbgemm_gpu", "matplotlib", "tensorboard", "mlflow", "triton")


@pytest.mark.parametrize(
    "module",
    ["modules.catalog_config", "pipeline.plan", "pipeline.recipes", "pipeline.run.config"],
)
def test_a_module_loads_no_training_stack(module: str) -> None:
    code = f"import sys, shardrec.{module}; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(found.stdout.split())
