"""Imports go one way: launch → pipeline → modules → kernels. Stages load no more than they need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "modules", "pipeline", "launch")

# Packages from outside that a layer may name; a layer that is not here may use any.
ALLOWED_PACKAGES = {"kernels": {"torch", "triton"}}
# Packages from outside that a layer must leave to another.
FORBIDDEN_PACKAGES = {"modules": {"pyarrow", "duckdb", "torchx"}, "pipeline": {"triton", "torchx"}}


# Packages whose names change with each version, so that one file alone may use them.
ADAPTED_PACKAGES = {"torchrec", "fbgemm", "fbgemm_gpu"}
ADAPTER = "modules/torchrec_adapter.py"
# The one file below launch/ that reads the environment: its key concerns every reader.
SIGNING = "pipeline/outputs/signing.py"

# What a module may load in a fresh process. "only": these packages, and what they load by
# themselves; "without": any but these packages and modules.
TRAINING = {
    "torchrec",
    "fbgemm_gpu",
    "torchmetrics",
    "matplotlib",
    "tensorboard",
    "mlflow",
    "triton",
}
LOADS: dict[str, dict[str, set[str]]] = {
    "shardrec.pipeline.prepare": {"only": {"numpy", "pyarrow.parquet", "duckdb"}},
    "shardrec.pipeline.publish": {"only": set()},
    "shardrec.pipeline.served.pointer": {"only": set()},
    "shardrec.pipeline.serve": {
        "only": {"torch", "numpy", "pyarrow.parquet", "safetensors"},
        "without": TRAINING | {"torch.distributed.checkpoint"},
    },
    "shardrec.pipeline.gate": {"without": TRAINING | {"torch.distributed.checkpoint"}},
}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violation(layer: str, name: str) -> str | None:
    """Why a file of ``layer`` may not import ``name``; None when it may."""
    top, _, rest = name.partition(".")
    if name in ("shardrec", "shardrec.__version__"):
        return None
    if top == "shardrec":
        target = rest.partition(".")[0]
        if target not in LAYERS:
            return f"{name} is not in one of {LAYERS}"
        if LAYERS.index(target) > LAYERS.index(layer):
            return f"{layer} must not import {name}, which stands above it"
        return None
    if top in sys.stdlib_module_names:
        return None
    if top in LAYERS:
        return f"write shardrec.{name}"
    if layer in ALLOWED_PACKAGES and top not in ALLOWED_PACKAGES[layer]:
        return f"{layer} may import only {sorted(ALLOWED_PACKAGES[layer])}, got {name}"
    if top in FORBIDDEN_PACKAGES.get(layer, ()):
        return f"{layer} must leave {top} to another layer"
    return None


def reads_environment(tree: ast.AST) -> bool:
    """Whether the file touches ``os.environ`` or ``os.getenv``."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(node.attr in ("environ", "getenv", "putenv") for node in attributes)


def adapted_names(source: str) -> list[str]:
    """What a file takes from the adapted packages: imports, and operators under ``torch.ops``."""
    tree = ast.parse(source)
    found = {name for name in imported_names(tree) if name.partition(".")[0] in ADAPTED_PACKAGES}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return sorted(found | attributes & ADAPTED_PACKAGES)


def violations(layer: str, source: str, where: str) -> list[str]:
    tree = ast.parse(source)
    found = [reason for name in imported_names(tree) if (reason := violation(layer, name))]
    if layer != "launch" and where != SIGNING and reads_environment(tree):
        found.append("environment variables are read in launch only")
    return [f"{where}: {reason}" for reason in found]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_import_goes_down(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files, f"{layer} has no files: the walk looks in the wrong place"
    found = [
        line
        for file in files
        for line in violations(layer, file.read_text(), str(file.relative_to(ROOT)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("layer", "source", "words"),
    [
        ("kernels", "from shardrec.modules import losses", "stands above"),
        ("modules", "import shardrec.pipeline.train", "stands above"),
        ("pipeline", "def late():\n    from shardrec.launch import cli", "stands above"),
        ("kernels", "import torchrec", "may import only"),
        ("kernels", "import numpy as np", "may import only"),
        ("modules", "import pyarrow.parquet as pq", "another layer"),
        ("modules", "from kernels import cut_cross_entropy", "write shardrec.kernels"),
        ("pipeline", "import os\nthreads = os.environ['OMP_NUM_THREADS']", "launch only"),
    ],
)
def test_a_planted_violation_is_found(layer: str, source: str, words: str) -> None:
    (found,) = violations(layer, source, "planted.py")
    assert words in found


def test_torchrec_and_fbgemm_are_used_in_one_file() -> None:
    folders = (*LAYERS, "benchmarks", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)): adapted_names(file.read_text()) for file in files}
    assert len(found.pop(ADAPTER)) > 5
    assert not {where: names for where, names in found.items() if names}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torchrec", "torchrec"),
        ("def late():\n    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor", "jagged"),
        ("if True:\n    import fbgemm_gpu.split_embedding_configs as c", "split_embedding"),
        ("import torch\ny = torch.ops.fbgemm.asynchronous_complete_cumsum(x)", "fbgemm"),
    ],
)
def test_a_planted_use_of_torchrec_or_fbgemm_is_found(source: str, name: str) -> None:
    (found,) = adapted_names(source)
    assert name in found


def test_a_downward_import_passes() -> None:
    source = "import math\nimport torch\nfrom shardrec.kernels import cut_cross_entropy\n"
    assert violations("modules", source, "planted.py") == []


ONLY_TORCH = """
import subprocess
import sys
from importlib.abc import MetaPathFinder
import torch, torch._dynamo  # what torch itself brings along is its own affair

class OnlyTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("torch", "shardrec"):
            raise ImportError(f"{name} is not installed here")

for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
    del sys.modules[name]
sys.meta_path.insert(0, OnlyTorch())
from shardrec.kernels import *
x, w = torch.ones(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
y = torch.arange(3)
loss = cut_cross_entropy(x, w, y) + sampled_cross_entropy(x, w, y, num_negatives=2, seed=0)
loss = loss + scalable_cross_entropy(x, w, y, seed=0) + reduced_cross_entropy(x, w, y, seed=0)
loss.backward()
assert "triton" not in sys.modules, "triton was imported and no kernel launched"
"""


@pytest.mark.slow
def test_the_losses_run_where_nothing_but_torch_is_installed() -> None:
    run = subprocess.run([sys.executable, "-P", "-c", ONLY_TORCH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


LOADED = """
import importlib, sys
module, *only = sys.argv[1:]
for name in only:
    importlib.import_module(name)
before = {name.partition(".")[0] for name in sys.modules}
importlib.import_module(module)
new = {name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names
print(*(name for name in new if name != "shardrec" and not name.startswith("_")))
print(*sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", LOADS)
def test_a_stage_loads_only_what_it_needs(module: str) -> None:
    only, without = LOADS[module].get("only"), LOADS[module].get("without", set())
    command = [sys.executable, "-P", "-c", LOADED, module, *sorted(only or ())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    new, loaded = (set(line.split()) for line in done.stdout.split("\n")[:2])
    assert only is None or not new, f"{module} loads {sorted(new)}"
    assert not loaded & without, f"{module} loads {sorted(loaded & without)}"
