"""What goes wrong under a run, done for real: disks, damaged files, bad data, a second run."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from tests.pipeline.disks import fill, mount, small_disk
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks

from shardrec.launch import cli
from shardrec.modules.encoder import EncoderConfig
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.checkpoint.writer import CheckpointReport
from shardrec.pipeline.outputs.lock import RunLock
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.config import (
    CheckpointConfig,
    LimitConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.interruption import Preempted
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

STEPS, CUT = 12, 7
DISK_BYTES = 2 << 20
OFF = ValidationConfig(every_epochs=None)


@pytest.fixture(scope="module")
def data(weighted_data: str) -> str:
    return weighted_data


@pytest.fixture
def own_data(data: str, tmp_path: Path) -> str:
    """A copy to break."""
    return str(shutil.copytree(data, tmp_path / "prepared"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


def config_of(data: str, output: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "encoder": EncoderConfig(width=16, max_length=8, dropout=0.3),
        "limits": LimitConfig(max_epochs=None, max_steps=STEPS),
        "validation": OFF,
        "checkpoints": CheckpointConfig(every_steps=2, keep=3),
        "log_every": 1,
    }
    return small_config(data, output, **(settings | options))


def last_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    folder = Checkpoints(Path(config.output) / "checkpoints", None).find("last")
    whole, rows = load_checkpoint(folder).tensors()
    return {name: one.clone() for name, one in (whole | rows).items()}


def assert_same(found: TrainConfig, expected: TrainConfig) -> None:
    ours, theirs = last_weights(found), last_weights(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class Steps(Callback):
    """Does something when a step or a checkpoint is reported, and keeps what was reported."""

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.then = then
        self.last = 0
        self.steps: list[StepReport] = []
        self.checkpoints: list[CheckpointReport] = []

    def on_step(self, report: StepReport) -> None:
        self.last = report.step
        self.steps.append(report)
        if self.then is not None:
            self.then(report.step)

    def on_checkpoint(self, report: CheckpointReport) -> None:
        self.checkpoints.append(report)


def train_until(config: TrainConfig, stop: int) -> str:
    """What a run says that is interrupted by rank 1 while it takes step ``stop``."""
    steps = Steps()
    asks = dist.is_initialized() and dist.get_rank() == 1
    try:
        train(
            config,
            callbacks=[steps],
            resume="auto",
            interrupted=lambda: asks and steps.last == stop - 1,
        )
    except Preempted as error:
        return str(error)
    return "finished"


@pytest.fixture(scope="module")
def undisturbed(data: str, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of two ranks from beginning to end."""
    config = config_of(data, tmp_path_factory.mktemp("undisturbed") / "run")
    assert set(ranks(2).run(train_until, config, STEPS + 1)) == {"finished"}
    return config


@pytest.fixture(scope="module")
def interrupted(data: str, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The same, interrupted after step 7; checkpoints of steps 4, 6 and 7 are there."""
    config = config_of(data, tmp_path_factory.mktemp("interrupted") / "run")
    said = ranks(2).run(train_until, config, CUT)
    assert all(one.startswith(f"the run stopped after step {CUT} as it was asked") for one in said)
    return config


def copy_of(config: TrainConfig, output: Path) -> TrainConfig:
    shutil.copytree(config.output, output)
    return dataclasses.replace(config, output=str(output))


def test_ranks_agree_when_one_is_asked_to_stop(
    ranks: Ranks, undisturbed: TrainConfig, interrupted: TrainConfig, tmp_path: Path
) -> None:
    folder = Path(interrupted.output)
    assert not (folder / "end.json").exists()
    names = [path.parent.name for path in sorted(folder.glob("checkpoints/*/manifest.json"))]
    assert names == ["step-00000004", "step-00000006", "step-00000007"]
    config = copy_of(interrupted, tmp_path / "run")
    assert set(ranks(2).run(train_until, config, STEPS + 1)) == {"finished"}
    assert_same(config, undisturbed)


def cut_short(folder: Path) -> str:
    path = folder / "rank-00001.bin"
    path.write_bytes(path.read_bytes()[:-3])
    return f"{path} must have bytes"


def altered(folder: Path) -> str:
    path = folder / "rank-00000.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path} must have sha256"


def lost(folder: Path) -> str:
    (folder / "metadata.json").unlink()
    return f"{folder / 'metadata.json'} must have bytes"


def half_a_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-40])
    return ""  # not a checkpoint at all, so nothing to name


def train_and_listen(config: TrainConfig) -> tuple[int, list[str]]:
    """The first step taken, and what was said in warnings."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardrec").addHandler(handler)
    steps = Steps()
    try:
        train(config, callbacks=[steps], resume="yes")
    finally:
        logging.getLogger("shardrec").removeHandler(handler)
    return steps.steps[0].step, said


@pytest.mark.parametrize(
    "damage", [cut_short, altered, lost, half_a_manifest], ids=lambda one: one.__name__
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    ranks: Ranks,
    undisturbed: TrainConfig,
    interrupted: TrainConfig,
    tmp_path: Path,
    damage: Callable[[Path], str],
) -> None:
    config = copy_of(interrupted, tmp_path / "run")
    words = damage(tmp_path / "run" / "checkpoints" / f"step-{CUT:08d}")
    (first, said), _ = ranks(2).run(train_and_listen, config)
    assert first == CUT, "the steps after the checkpoint of step 6 are taken again"
    assert any(words in line for line in said) or not words, said
    assert_same(config, undisturbed)


def train_on_a_disk_that_fills(config: TrainConfig, disk: str) -> list[tuple[int, bool, str]]:
    """Each checkpoint: its step, whether it was written, and which was then the last."""
    reported: list[tuple[int, bool, str]] = []
    is_first = dist.get_rank() == 0

    class Fills(Callback):
        def on_checkpoint(self, report: CheckpointReport) -> None:
            last = Checkpoints(Path(config.output) / "checkpoints", None).find("last").name
            reported.append((report.step, report.error is None, last))
            if is_first and len(reported) == 1:
                fill(Path(disk))
            elif is_first and len(reported) == 3:
                (Path(disk) / "filler").unlink()

    train(config, callbacks=[Fills()])
    return reported


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    ranks: Ranks, data: str, disk: Path, undisturbed: TrainConfig
) -> None:
    config = config_of(data, disk / "run")
    reported, theirs = ranks(2).run(train_on_a_disk_that_fills, config, str(disk))
    assert reported == theirs
    written = [is_written for _, is_written, _ in reported]
    assert written[:3] == [True, False, False] and written[-1], reported
    assert reported[2][2] == reported[0][2], "the one before the disk was full is still the last"
    assert_same(config, undisturbed)
    events = [json.loads(line) for line in (disk / "run" / "metrics.jsonl").open()]
    assert [one["step"] for one in events if one["event"] == "step"] == [*range(1, STEPS + 1)]


# TensorBoard writes in a thread of its own, which ends with the disk.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_stays_full_ends_the_run_and_it_goes_on_when_there_is_room(
    data: str, disk: Path, tmp_path: Path
) -> None:
    config = config_of(data, disk / "run")
    steps = Steps(lambda step: fill(disk) if step == 5 else None)
    with pytest.raises(OSError, match="No space left on device"):
        train(config, callbacks=[steps])
    assert steps.last == STEPS, "training went on without checkpoints"
    assert not (disk / "run" / "end.json").exists()
    (disk / "filler").unlink()
    assert train(config, resume="yes").step == STEPS
    whole = config_of(data, tmp_path / "whole")
    train(whole)
    assert_same(config, whole)


def test_an_output_that_cannot_be_written_is_said_in_one_line(
    data: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, two_steps = ["train", "--prepared", data, "--recipe", "tiny_cpu"], "limits.max_steps=2"
    assert cli.main([*words, two_steps, "--run", str(disk / "old")]) == 0
    before = sorted(path.name for path in (disk / "old").iterdir())
    mount(disk, "-o", "remount,ro")
    capsys.readouterr()
    for run, options in (
        ("new", [two_steps]),
        ("old", ["--resume=auto", "limits.max_steps=4"]),
    ):
        assert cli.main([*words, *options, "--run", str(disk / run)]) == 2
        said = capsys.readouterr().err
        assert "Read-only file system" in said and str(disk) in said
        assert said.count("\n") == 1, said
    assert before == sorted(path.name for path in (disk / "old").iterdir())


def rewrite(data: str, change: Callable[[int, pa.Table], pa.Table]) -> None:
    """Change the row groups of the training file, and bring the manifest in line."""
    path = Path(data) / "train" / "part-00000.parquet"
    file = pq.ParquetFile(path)
    groups = [change(index, file.read_row_group(index)) for index in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for group in groups:
            writer.write_table(group.cast(file.schema_arrow))
    manifest = json.loads((Path(data) / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "train/part-00000.parquet":
            entry["bytes"] = path.stat().st_size
    (Path(data) / "manifest.json").write_text(json.dumps(manifest))


def with_nan(table: pa.Table, sequences: int) -> pa.Table:
    """The same with NaN for the last weight of the first sequences."""
    weights = table["weights"].to_pylist()
    for sequence in weights[:sequences]:
        sequence[-1] = math.nan
    column = pa.array(weights, table.schema.field("weights").type)
    return table.set_column(table.schema.get_field_index("weights"), "weights", column)


def train_and_count(config: TrainConfig) -> tuple[list[int], int]:
    """Steps that were skipped, and how many the end report counts."""
    steps = Steps()
    report = train(config, callbacks=[steps])
    return [one.step for one in steps.steps if one.skipped], report.num_skipped


def test_a_batch_with_nan_is_skipped_once_an_epoch_and_counted(
    ranks: Ranks, own_data: str, tmp_path: Path
) -> None:
    rewrite(own_data, lambda index, table: with_nan(table, 1) if index == 1 else table)
    config = config_of(own_data, tmp_path / "run", limits=LimitConfig(max_epochs=2))
    (skipped, count), theirs = ranks(2).run(train_and_count, config)
    assert (skipped, count) == theirs and len(skipped) == count == 2
    assert all(one.isfinite().all() for one in last_weights(config).values())


def test_data_that_stays_nan_ends_the_run_and_keeps_what_was_written(
    own_data: str, tmp_path: Path
) -> None:
    rewrite(own_data, lambda _, table: with_nan(table, len(table)))
    limits = OptimizerConfig(max_skipped=3)
    config = config_of(own_data, tmp_path / "run", optimizer=limits)
    with pytest.raises(FloatingPointError, match="got 3 steps in a row .up to step 3. where they"):
        train(config)
    assert all(one.isfinite().all() for one in last_weights(config).values())


def removed(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def train_while_a_file_breaks(config: TrainConfig, how: str) -> str:
    """What this rank says when the training file breaks after its second step."""
    path = Path(config.data) / "train" / "part-00000.parquet"

    def harm(step: int) -> None:
        if step == 2 and dist.get_rank() == 1:
            {"removed": removed, "truncated": truncated}[how](path)

    try:
        train(config, callbacks=[Steps(harm)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("removed", "part-00000.parquet must be there, as the manifest lists it"),
        ("truncated", "part-00000.parquet, row group"),
    ],
)
def test_a_file_that_breaks_in_an_epoch_stops_all_ranks_and_is_named(
    ranks: Ranks, own_data: str, tmp_path: Path, how: str, words: str
) -> None:
    batches = BatchConfig(batch_size=5, shuffle_row_groups=1)
    config = config_of(own_data, tmp_path / "run", batches=batches)
    for said in ranks(2).run(train_while_a_file_breaks, config, how, timeout=30):
        assert words in said, said
    assert last_weights(config), "what was written before is whole"


def train_and_catch(config: TrainConfig, resume: Any) -> str:
    try:
        train(config, resume=resume)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def test_a_second_run_on_the_same_folder_learns_who_has_it(
    ranks: Ranks, interrupted: TrainConfig, undisturbed: TrainConfig, tmp_path: Path
) -> None:
    config = copy_of(interrupted, tmp_path / "run")
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for resume in ("yes", "auto"):
        for said in ranks(2).run(train_and_catch, config, resume):
            assert said.startswith("BusyError: output must be trained by one run at a time")
            assert f"is held by {lock.holder()}" in said
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    lock.release()
    assert set(ranks(2).run(train_and_catch, config, "auto")) == {"finished"}
    assert_same(config, undisturbed)
