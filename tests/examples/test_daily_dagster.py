"""The example DAG, run by Dagster: a day that publishes, a day again, a day that is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from tests.pipeline.small_data import write_log
from tests.ranks import Ranks

from shardrec.launch.cli import main
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.served.pointer import read_published

# An orchestrator that runs whole days.
pytestmark = pytest.mark.slow

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
    example: ModuleType,
    root: Path,
    day: str,
    model: list[str],
    *,
    workers: str = "1x1",
    stages: tuple[str, ...] = tuple(STAGES),
) -> Any:
    shop = example.Shop(root=str(root), model=model, workers=workers)
    return dg.materialize(
        example.ASSETS,
        selection=dg.AssetSelection.assets(*stages),
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
    caplog.set_level("INFO", "shardrec.pipeline.run.resume")
    assert run_day(example, root, "2026-11-19", GOOD).success
    shown = capfd.readouterr()
    said = shown.out + shown.err + caplog.text
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


@pytest.fixture(scope="module")
def copied(first_day: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same day, with its lists and export removed."""
    copied = tmp_path_factory.mktemp("two") / "shop"
    shutil.copytree(root, copied)
    for name in ("lists", "export"):
        shutil.rmtree(copied / "days" / "2026-11-19" / name)
    return copied


@pytest.fixture(scope="module")
def lists(example: ModuleType, copied: Path) -> Path:
    """Made by a job of two workers."""
    result = run_day(example, copied, "2026-11-19", GOOD, workers="1x2", stages=("lists",))
    assert result.success and finished(result) == ["lists"]
    return copied / "days" / "2026-11-19" / "lists"


def export_on_rank(words: list[str]) -> None:
    given = dict(zip(words[::2], words[1::2], strict=True))
    export(ExportConfig(run=given["--run"], prepared=given["--prepared"], output=given["--output"]))


@pytest.fixture(scope="module")
def exported(example: ModuleType, copied: Path, ranks: Ranks) -> Path:
    """Made by the workers of the job that the example asks for, without a launcher."""
    asked = list[list[str]]()

    def record(words: list[str]) -> int:
        asked.append(words)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "main", record)
        result = run_day(example, copied, "2026-11-19", GOOD, workers="1x2", stages=("exported",))
    assert result.success and finished(result) == ["exported"]
    job = ["launch", "-s", "local_cwd", "--wait", "export", "-j", "1x2", "--"]
    assert asked[0][: len(job)] == job and len(asked) == 1
    ranks(2).run(export_on_rank, asked[0][len(job) :])
    return copied / "days" / "2026-11-19" / "export"


def rows_of(folder: Path, num_parts: int) -> list[dict[str, Any]]:
    """The rows of all parts, in the order of their names."""
    parts = sorted(folder.glob(f"part-*-of-{num_parts:05d}.parquet"))
    assert len(parts) == num_parts
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_jobs_of_two_workers_write_what_one_process_does(
    lists: Path, exported: Path, root: Path
) -> None:
    alone = root / "days" / "2026-11-19"
    ours, theirs = rows_of(lists, 2), rows_of(alone / "lists", 1)
    for row, other in zip(ours, theirs, strict=True):
        assert (row["user_id"], row["item_ids"]) == (other["user_id"], other["item_ids"])
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert rows_of(exported / "items", 2) == rows_of(alone / "export/items", 1)


def test_gate_publish_and_rollback_run_as_jobs(exported: Path, root: Path, tmp_path: Path) -> None:
    alone, report = root / "days" / "2026-11-19", str(tmp_path / "gate.json")
    pointer = ["--published", str(tmp_path / "published.json")]
    asked = ["--run", str(alone / "run"), "--prepared", str(alone / "prepared"), *pointer]
    assert main(["launch", "gate", "--", *asked, "--output", report]) == 0
    first = ["--export", str(alone / "export"), "--gate", report]
    assert main(["launch", "publish", "--", *pointer, *first]) == 0
    assert main(["publish", *pointer, "--export", str(exported), "--force"]) == 0
    assert main(["launch", "rollback", "--", *pointer]) == 0
    moves = [(one["action"], one["to"]) for one in read_published(Path(pointer[1])).swaps]
    assert moves == [("publish", 1), ("publish", 2), ("rollback", 1)]
