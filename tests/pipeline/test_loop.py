"""What the loop skips, and what ends it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.pipeline.counted_steps import CountedSteps
from tests.pipeline.recorder import Recorder
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks
from torch import Tensor, nn

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.model.measure import Measurement, measure
from shardrec.pipeline.run.config import LimitConfig, OptimizerConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.train import build, train

OFF = ValidationConfig(every_epochs=None)


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


class Breaks(nn.Module):
    """Turns into NaN after some steps of training, for a while."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.first, self.last, self.steps = first, last, CountedSteps()

    def forward(self, vectors: Tensor) -> Tensor:
        step = self.steps.count(training=self.training)
        is_broken = self.training and self.first <= step <= self.last
        states: Tensor = self.linear(vectors)
        return states * (float("nan") if is_broken else 1.0)


def train_a_breaking_encoder(config: TrainConfig) -> dict[str, Any]:
    recorder = Recorder()
    last = 3 if dist.is_initialized() and dist.get_rank() == 1 else 0  # only one rank breaks
    report = train(config, encoder=Breaks(2, last), callbacks=[recorder])
    return {"skipped": [step.skipped for step in recorder.steps], "num": report.num_skipped}


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    config = small_config(data, tmp_path / "run", limits=LimitConfig(max_steps=5), validation=OFF)
    for found in ranks(2).run(train_a_breaking_encoder, config):
        assert found == {"skipped": [False, True, True, False, False], "num": 2}


def test_steps_that_stay_not_finite_end_the_run(data: str, tmp_path: Path) -> None:
    recorder = Recorder()
    config = small_config(data, tmp_path / "run", optimizer=OptimizerConfig(max_skipped=3))
    with pytest.raises(FloatingPointError, match=r"got 3 steps in a row \(up to step 4\)"):
        train(config, encoder=Breaks(2, 10**6), callbacks=[recorder])
    assert [step.num_skipped for step in recorder.steps] == [0, 1, 2, 3]


def test_a_skipped_step_changes_nothing(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", limits=LimitConfig(max_steps=1), validation=OFF)
    encoder = Breaks(1, 1)
    before = encoder.linear.weight.detach().clone()
    rows = build(small_config(data, tmp_path / "other")).stepper.model.catalog.shard.rows
    train(config, encoder=encoder)
    assert torch.equal(encoder.linear.weight, before)
    saved = load_checkpoint(Checkpoints(tmp_path / "run" / "checkpoints", None).find("last"))
    assert torch.equal(saved.table["rows"], rows)


@pytest.mark.slow
def test_the_run_stops_when_nothing_improves(data: str, tmp_path: Path) -> None:
    recorder = Recorder()
    config = small_config(
        data,
        tmp_path / "run",
        optimizer=OptimizerConfig(learning_rate=0.0),
        catalog=CatalogConfig(learning_rate=0.0),
        limits=LimitConfig(max_epochs=50),
        validation=ValidationConfig(every_epochs=None, every_steps=2, patience=3),
    )
    report = train(config, callbacks=[recorder])
    assert report.reason == "no better NDCG@10 in 3 validations"
    assert [one.step for one in recorder.validations] == [2, 4, 6, 8]
    assert [one.improved for one in recorder.validations] == [True, False, False, False]
    assert report.best_step == 2 and recorder.ends == [report]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000002", "step-00000006", "step-00000008"]


def test_each_limit_ends_the_run(data: str, tmp_path: Path) -> None:
    ends = {
        "max_steps reached": LimitConfig(max_epochs=2, max_steps=3),
        "max_epochs reached": LimitConfig(max_epochs=1, max_steps=300),
        "max_minutes reached": LimitConfig(max_epochs=None, max_minutes=1e-9),
    }
    for index, (reason, limits) in enumerate(ends.items()):
        config = small_config(data, tmp_path / str(index), limits=limits, validation=OFF)
        report = train(config)
        assert report.reason == reason
        saved = load_checkpoint(Checkpoints(Path(config.output) / "checkpoints", None).find("last"))
        assert saved.progress["step"] == report.step > 0


def step_at_the_end(config: TrainConfig) -> int:
    return train(config).step


def test_all_ranks_stop_together_when_time_is_up(ranks: Ranks, data: str, tmp_path: Path) -> None:
    limits = LimitConfig(max_epochs=None, max_minutes=0.5 / 60)
    config = small_config(data, tmp_path / "run", limits=limits, validation=OFF)
    first, second = ranks(2).run(step_at_the_end, config)
    assert first == second > 1


def test_a_limit_that_passes_in_a_validation_ends_the_run_there(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]

    def measured(*arguments: Any) -> Measurement:
        seconds[0] += 40.0
        return measure(*arguments)

    monkeypatch.setattr("shardrec.pipeline.run.loop.time.monotonic", lambda: seconds[0])
    monkeypatch.setattr("shardrec.pipeline.run.loop.measure", measured)
    recorder = Recorder()
    limits = LimitConfig(max_epochs=None, max_minutes=1.0)
    validation = ValidationConfig(every_epochs=None, every_steps=5)
    config = small_config(data, tmp_path / "run", limits=limits, validation=validation)
    report = train(config, callbacks=[recorder])
    # Another validation would end after 80 seconds.
    assert [one.step for one in recorder.validations] == [5]
    assert (report.reason, report.step, report.seconds) == ("max_minutes reached", 5, 40.0)
