"""What ``train`` refuses leaves no run behind: the corrected command finds the folder free."""

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tests.pipeline.counted_steps import CountedSteps
from tests.pipeline.recorder import Recorder
from tests.pipeline.small_data import Running, small_config
from tests.ranks import Ranks
from torch import Tensor, nn

from shardrec.launch.cli import main
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCEMinus
from shardrec.pipeline.outputs.lock import LOCK, RunLock
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.config import LimitConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.train import build, train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

OFF = ValidationConfig(every_epochs=None)
ONE_STEP = LimitConfig(max_steps=1)
NEVER = -1
# Words of the command line, the last of them wrong, and what the message must say.
BAD = [
    ("loss=cce_minus loss.num_negatives=0", "loss.num_negatives must be at least 1, got 0"),
    ("loss=cce_minus loss.share=-1", "loss.share must be at least 0, got -1"),
    ("loss=cce_minus loss.popularity_exponent=nan", "loss.popularity_exponent must be in"),
    ("loss=sce loss.items_per_bucket=0", "loss.items_per_bucket must be at least 1, got 0"),
    ("loss=rece loss.num_rounds=0", "loss.num_rounds must be at least 1, got 0"),
    ("loss=cce loss.temperature=0", "loss.temperature must be above 0, got 0.0"),
    ("loss.temperature=-1", "loss.temperature must be above 0, got -1.0"),
    ("loss.temperature=nan", "loss.temperature must be above 0, got nan"),
    ("seed=-1", "seed must be in [0, 9223372036854775807], got -1"),
    ("seed=9223372036854775808", "seed must be in [0, 9223372036854775807]"),
    ("log_every=0", "log_every must be at least 1"),
    ("encoder.width=6", "encoder.width must be a multiple of 4, got 6"),
    ("encoder.dropout=nan", "encoder.dropout must be in [0, 1), got nan"),
    ("encoder.num_blocks=0", "encoder.num_blocks must be at least 1"),
    ("batches.batch_size=0", "batches.batch_size must be at least 1"),
    ("batches.shuffle_row_groups=0", "batches.shuffle_row_groups must be at least 1"),
    ("catalog.learning_rate=inf", "catalog.learning_rate must be finite, got inf"),
    ("catalog.eps=0", "catalog.eps must be above 0, got 0.0"),
    ("catalog.init_std=nan", "catalog.init_std must be at least 0, got nan"),
    ("catalog.betas=0.9,1", "catalog.betas must be two numbers in [0, 1)"),
    ("optimizer.betas=0.9,nan", "optimizer.betas must be two numbers in [0, 1)"),
    ("optimizer.eps=-1", "optimizer.eps must be above 0, got -1.0"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate must be at least 0, got nan"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must be at least 0, got -0.1"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps must be at least 0, got -1"),
    ("optimizer.clip_norm=inf", "optimizer.clip_norm must be finite, got inf"),
    ("limits.max_minutes=nan", "limits.max_minutes must be above 0, got nan"),
    ("validation.patience=0", "validation.patience must be at least 1, got 0"),
    ("validation.measure.ks=0", "ks must be list lengths of at least 1"),
    ("checkpoints.keep=0", "checkpoints.keep must be at least 1, got 0"),
    ("checkpoints.every_minutes=inf", "checkpoints.every_minutes must be finite, got inf"),
    ("profile.steps=-1", "profile.steps must be at least 0"),
]


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words.split()[-1] for words, _ in BAD])
def test_plan_and_train_refuse_an_option_by_name_and_leave_no_folder(
    tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["plan", "--num-items", "1000", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", "--prepared", str(tmp_path), "--run", str(run), *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


class Fails(Running):
    """An encoder that cannot take some batch: the ``first`` that it trains on, or a later one."""

    def __init__(self, first: int, error: type[BaseException] = ValueError) -> None:
        super().__init__()
        self.first, self.error, self.steps = first, error, CountedSteps()

    def forward(self, vectors: Tensor) -> Tensor:
        if self.steps.count(training=self.training) == self.first:
            raise self.error("vectors must be of another kind")
        states: Tensor = super().forward(vectors)
        return states


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_at_its_first_step_removes_its_folder(
    data: str, tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "deep/not-there"):
        config = small_config(data, tmp_path / name, limits=ONE_STEP, validation=OFF)
        with pytest.raises(error, match="of another kind"):
            train(config, encoder=Fails(1, error))
        left = tmp_path / name
        assert (list(left.iterdir()) == []) if name == "there" else not left.exists()
        corrected = dataclasses.replace(config, loss=CCEMinus(num_negatives=3), seed=2)
        assert train(corrected).step == 1


def fail_then_train(config: TrainConfig) -> list[str]:
    outcomes = []
    for encoder in (Fails(1), Running()):
        try:
            outcomes.append(train(config, encoder=encoder).reason)
        except ValueError as error:
            outcomes.append(str(error))
    return outcomes


def test_workers_that_fail_at_the_first_step_remove_the_folder(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    config = small_config(data, tmp_path / "run", limits=ONE_STEP, validation=OFF)
    outcomes = ["vectors must be of another kind", "max_steps reached"]
    assert ranks(2).run(fail_then_train, config) == [outcomes, outcomes]


def test_a_run_that_has_taken_a_step_stays(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", validation=OFF, log_every=1)
    with pytest.raises(ValueError, match="of another kind"):
        train(config, encoder=Fails(2))
    assert (tmp_path / "run" / "run.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"):
        train(config)


def test_a_run_that_goes_on_and_fails_at_once_keeps_what_it_had(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", validation=OFF)
    with pytest.raises(ValueError, match="of another kind"):
        train(config, encoder=Fails(2))
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="of another kind"):
        train(config, encoder=Fails(1), resume="auto")
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    assert train(config, encoder=Fails(NEVER), resume="auto").step > 2


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path): path.read_bytes() for path in files}


def test_forced_anew_a_run_that_fails_at_once_leaves_the_former_as_it_was(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(data, tmp_path / "run", limits=ONE_STEP, validation=OFF)
    train(config)
    before = content(tmp_path / "run")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="of another kind"):
        train(config, encoder=Fails(1), force=True)
    assert content(tmp_path / "run") == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_run_that_was_built_and_dropped_can_be_gone_on_with(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", limits=ONE_STEP, validation=OFF)
    assert build(config).is_new  # garbage at once, and so is what it holds
    assert (tmp_path / "run" / "run.json").exists()


class AsksForTheLock(Callback):
    """Sees at a step whether somebody else could write the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_free = folder, True

    def on_step(self, report: StepReport) -> None:
        try:
            RunLock(self.folder).acquire()
        except FileExistsError:
            self.is_free = False


def test_after_a_failure_in_this_process_the_folder_is_locked_and_let_go_as_ever(
    data: str, tmp_path: Path
) -> None:
    config = small_config(data, tmp_path / "run", limits=ONE_STEP, validation=OFF)
    with pytest.raises(ValueError, match="of another kind"):
        train(config, encoder=Fails(1))
    asks = AsksForTheLock(tmp_path / "run")
    train(config, callbacks=[asks])
    assert not asks.is_free
    RunLock(tmp_path / "run").acquire()


def test_a_failure_while_an_interrupted_run_is_opened_lets_its_folder_go(
    data: str, tmp_path: Path
) -> None:
    config = small_config(data, tmp_path / "run", validation=OFF)
    with pytest.raises(ValueError, match="of another kind"):
        train(config, encoder=Fails(2))
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    encoder = Fails(NEVER)
    encoder.linear = nn.Linear(16, 8)
    with pytest.raises(RuntimeError, match="size"):
        train(config, encoder=encoder, resume="auto")
    RunLock(tmp_path / "run").acquire()


def test_the_largest_seed_trains(data: str, tmp_path: Path) -> None:
    recorder = Recorder()
    config = small_config(
        data,
        tmp_path / "run",
        seed=2**63 - 1,
        loss=CCEMinus(num_negatives=5),
        catalog=CatalogConfig(optimizer="adam"),
        limits=LimitConfig(max_steps=2),
        validation=OFF,
    )
    train(config, callbacks=[recorder])
    assert all(torch.tensor([step.loss for step in recorder.steps]).isfinite())
