"""What commit c53ea15 wrote still opens, and gives the numbers that it gave.

``written_by_c53ea15/write.py`` wrote a prepared folder, a run of five steps on two ranks, an export
and, in expected.json, the numbers of that commit. Only the losses of the steps that follow are not
from there, as the order of the data has changed since: an earlier commit, 4500e2b, gave them with
the files epoch_order.py and loader.py of the new order alone.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.pipeline.recorder import Recorder
from tests.ranks import Ranks

from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.run.config import LimitConfig
from shardrec.pipeline.run.folder import read_run
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

WRITTEN = Path(__file__).with_name("written_by_c53ea15")
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
DATA, RUN, EXPORT = (str(WRITTEN / name) for name in ("prepared", "run", "export"))
HISTORIES = [[3], [5, 1, 4], [2, 2, 7, 30, 11]]


def losses_of_four_more_steps(run: str) -> list[float]:
    """Goes on from the checkpoint of step 5."""
    _, stored = read_run(Path(run))
    limits = LimitConfig(max_epochs=None, max_steps=9)
    recorder = Recorder()
    config = dataclasses.replace(stored, data=DATA, output=run, limits=limits)
    train(config, callbacks=[recorder], resume="yes")
    assert [one.step for one in recorder.steps] == [6, 7, 8, 9]
    return [one.loss for one in recorder.steps]


@pytest.mark.parametrize(
    ("num_ranks", "name"), [(1, "losses_alone"), (2, "losses_of_two")], ids=["W1", "W2"]
)
def test_the_run_goes_on_as_it_would_have_in_the_new_order(
    ranks: Ranks, tmp_path: Path, num_ranks: int, name: str
) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    for losses in ranks(num_ranks).run(losses_of_four_more_steps, str(tmp_path / "run")):
        assert losses == pytest.approx(EXPECTED[name], rel=1e-5)


def test_the_run_is_measured_as_it_was(tmp_path: Path) -> None:
    as_then = MeasureConfig(filter_seen=False, min_count=0)
    report = evaluate(RUN, DATA, as_then, output=str(tmp_path / "metrics.json"))
    metrics = report["metrics"]
    added = {name for name in metrics if name.endswith("/new")}
    kept = {name: value for name, value in metrics.items() if name not in added}
    assert kept == pytest.approx(EXPECTED["metrics"], rel=1e-6, nan_ok=True)
    assert metrics["users"] == 60 and not math.isnan(metrics["NDCG@10"])


def assert_serves_the_same(folder: str, **options: Any) -> None:
    served = Recommender.open(folder, **options).recommend(HISTORIES, k=4)
    for found, expected in zip(served, EXPECTED["served"], strict=True):
        assert [item for item, _ in found] == [item for item, _ in expected]
        scores = [score for _, score in expected]
        assert [score for _, score in found] == pytest.approx(scores, rel=1e-5)


def test_the_export_is_served_as_it_was_once_its_program_is_trusted() -> None:
    with pytest.raises(ValueError, match=r"encoder.pt2 must be trusted .* trust_code=True"):
        Recommender.open(EXPORT)
    assert_serves_the_same(EXPORT, trust_code=True)


def test_the_run_is_exported_as_it_was(tmp_path: Path) -> None:
    export(ExportConfig(run=RUN, prepared=DATA, output=str(tmp_path / "export")))
    assert_serves_the_same(str(tmp_path / "export"))

    def rows(folder: Path | str) -> Any:
        return pq.read_table(Path(folder) / "items").to_pylist()

    assert rows(tmp_path / "export") == rows(EXPORT)
