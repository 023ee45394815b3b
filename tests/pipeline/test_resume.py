"""An interrupted run goes on as if nothing had happened, on any number of ranks."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.interrupted import (
    OFF,
    STEPS,
    InterruptionError,
    Recorder,
    assert_recorded_once,
    config_of,
    train_and_read,
)
from tests.pipeline.small_data import prepare_small
from tests.ranks import Ranks

import shardrec
from shardrec.launch.cli import main
from shardrec.modules.losses import CCE, RECE, SCE, CCEMinus
from shardrec.pipeline.checkpoint.store import (
    Checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from shardrec.pipeline.run.config import CheckpointConfig, LimitConfig, OptimizerConfig, TrainConfig
from shardrec.pipeline.train import build, train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(weighted_data: str) -> str:
    return weighted_data


def interrupted_after(config: TrainConfig, step: int, output: Path) -> TrainConfig:
    """A copy of a run as it was when it was killed after ``step``, in the middle of the next."""
    shutil.copytree(config.output, output)
    (output / "end.json").unlink()
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"step-{later:08d}")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    return dataclasses.replace(config, output=str(output))


def assert_goes_on(found: dict[str, Any], whole: dict[str, Any], step: int) -> None:
    """Bit by bit what the uninterrupted run did after ``step``."""
    assert found["losses"] == {at: one for at, one in whole["losses"].items() if at > step}
    assert str(found["metrics"]) == str({k: v for k, v in whole["metrics"].items() if k > step})
    assert found["progress"] == whole["progress"] and found["numbers"] == whole["numbers"]
    assert found["tensors"].keys() == whole["tensors"].keys()
    for name, value in found["tensors"].items():
        assert torch.equal(value, whole["tensors"][name]), name


@pytest.mark.parametrize(
    ("loss", "optimizer", "accumulate"),
    [
        (CCE(), "rowwise_adagrad", 2),
        pytest.param(CCEMinus(num_negatives=16, share=8), "adam", 2, marks=pytest.mark.slow),
        pytest.param(SCE(items_per_bucket=16), "sparse_adam", 1, marks=pytest.mark.slow),
        pytest.param(RECE(), "adam", 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str | int) else str(value),
)
def test_a_run_interrupted_at_any_step_goes_on_bit_by_bit(
    data: str, tmp_path: Path, loss: Any, optimizer: str, accumulate: int
) -> None:
    config = config_of(data, tmp_path / "whole", loss, optimizer)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, accumulate=accumulate)
    )
    whole = train_and_read(config, "no")
    assert len(set(whole["losses"].values())) == STEPS
    steps_per_epoch = build(dataclasses.replace(config, output=str(tmp_path / "x"))).steps_per_epoch
    assert 1 < steps_per_epoch < STEPS, "there must be steps in the middle and at the end of epochs"
    for step in range(1, STEPS):
        again = interrupted_after(config, step, tmp_path / f"after-{step}")
        assert_goes_on(train_and_read(again, "yes"), whole, step)
        assert_recorded_once(tmp_path / f"after-{step}", step)


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [
        (CCEMinus(num_negatives=16, share=8), "rowwise_adagrad"),
        (CCEMinus(num_negatives=16, share=8), "adam"),
        (SCE(items_per_bucket=16), "sparse_adam"),
        (RECE(), "adam"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_two_ranks_go_on_bit_by_bit(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any, optimizer: str
) -> None:
    config = config_of(data, tmp_path / "whole", loss, optimizer)
    whole = ranks(2).run(train_and_read, config, "no")
    for step in (2, 4):
        again = interrupted_after(config, step, tmp_path / f"after-{step}")
        for found, expected in zip(ranks(2).run(train_and_read, again, "auto"), whole, strict=True):
            assert_goes_on(found, expected, step)
        assert_recorded_once(tmp_path / f"after-{step}", step)


def test_auto_starts_goes_on_and_then_does_nothing(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(data, tmp_path / "run", CCE(), "sgd")
    assert list(train_and_read(config, "auto", 3)["losses"]) == [1, 2, 3]
    assert list(train_and_read(config, "auto")["losses"]) == [3, 4, 5, 6]
    before = times_in(tmp_path / "run")
    caplog.set_level("INFO")
    report = train(config, resume="auto")
    assert report == train(config, resume="yes") and report.step == STEPS
    assert "finished already (max_steps reached): nothing to do" in caplog.text
    assert before == times_in(tmp_path / "run")


def times_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_killed_before_its_first_checkpoint_starts_again(data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": CheckpointConfig(), "validation": OFF}
    config = config_of(data, tmp_path / "run", CCE(), "sgd", **options)
    with pytest.raises(InterruptionError):
        train(config, callbacks=[Recorder(4)])
    assert list(train_and_read(config, "yes")["losses"]) == list(range(1, STEPS + 1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [one["step"] for one in lines if one["event"] == "step"] == list(range(1, STEPS + 1))


def test_a_run_killed_while_its_folder_was_made_starts(data: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    config = config_of(data, tmp_path / "run", CCE(), "sgd", validation=OFF)
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"):
        train(config)
    assert train(config, resume="auto").step == STEPS


def test_a_run_killed_between_its_last_checkpoint_and_its_end_only_ends(
    data: str, tmp_path: Path
) -> None:
    config = config_of(data, tmp_path / "run", CCE(), "sgd")
    whole = train_and_read(config, "no")
    (tmp_path / "run" / "end.json").unlink()
    found = train_and_read(config, "yes")
    assert found["losses"] == {} and found["progress"] == whole["progress"]
    assert_recorded_once(tmp_path / "run", STEPS)


def test_a_finished_run_can_be_made_longer_unless_its_rate_decays(
    data: str, tmp_path: Path
) -> None:
    constant = OptimizerConfig(decay="constant")
    config = config_of(data, tmp_path / "run", CCE(), "adam", optimizer=constant)
    longer = dataclasses.replace(config, limits=LimitConfig(max_steps=STEPS + 2))
    train(config)
    found = train_and_read(longer, "yes")
    whole = train_and_read(dataclasses.replace(longer, output=str(tmp_path / "whole")), "no")
    assert found["losses"] == {step: whole["losses"][step] for step in (STEPS + 1, STEPS + 2)}
    config = config_of(data, tmp_path / "cosine", CCE(), "adam")
    train(config)
    with pytest.raises(ValueError, match="limits.max_steps=8 for 6; restore the options"):
        train(dataclasses.replace(config, limits=longer.limits), resume="yes")


def test_another_config_other_data_or_another_encoder_are_refused(
    data: str, tmp_path: Path
) -> None:
    config = config_of(data, tmp_path / "run", CCE(), "sgd", limits=LimitConfig(max_steps=1))
    with pytest.raises(FileNotFoundError, match="output must be a folder that train wrote"):
        train(config, resume="yes")
    train(config)
    with pytest.raises(FileExistsError, match="or resume the run"):
        train(config)
    other = dataclasses.replace(config, seed=2, log_every=7)
    with pytest.raises(ValueError, match="got seed=2 for 1; restore the options"):
        train(other, resume="auto")
    with pytest.raises(ValueError, match="the encoder must be shardrec"):
        train(config, resume="auto", encoder=torch.nn.Identity())
    theirs = prepare_small(tmp_path / "other")
    with pytest.raises(ValueError, match="of other data than"):
        train(dataclasses.replace(config, data=theirs), resume="auto")


def test_a_damaged_checkpoint_is_passed_over_and_named(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(data, tmp_path / "whole", CCE(), "rowwise_adagrad")
    whole = train_and_read(config, "no")
    again = interrupted_after(config, 5, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000005" / "rank-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert_goes_on(train_and_read(again, "yes"), whole, 4)
    assert "step-00000005/rank-00000.bin must have sha256" in caplog.text
    assert_recorded_once(tmp_path / "run", 4)


def test_a_checkpoint_of_other_versions_is_taken_and_both_are_named(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(data, tmp_path / "run", CCE(), "sgd", validation=OFF)
    train_and_read(config, "no", 4)
    assert list(train_and_read(config, "yes", 5)["losses"]) == [4, 5]
    assert "was written by" not in caplog.text, "the same versions are no news"
    folder = Checkpoints(tmp_path / "run" / "checkpoints", None).find("last")
    stored = load_checkpoint(folder)
    save_checkpoint(
        folder, dataclasses.replace(stored, written_by=dict.fromkeys(stored.written_by, "0.9.1"))
    )
    assert list(train_and_read(config, "yes")["losses"]) == [5, 6]
    (line,) = [one for one in caplog.messages if "was written by" in one]
    assert f"shardrec 0.9.1, not {shardrec.__version__}" in line and "step-00000004" in line
    assert f"torch 0.9.1, not {torch.__version__}" in line and "\n" not in line


def test_two_runs_cannot_write_the_same_folder(data: str, tmp_path: Path) -> None:
    config = config_of(data, tmp_path / "run", CCE(), "sgd", validation=OFF)
    first = build(config)
    with pytest.raises(FileExistsError, match="one run at a time"):
        train(config, resume="auto")
    first.held.close()
    assert train(config, resume="auto").step == STEPS


def test_checkpoints_of_another_run_are_not_overwritten(data: str, tmp_path: Path) -> None:
    settings = CheckpointConfig(folder=str(tmp_path / "elsewhere"))
    config = config_of(data, tmp_path / "run", CCE(), "sgd", checkpoints=settings, validation=OFF)
    train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(FileExistsError, match="checkpoints.folder must be empty for a new run"):
        train(dataclasses.replace(config, output=str(tmp_path / "second")))


def test_the_command_goes_on_and_refuses_what_is_not_there(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--prepared", data, "--run", str(tmp_path / "run"), "--recipe", "tiny_cpu"]
    options = ["limits.max_steps=2", "limits.max_epochs=none", "show_progress=false"]
    assert main([*words, *options, "--resume"]) == 2
    assert "output must be a folder that train wrote to be resumed" in capsys.readouterr().err
    assert main([*words, *options, "--resume=auto"]) == 0
    (tmp_path / "run" / "end.json").unlink()
    assert main([*words, *options, "--resume"]) == 0
    assert (tmp_path / "run" / "end.json").exists()
    assert main([*words, *options]) == 2
    assert "or resume the run" in capsys.readouterr().err
