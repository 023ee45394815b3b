"""The example DAG, run by Dagster: a day that publishes, a day again, a day that is refused."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pytest
from tests.pipeline.small_data import write_log

from shardrec.launch.cli import main
from shardrec.pipeline.serve import Recommender

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "daily_dagster.py"
SMALL = ["--recipe", "tiny_cpu", "show_progress=false", "encoder.max_length=8"]
GOOD = [*SMALL, "limits.max_steps=60", "catalog.learning_rate=0.5", "validation.every_steps=20"]
POOR = [*SMALL, "limits.max_steps=1", "validation.every_steps=none"]
STAGES = ["prepared", "trained", "evaluated", "gate", "lists", "exported", "published"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("daily_dagster", EXAMPLE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days of events: the second has more users."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "logs").mkdir()
    for day, num_users in [("2026-11-19", 97), ("2026-11-20", 120)]:
        write_log(folder / "logs" / f"{day}.parquet", num_users=num_users)
    return folder


@pytest.fixture(scope="module")
def first_day(example: ModuleType, root: Path) -> Any:
    return run_day(example, root, "2026-11-19", GOOD)


def run_day(
    example: ModuleType, root: Path, day: str, model: list[str], workers: str = "1x1"
) -> Any:
    shop = example.Shop(root=str(root), model=model, workers=workers)
    return dg.materialize(
        example.ASSETS,
        partition_key=day,
        resources={"shop": shop},
        instance=dg.DagsterInstance.ephemeral(),
        raise_on_error=False,
    )


def finished(result: Any) -> list[str]:
    """The stages that ended well, in order."""
    return [event.step_key for event in result.all_events if event.is_step_success]


def stamps(root: Path) -> dict[str, int]:
    """When each file was written."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_a_good_day_is_published_and_served(first_day: Any, root: Path) -> None:
    assert first_day.success and sorted(finished(first_day)) == sorted(STAGES)
    pointer = json.loads((root / "published.json").read_text())
    assert pointer["current"] == 1
    assert pointer["publications"][0]["export"] == "days/2026-11-19/export"
    assert pointer["publications"][0]["lists"] == "days/2026-11-19/lists"
    (listed,) = Recommender.open(root / "published.json").recommend([[3, 9, 4]], k=5)
    assert len(listed) == 5


def test_a_day_that_is_run_again_does_nothing_and_says_so(
    first_day: Any,
    example: ModuleType,
    root: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = stamps(root)
    assert run_day(example, root, "2026-11-19", GOOD).success
    said = capfd.readouterr().out + caplog.text
    assert said.count("nothing to do") + said.count("nothing was done") == len(STAGES)
    assert stamps(root) == before


def test_a_refused_day_publishes_nothing_and_rollback_needs_a_day_before(
    first_day: Any, example: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / "published.json").read_bytes()
    result = run_day(example, root, "2026-11-20", POOR)
    assert not result.success
    assert finished(result) == ["prepared", "trained", "evaluated"]
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert failure.step_key == "gate"
    assert "the model must not be published" in str(failure.event_specific_data)
    assert (root / "published.json").read_bytes() == before
    assert not (root / "days" / "2026-11-20" / "export").exists()
    assert main(["rollback", "--published", str(root / "published.json")]) == 2
    assert "publication before number 1, got none" in capsys.readouterr().err
