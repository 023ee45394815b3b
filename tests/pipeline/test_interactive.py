"""The stages as a notebook calls them: tables and paths in, results with short reprs out."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.small_data import Running, write_log

import shardrec
from shardrec.pipeline.results import PreparedLog, TrainedRun
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.interruption import Preempted

SMALL = ("limits.max_steps=20", "validation.every_steps=10", "show_progress=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def events(folder: Path) -> pa.Table:
    return pq.read_table(write_log(folder / "log.parquet"))


@pytest.fixture(scope="module")
def prepared(folder: Path, events: pa.Table) -> PreparedLog:
    return shardrec.prepare(events, folder / "prepared", split="leave_one_out", threads=1)


@pytest.fixture(scope="module")
def run(folder: Path, prepared: PreparedLog) -> TrainedRun:
    return shardrec.train(prepared, folder / "run", *SMALL, recipe="tiny_cpu")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, shardrec; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
    assert shardrec.Recommender.__name__ == "Recommender"
    with pytest.raises(AttributeError, match="has no attribute 'trainer'"):
        shardrec.trainer  # noqa: B018


def as_given(kind: str, table: pa.Table, folder: Path) -> Any:
    if kind == "path":
        pq.write_table(table, folder / "given.parquet")
        return folder / "given.parquet"
    if kind == "arrow":
        return table
    if kind == "pandas":
        pytest.importorskip("pandas")
        return table.to_pandas()
    return pytest.importorskip("polars").from_arrow(table)


@pytest.mark.parametrize("kind", ["path", "arrow", "pandas", "polars"])
def test_every_kind_of_table_prepares_the_same_data(
    kind: str, events: pa.Table, prepared: PreparedLog, tmp_path: Path
) -> None:
    given = as_given(kind, events, tmp_path)
    for _ in range(2):  # the cell run again
        found = shardrec.prepare(given, tmp_path / "out", split="leave_one_out", threads=1)
    for name in ("items.parquet", "test.parquet"):
        assert pq.read_table(found.path / name).equals(pq.read_table(prepared.path / name))


def test_results_are_short_and_become_tables(
    run: TrainedRun, prepared: PreparedLog, folder: Path
) -> None:
    pytest.importorskip("pandas")
    assert repr(prepared).startswith("prepared log of ") and len(repr(prepared)) < 200
    assert run.end.step == 20 and "best NDCG@10" in repr(run) and len(repr(run)) < 200
    curves = run.to_pandas()
    assert list(curves[curves["event"] == "validation"]["step"]) == [10, 20]
    assert run.metrics["NDCG@10"] == pytest.approx(curves["NDCG@10"].max())
    found = shardrec.evaluate(run, prepared, ks=(10,))
    assert found.metrics["NDCG@10"] >= 0 and "popularity" in found.baselines
    table = found.to_pandas()
    value = table[(table["model"] == "run") & (table["metric"] == "NDCG@10")]["value"]
    assert list(value) == [found.metrics["NDCG@10"]]
    assert repr(found).startswith("NDCG@10 of ") and "popularity" in repr(found)


def test_lists_and_export_follow_from_the_run(
    run: TrainedRun, prepared: PreparedLog, events: pa.Table, folder: Path
) -> None:
    (first, *_) = pq.read_table(prepared.path / "items.parquet")["item_id"].to_pylist()
    users = pa.table({"user_id": ["a", "b"], "items": [[first], []]})
    for _ in range(2):
        lists = shardrec.recommend(run, prepared, folder / "lists", histories=users, k=3)
    table = lists.table()
    assert table["user_id"].to_pylist() == ["a", "b"]
    assert repr(lists) == f"lists for 2 users ({folder / 'lists'})"
    exported = shardrec.export(run, prepared, folder / "model")
    model = exported.open()
    items = [name for name, _ in model.recommend([[first]], k=3)[0]]
    assert items == table["item_ids"].to_pylist()[0]
    assert repr(model).startswith(f"Recommender({len(model.ids)} items of width 16, catalog ")
    assert exported.table().num_rows == len(model.ids) and len(repr(exported)) < 200
    of_log = shardrec.recommend(run, prepared, folder / "of-log", events=events, k=3)
    assert of_log.table().num_rows == len(set(events["user_id"].to_pylist()))


class Interrupt(Callback):
    """Presses the stop button once or twice, at the end of a step."""

    def __init__(self, presses: int) -> None:
        self.presses, self.last = presses, 0

    def on_step(self, report: StepReport) -> None:
        self.last = report.step
        if report.step == 3:
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)


def test_an_interrupt_keeps_the_step_and_the_same_call_continues(
    prepared: PreparedLog, tmp_path: Path
) -> None:
    before, once = signal.getsignal(signal.SIGINT), Interrupt(1)
    with pytest.raises(Preempted, match="after step 4 as it was asked to"):
        shardrec.train(prepared, tmp_path / "run", *SMALL, recipe="tiny_cpu", callbacks=[once])
    assert once.last == 4 and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        twice = [Interrupt(2)]
        shardrec.train(prepared, tmp_path / "other", *SMALL, recipe="tiny_cpu", callbacks=twice)
    assert shardrec.train(prepared, tmp_path / "run", *SMALL, recipe="tiny_cpu").end.step == 20


def test_what_is_no_table_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="events must be a path or a table .*, got dict"):
        shardrec.prepare({"user_id": [1]}, tmp_path / "out")


def test_an_encoder_of_ones_own_is_passed_as_it_is(
    prepared: PreparedLog, folder: Path, tmp_path: Path
) -> None:
    run = shardrec.train(prepared, tmp_path / "run", *SMALL, recipe="tiny_cpu", encoder=Running())
    assert shardrec.evaluate(run, prepared, encoder=Running()).metrics["users"] > 0
