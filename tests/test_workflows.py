"""The hosted workflows use words of the Makefile, and sets and Pythons that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardrec.launch.setup_env import NEWEST_PYTHON, OLDEST_PYTHON, matching_sets

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text())["jobs"])


def test_there_is_a_workflow_for_changes_and_one_for_releases() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_an_action_of_a_named_version_or_a_command(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in jobs(path).values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w/-]+@(v\d+|release/v\d+)", step.get("uses", "a@v1"))
            assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= targets


def test_the_tests_run_on_pythons_and_sets_that_make_setup_knows() -> None:
    matrix = jobs(ROOT / ".github" / "workflows" / "ci.yml")["test"]["strategy"]["matrix"]
    rows = [*matrix["include"], *({"python": one, "torch": "2.13"} for one in matrix["python"])]
    assert {row["torch"] for row in rows} | set(matrix["torch"]) <= set(matching_sets())
    for row in rows:
        major, minor = map(int, row["python"].split("."))
        assert OLDEST_PYTHON <= (major, minor) <= NEWEST_PYTHON


def test_the_parts_of_the_tests_are_all_of_them() -> None:
    test = jobs(ROOT / ".github" / "workflows" / "ci.yml")["test"]
    parts = test["strategy"]["matrix"]["part"]
    *named, rest = re.findall(r"'(tests[^']*)'", test["env"]["PATHS"])
    assert len(parts) == len(named) + 1
    folders = [folder for paths in named for folder in paths.split()]
    assert all((ROOT / folder).is_dir() for folder in folders)
    assert rest.split() == ["tests", *(f"--ignore={folder}" for folder in folders)]


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/**/*.yml")), ids=lambda path: path.stem)
def test_every_form_and_workflow_has_a_name(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["name"]
