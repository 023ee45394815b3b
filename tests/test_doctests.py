"""The examples in docstrings are run, every one of them."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "modules", "pipeline", "launch")


def examples_in(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(line.lstrip().startswith(">>> ") for line in lines)


FILES = [
    path.relative_to(ROOT)
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
    if examples_in(path)
]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_examples_of_a_file_print_what_they_say(file: Path) -> None:
    if "spark" in file.parts:
        pytest.importorskip("pyspark")
    parts = file.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = importlib.import_module(f"shardrec.{name}")
    results = doctest.testmod(module)
    assert not results.failed, "the lines above say which"
    # The finder of doctest passes over functions that a decorator has made into something else.
    assert results.attempted == examples_in(ROOT / file)


def test_files_with_examples_are_found() -> None:
    assert {file.parts[0] for file in FILES} == set(LAYERS)
