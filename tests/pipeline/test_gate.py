"""The gate: a run against the published model on the same users, also if the data are newer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.pipeline.small_data import prepare_small, small_config, write_log

from shardrec.launch.cli import main
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.gate import GateConfig, Verdict, gate, measure_export
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.publish import PublishConfig, publish
from shardrec.pipeline.run.config import LimitConfig
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

MEASURE = MeasureConfig(ks=(5, 10))
HISTORIES = [[3, 9, 4], [17], [40, 2]]


@dataclasses.dataclass(frozen=True)
class Day:
    """A prepared folder, a trained and evaluated run, and its export."""

    folder: Path

    @property
    def prepared(self) -> str:
        return str(self.folder / "prepared")

    @property
    def run(self) -> str:
        return str(self.folder / "run")

    @property
    def export(self) -> str:
        return str(self.folder / "export")

    def ndcg(self) -> float:
        return float(
            json.loads((self.folder / "run/metrics.json").read_text())["metrics"]["NDCG@10"]
        )


def make_day(folder: Path, *, num_users: int, epochs: int) -> Day:
    day = Day(folder)
    prepare_small(folder, events=str(log_of(folder, num_users)), split="temporal")
    config = small_config(
        day.prepared,
        day.run,
        catalog=CatalogConfig(optimizer="adam", learning_rate=3e-2),
        limits=LimitConfig(max_epochs=epochs),
    )
    train(config)
    evaluate(day.run, day.prepared, MEASURE)
    export(ExportConfig(run=day.run, prepared=day.prepared, output=day.export))
    return day


def log_of(folder: Path, num_users: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_log(folder / "all.parquet", num_users=num_users)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Day:
    """Learns what follows what."""
    return make_day(tmp_path_factory.mktemp("good"), num_users=97, epochs=8)


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> Day:
    """Newer data with more users, and a single epoch."""
    return make_day(tmp_path_factory.mktemp("poor"), num_users=120, epochs=1)


@pytest.fixture
def pointer(good: Day, tmp_path: Path) -> Path:
    """The good run is published."""
    path = tmp_path / "published.json"
    asked(good, path)
    publish(PublishConfig(export=good.export, published=str(path), gate=str(path) + ".good"))
    return path


def asked(day: Day, pointer: Path, **options: Any) -> Verdict:
    name = "good" if "good" in day.run else "poor"
    settings = {"output": f"{pointer}.{name}"} | options
    return gate(GateConfig(run=day.run, prepared=day.prepared, published=str(pointer), **settings))


def test_measured_export_has_the_metrics_of_its_run(good: Day) -> None:
    found = measure_export(Path(good.export), Prepared.open(good.prepared), MEASURE, "test")
    stored = json.loads((good.folder / "run/metrics.json").read_text())["metrics"]
    names = [name for name, value in stored.items() if value is not None]
    assert {n: found[n] for n in names} == pytest.approx({n: stored[n] for n in names}, abs=1e-6)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Newer data with items that no export knows; what it knows has other indices here."""
    folder = tmp_path_factory.mktemp("newer")
    log = pq.read_table(log_of(folder, 150))
    ids = log.column("item_id").to_pylist()
    renamed = [item + 1000 * (item % 5 == 0 and event % 2) for event, item in enumerate(ids)]
    pq.write_table(log.set_column(1, "item_id", [renamed]), folder / "all.parquet")
    output = str(folder / "prepared")
    prepare(PrepareConfig(events=str(folder / "all.parquet"), output=output, threads=1))
    return output


def test_measured_export_on_newer_data_has_the_hits_of_serving(good: Day, newer: str) -> None:
    prepared = Prepared.open(newer)
    config = MeasureConfig(ks=(5,), filter_seen=False, min_count=0)
    found = measure_export(Path(good.export), prepared, config, "test")
    served = Recommender.open(good.export, min_count=0)
    ids = prepared.item_ids().to_pylist()
    hits, users = 0, pq.read_table(Path(newer) / "test.parquet").to_pylist()
    for user in users:
        recent = [ids[item] for item in user["items"]][-8:]
        (listed,) = served.recommend([recent], 5, filter_seen=False)
        hits += bool({ids[item] for item in user["targets"]} & {item for item, _ in listed})
    lost = [user for user in users if all(ids[item] >= 1000 for item in user["items"][-8:])]
    assert not lost, "the seed gives every user a known item"
    assert any(ids[item] >= 1000 for user in users for item in user["targets"])
    assert found["HitRate@5"] == pytest.approx(hits / len(users)) and hits


def test_first_model_passes_unless_below_the_minimum(good: Day, tmp_path: Path) -> None:
    pointer = tmp_path / "none.json"
    assert asked(good, pointer).passed
    refused = asked(good, pointer, minimum=0.99, force=True)
    assert not refused.passed and "is below the minimum 0.9900" in refused.reason


def test_gate_rejects_regression_beyond_tolerance(poor: Day, pointer: Path, good: Day) -> None:
    verdict = asked(poor, pointer)
    assert not verdict.passed and verdict.is_new
    stored = json.loads(Path(f"{pointer}.poor").read_text())
    assert stored["published"]["measured"] == "now, by its export, on the users of the run"
    assert stored["published"]["value"] > poor.ndcg() > 0
    export_there = measure_export(Path(good.export), Prepared.open(poor.prepared), MEASURE, "test")
    assert stored["published"]["value"] == pytest.approx(export_there["NDCG@10"])
    assert asked(poor, pointer, tolerance=0.999, force=True).passed


def test_gate_reuses_the_published_value_on_the_same_users(
    good: Day, pointer: Path, tmp_path: Path
) -> None:
    other = tmp_path / "run"
    train(small_config(good.prepared, other, limits=LimitConfig(max_epochs=1), seed=9))
    evaluate(str(other), good.prepared, MEASURE)
    verdict = gate(GateConfig(run=str(other), prepared=good.prepared, published=str(pointer)))
    assert verdict.report["published"]["measured"] == "when it was published, on the same users"
    assert verdict.report["published"]["value"] == pytest.approx(good.ndcg())
    assert not verdict.passed


def test_gate_answers_a_question_once_and_refuses_another(poor: Day, pointer: Path) -> None:
    assert asked(poor, pointer).is_new
    assert not asked(poor, pointer).is_new
    with pytest.raises(FileExistsError, match="which differs in tolerance"):
        asked(poor, pointer, tolerance=0.5)
    publish(PublishConfig(export=poor.export, published=str(pointer), force=True))
    again = asked(poor, pointer)
    assert again.is_new and again.passed, "it is compared with itself now"


def lists_of(served: str | Path) -> tuple[str, list[list[tuple[Any, float]]]]:
    """The run behind an export or a pointer, and what it recommends to some users."""
    model = Recommender.open(served)
    return model.manifest["request"]["source"]["run"], model.recommend(HISTORIES, k=5)


def test_rollback_serves_the_good_model_after_a_poor_one(
    good: Day, poor: Day, pointer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not asked(poor, pointer).passed
    words = ["publish", "--export", poor.export, "--published", str(pointer)]
    assert main([*words, "--gate", f"{pointer}.poor"]) == 3
    assert main([*words, "--force"]) == 0
    poor_lists = lists_of(pointer)
    assert poor_lists == lists_of(poor.export)
    capsys.readouterr()
    assert main(["rollback", "--published", str(pointer)]) == 0
    assert "number 1" in capsys.readouterr().out
    good_lists = lists_of(pointer)
    assert good_lists == lists_of(good.export)
    assert all(ours != theirs for ours, theirs in zip(good_lists, poor_lists, strict=True))


def test_gate_and_publish_of_a_published_run_are_idempotent(good: Day, pointer: Path) -> None:
    assert not asked(good, pointer).is_new
    again = PublishConfig(export=good.export, published=str(pointer), gate=f"{pointer}.good")
    assert not publish(again).is_new


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "NDGC@10"}, ValueError, r"did you mean NDCG@10"),
        ({"metrics": "nowhere.json"}, FileNotFoundError, "run `shardrec evaluate` first"),
        ({"tolerance": 1.5}, ValueError, r"tolerance must be in \[0, 1\), got 1.5"),
    ],
)
def test_gate_refuses_bad_options(
    good: Day, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        asked(good, tmp_path / "none.json", **options)


def test_gate_refuses_data_of_another_run(good: Day, poor: Day, tmp_path: Path) -> None:
    config = GateConfig(run=good.run, prepared=poor.prepared, published=str(tmp_path / "p.json"))
    with pytest.raises(ValueError, match="prepared must be the data that the run was evaluated on"):
        gate(config)


def test_rejected_run_exits_with_3_and_is_not_published(
    good: Day, poor: Day, pointer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = f"{pointer}.command"
    words = ["gate", "--run", poor.run, "--prepared", poor.prepared, "--output", report]
    assert main([*words, "--published", str(pointer)]) == 3
    said = capsys.readouterr().err
    assert said.startswith("shardrec gate: refused: NDCG@10") and said.count("\n") == 1
    words = ["publish", "--export", poor.export, "--published", str(pointer), "--gate", report]
    assert main(words) == 3
    served = Recommender.open(pointer)
    assert served.manifest["request"] == Recommender.open(good.export).manifest["request"]
