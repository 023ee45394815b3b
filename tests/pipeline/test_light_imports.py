"""Configs, recipes and plans load no training stack."""

import subprocess
import sys

HEAVY = {"torchrec", "fbgemm_gpu", "matplotlib", "tensorboard", "mlflow", "triton"}
LIGHT = ("modules.catalog_config", "pipeline.run.config", "pipeline.recipes", "pipeline.plan")


def test_configs_recipes_and_plans_load_no_training_stack() -> None:
    modules = ", ".join(f"shardrec.{name}" for name in LIGHT)
    code = f"import sys, {modules}; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not HEAVY & set(found.stdout.split())
