"""Training goes on while a checkpoint is written, and survives one that cannot be."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.pipeline.small_data import small_config
from tests.pipeline.test_checkpoint import NUM_ROWS, bounds, make_state
from tests.ranks import Ranks

from shardrec.pipeline.checkpoint.store import (
    Checkpoints,
    CheckpointState,
    load_checkpoint,
)
from shardrec.pipeline.checkpoint.writer import CheckpointReport, CheckpointWriter, writing_group
from shardrec.pipeline.outputs.storage import Folder
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.config import (
    CheckpointConfig,
    LimitConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.train import train


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


class Slow(Checkpoints):
    """Writes when it is allowed to."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        super().__init__(folder, group)
        self.may_write = threading.Event()

    def save(self, step: int, state: CheckpointState, *, best: bool) -> Folder:
        assert self.may_write.wait(timeout=60)
        return super().save(step, state, best=best)


def changing_state() -> CheckpointState:
    state = make_state(bounds(dist.get_rank(), dist.get_world_size()), 1)
    return state.copied(lambda name, value: value.clone())


def write_slowly(folder: str) -> dict[str, Any]:
    """Saves a state and changes it before the write has begun."""
    state = changing_state()
    with writing_group(dist.group.WORLD) as group:
        checkpoints = Slow(Path(folder), group)
        writer = CheckpointWriter(checkpoints, background=True)
        assert writer.collect() == [] and not writer.is_over
        assert writer.save(1, state, best=True) == []
        assert not writer.is_over
        for value in [*state.encoder.values(), state.table["rows"]]:
            value += 1
        dist.barrier()  # collectives of training do not meet those of the write
        first = {name: one.data_ptr() for name, one in writer._buffers.items()}
        checkpoints.may_write.set()
        (before,) = writer.save(2, state, best=False)
        second = {name: one.data_ptr() for name, one in writer._buffers.items()}
        (after,) = writer.collect()
    return {"same buffers": first == second, "reports": [before, after]}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_is_written_is_the_state_of_the_moment_it_was_saved(
    ranks: Ranks, tmp_path: Path, num_ranks: int
) -> None:
    for found in ranks(num_ranks).run(write_slowly, str(tmp_path)):
        assert found["same buffers"]
        assert [(one.step, one.best, one.error) for one in found["reports"]] == [
            (1, True, None),
            (2, False, None),
        ]
        for report in found["reports"]:
            assert 0 < report.stall_seconds <= report.seconds
            whole, rows = make_state(range(NUM_ROWS)).tensors()
            assert report.num_bytes == sum(one.nbytes for one in (whole | rows).values())
    first, second = (load_checkpoint(tmp_path / f"step-0000000{step}") for step in (1, 2))
    assert torch.equal(first.encoder["weight"] + 1, second.encoder["weight"])
    assert torch.equal(first.table["rows"] + 1, second.table["rows"])


class Recorder(Callback):
    """Keeps what was said, in order."""

    def __init__(self) -> None:
        self.reported: list[StepReport | CheckpointReport] = []

    def on_step(self, report: StepReport) -> None:
        self.reported.append(report)

    def on_checkpoint(self, report: CheckpointReport) -> None:
        self.reported.append(report)

    def checkpoints(self) -> list[CheckpointReport]:
        return [one for one in self.reported if isinstance(one, CheckpointReport)]


def config_of(data: str, output: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "limits": LimitConfig(max_steps=8),
        "validation": ValidationConfig(every_epochs=None),
        "checkpoints": CheckpointConfig(every_steps=2),
    }
    return small_config(data, output, **(settings | options))


def train_and_record(config: TrainConfig) -> list[CheckpointReport]:
    recorder = Recorder()
    train(config, callbacks=[recorder])
    return recorder.checkpoints()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.slow
def test_each_checkpoint_is_reported_once_with_its_stall(
    data: str, tmp_path: Path, background: bool
) -> None:
    settings = CheckpointConfig(every_steps=2, background=background)
    reported = train_and_record(config_of(data, tmp_path / "run", checkpoints=settings))
    assert [report.step for report in reported] == [2, 4, 6, 8]
    assert all(report.error is None and report.num_bytes > 0 for report in reported)
    for report in reported:
        stalled = report.stall_seconds / report.seconds
        assert stalled == 1.0 if not background else 0 < stalled < 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    written = [line for line in lines if line["event"] == "checkpoint"]
    assert [line["stall_seconds"] for line in written] == [one.stall_seconds for one in reported]


def test_a_clock_asks_for_checkpoints_too(data: str, tmp_path: Path) -> None:
    settings = CheckpointConfig(every_minutes=1e-9)
    reported = train_and_record(config_of(data, tmp_path / "run", checkpoints=settings))
    assert [report.step for report in reported] == list(range(1, 9))


def train_over_an_obstacle(config: TrainConfig) -> list[tuple[int, bool]]:
    return [(report.step, report.error is None) for report in train_and_record(config)]


@pytest.mark.slow
def test_a_checkpoint_that_fails_is_reported_on_all_ranks_and_training_goes_on(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    settings = CheckpointConfig(folder=str(tmp_path / "there"), every_steps=2)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "step-00000004").write_text("a file where a folder should be")
    config = config_of(data, tmp_path / "run", checkpoints=settings)
    for found in ranks(2).run(train_over_an_obstacle, config):
        assert found == [(2, True), (4, False), (6, True), (8, True)]
    assert not checkpoints.exists()
    assert Checkpoints(tmp_path / "there", None).find("last").name == "step-00000008"


def test_a_last_checkpoint_that_fails_ends_in_an_error_and_the_run_can_be_resumed(
    data: str, tmp_path: Path
) -> None:
    obstacle = tmp_path / "there" / "step-00000008"
    settings = CheckpointConfig(folder=str(tmp_path / "there"), every_steps=2)
    obstacle.parent.mkdir()
    obstacle.write_text("a file where a folder should be")
    config = config_of(data, tmp_path / "run", checkpoints=settings)
    with pytest.raises(OSError, match="step-00000008"):
        train(config)
    assert Checkpoints(tmp_path / "there", None).find("last").name == "step-00000006"
    assert not (tmp_path / "run" / "end.json").exists()
    obstacle.unlink()
    assert train(config, resume="yes").step == 8
    assert train(dataclasses.replace(config, log_every=3), resume="auto").step == 8
