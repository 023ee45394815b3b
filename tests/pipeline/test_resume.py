"""An interrupted run goes on as if nothing had happened, on any number of ranks."""

import dataclasses
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks
from torch import Tensor

from shardrec.kernels import hash_chunks, rece, sce
from shardrec.launch.cli import main
from shardrec.modules.catalog import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE, RECE, SCE, CCEMinus
from shardrec.pipeline.callbacks import Callback, StepReport, ValidationReport
from shardrec.pipeline.checkpoint import CheckpointConfig, Checkpoints, load_checkpoint
from shardrec.pipeline.data import BatchConfig
from shardrec.pipeline.measure import MeasureConfig, measure, open_users
from shardrec.pipeline.resume import Resume
from shardrec.pipeline.run import LimitConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.step import OptimizerConfig
from shardrec.pipeline.train import build, train

STEPS = 6
# The gradient of a key's bias is rounding and nothing else: without this Adam would blow it up.
EPS = 1e-4
OFF = ValidationConfig(every_epochs=None)


class InterruptionError(Exception):
    """Ends a run from outside."""


class Recorder(Callback):
    """Keeps what was said, and interrupts the run after a step."""

    def __init__(self, last_step: int | None = None) -> None:
        self.last_step = last_step
        self.losses: dict[int, float] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def on_step(self, report: StepReport) -> None:
        assert report.step not in self.losses
        self.losses[report.step] = report.loss
        if report.step == self.last_step:
            raise InterruptionError

    def on_validation(self, report: ValidationReport) -> None:
        self.metrics[report.step] = dict(report.metrics)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("data"), weight_column="weight")


def config_of(data: str, output: Path, loss: Any, table: str, **options: Any) -> TrainConfig:
    """Dropout, warm-up, decay, clipping, accumulation that does not divide the epoch: all on."""
    settings: dict[str, Any] = {
        "loss": loss,
        "catalog": CatalogConfig(optimizer=table, learning_rate=0.05),
        "encoder": EncoderConfig(width=16, max_length=8, dropout=0.3),
        "batches": BatchConfig(batch_size=20),
        "optimizer": OptimizerConfig(
            warmup_steps=2, decay="cosine", clip_norm=0.5, accumulate=2, learning_rate=3e-3, eps=EPS
        ),
        "limits": LimitConfig(max_steps=STEPS),
        "validation": ValidationConfig(every_epochs=None, every_steps=4),
        "checkpoints": CheckpointConfig(every_steps=1, keep=STEPS),
        "log_every": 1,
    }
    return small_config(data, output, **(settings | options))


def train_and_read(config: TrainConfig, resume: Resume, stop: int | None = None) -> dict[str, Any]:
    """Losses and metrics by step, and all that the last checkpoint holds."""
    recorder = Recorder(stop)
    try:
        train(config, callbacks=[recorder], resume=resume)
    except InterruptionError:
        assert stop is not None
    folder = Checkpoints(Path(config.output) / "checkpoints", None).find("last")
    state = load_checkpoint(folder)
    progress = {name: one for name, one in state.progress.items() if name != "seconds"}
    progress["best"] = {k: v for k, v in (progress["best"] or {}).items() if k != "seconds"}
    whole, rows = state.tensors()
    return {
        "losses": recorder.losses,
        "metrics": recorder.metrics,
        "progress": json.dumps(progress),  # NaN equals NaN in text
        "numbers": {name: one.item() for name, one in state.table.items() if not one.ndim},
        "tensors": {name: one.clone() for name, one in (whole | rows).items()},
    }


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


def assert_told_once(output: Path, step: int) -> None:
    """Each step and each validation is in the metrics once, and in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    told = {
        kind: [line["step"] for line in lines if line["event"] == kind]
        for kind in ("step", "validation", "resume", "end")
    }
    assert told == {
        "step": list(range(1, STEPS + 1)),
        "validation": [4, 6],
        "resume": [step],
        "end": [STEPS],
    }


@pytest.mark.parametrize(
    ("loss", "optimizer", "accumulate"),
    [
        (CCE(), "rowwise_adagrad", 2),
        (CCEMinus(num_negatives=16, share=8), "adam", 2),
        (SCE(items_per_bucket=16), "sparse_adam", 1),
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
        assert_told_once(tmp_path / f"after-{step}", step)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam", "sparse_adam"])
def test_two_ranks_go_on_bit_by_bit(
    ranks: Ranks, data: str, tmp_path: Path, optimizer: str
) -> None:
    loss = CCEMinus(num_negatives=16, share=8)
    config = config_of(data, tmp_path / "whole", loss, optimizer)
    whole = ranks(2).run(train_and_read, config, "no")
    for step in (2, 4):
        again = interrupted_after(config, step, tmp_path / f"after-{step}")
        for found, expected in zip(ranks(2).run(train_and_read, again, "auto"), whole, strict=True):
            assert_goes_on(found, expected, step)
        assert_told_once(tmp_path / f"after-{step}", step)


@pytest.mark.parametrize(
    "loss", [CCE(), CCEMinus(num_negatives=16, share=8)], ids=["cce", "cce_minus"]
)
def test_another_number_of_ranks_goes_on_within_tolerance(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any
) -> None:
    encoder = EncoderConfig(width=16, max_length=8, dropout=0.0)  # drawn by each rank for itself
    config = config_of(data, tmp_path / "whole", loss, "rowwise_adagrad", encoder=encoder)
    whole = train_and_read(config, "no")
    for before, after in ((1, 3), (3, 2), (2, 1), (3, 1)):
        output = tmp_path / f"{before}-to-{after}"
        moved = dataclasses.replace(config, output=str(output))
        ranks(before).run(train_and_read, moved, "no", 4)
        for found in ranks(after).run(train_and_read, moved, "yes"):
            assert list(found["losses"]) == [4, 5, 6]
            expected = [whole["losses"][step] for step in found["losses"]]
            assert list(found["losses"].values()) == pytest.approx(expected, rel=2e-5)
            for name, value in found["tensors"].items():
                torch.testing.assert_close(
                    value, whole["tensors"][name], rtol=2e-3, atol=1e-4, msg=name
                )
        assert_told_once(output, 3)


def choices_and_metrics(config: TrainConfig) -> tuple[list[Tensor], list[Tensor], dict[str, float]]:
    """What the first step after a resume selects (alike on all ranks, and by rank); metrics."""
    alike: list[Tensor] = []
    own: list[Tensor] = []

    def note(function: Any, keep: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            keep(result)
            return result

        return wrapped

    run = build(config, resume="yes")
    model, measured = run.stepper.model, MeasureConfig(ks=(10,))
    model.encoder.eval()
    users = open_users(run.prepared, "validation", measured, 8, model.group)
    metrics = measure(model.last_states, model.scored_shard(), users, measured, run.prepared)
    buckets = note(sce.fill_buckets, lambda found: alike.extend([found.positions, found.items]))
    chunks = note(hash_chunks.item_chunks, own.append)
    places = note(hash_chunks.position_chunks, own.append)
    with (
        mock.patch.object(sce, "fill_buckets", buckets),
        mock.patch.object(rece, "item_chunks", chunks),
        mock.patch.object(rece, "position_chunks", places),
    ):
        run.stepper.take(list(islice(run.batches, 1)), run.progress.step + 1)
    return alike, own, metrics


@pytest.mark.parametrize("loss", [SCE(items_per_bucket=16), RECE()], ids=["sce", "rece"])
def test_another_number_of_ranks_selects_the_same(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any
) -> None:
    encoder = EncoderConfig(width=16, max_length=8, dropout=0.0)
    config = config_of(data, tmp_path / "run", loss, "adam", encoder=encoder)
    ranks(2).run(train_and_read, config, "no", 4)
    alike, own, metrics = ranks(1).run(choices_and_metrics, resumable(config, tmp_path / "one"))[0]
    assert (len(alike) > 0) != (len(own) > 0)
    for num_ranks in (2, 3):
        copied = resumable(config, tmp_path / f"ranks-{num_ranks}")
        results = ranks(num_ranks).run(choices_and_metrics, copied)
        for found, _, their_metrics in results:
            assert all(torch.equal(a, b) for a, b in zip(found, alike, strict=True))
            assert their_metrics == pytest.approx(metrics, rel=1e-6, nan_ok=True)
        for index, expected in enumerate(own):
            assert torch.equal(torch.cat([part[1][index] for part in results]), expected)


def resumable(config: TrainConfig, output: Path) -> TrainConfig:
    shutil.copytree(config.output, output)
    return dataclasses.replace(config, output=str(output))


def test_auto_starts_goes_on_and_then_does_nothing(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(data, tmp_path / "run", CCE(), "sgd")
    assert list(train_and_read(config, "auto", 3)["losses"]) == [1, 2, 3]
    assert list(train_and_read(config, "auto")["losses"]) == [3, 4, 5, 6]
    before = times_in(tmp_path / "run")
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
    assert_told_once(tmp_path / "run", STEPS)


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
    assert_told_once(tmp_path / "run", 4)


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
