"""An interrupted run goes on upon any other number of ranks."""

import contextlib
import dataclasses
import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.choices import (
    Choice,
    assert_same_choices,
    of_all_ranks,
    recorded_choices,
)
from tests.pipeline.interrupted import (
    InterruptionError,
    Recorder,
    assert_recorded_once,
    config_of,
    train_and_read,
)
from tests.ranks import Ranks

from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE, HCE, RECE, SCE, CCEMinus
from shardrec.modules.ranking import Blocks
from shardrec.pipeline.model.measure import measure, open_users
from shardrec.pipeline.model.ranker import StateRanker
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.train import build, train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

NO_DROPOUT = EncoderConfig(width=16, max_length=8, dropout=0.0)
DROPOUT = EncoderConfig(width=16, max_length=8, dropout=0.3)
SEED = 3  # one with which every choice is certain
# The number of ranks before -> after: every loss begins on each and goes on with each, and two
# losses or more take each step from one number to another.
UP, DOWN = {1: 2, 2: 3, 3: 1}, {1: 3, 3: 2, 2: 1}
AFTER = {"cce": UP, "cce_minus": DOWN, "sce": UP, "rece": DOWN, "hce": UP}


@pytest.fixture(scope="module")
def data(weighted_data: str) -> str:
    return weighted_data


@pytest.mark.parametrize(
    "loss", [CCE(), CCEMinus(num_negatives=16, share=8)], ids=["cce", "cce_minus"]
)
def test_another_number_of_ranks_goes_on_within_tolerance(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any
) -> None:
    config = config_of(data, tmp_path / "whole", loss, "rowwise_adagrad", encoder=DROPOUT)
    whole = train_and_read(config, "no")
    for before in (1, 2, 3):
        begun = dataclasses.replace(config, output=str(tmp_path / f"{before}"))
        ranks(before).run(train_and_read, begun, "no", 3)  # in the middle of an epoch
        after = AFTER[loss.name][before]
        moved = copied(begun, tmp_path / f"{before}-to-{after}")
        for found in ranks(after).run(train_and_read, moved, "yes"):
            assert_close(found, whole, 2)
        assert_recorded_once(Path(moved.output), 2)


def assert_close(found: dict[str, Any], whole: dict[str, Any], step: int) -> None:
    """What the uninterrupted run did after ``step``, but for rounding."""
    expected = {at: one for at, one in whole["losses"].items() if at > step}
    assert list(found["losses"]) == list(expected)
    assert list(found["losses"].values()) == pytest.approx(list(expected.values()), rel=2e-5)
    for name, value in found["tensors"].items():
        torch.testing.assert_close(value, whole["tensors"][name], rtol=2e-3, atol=1e-4, msg=name)


def choices_of_the_last_step(config: TrainConfig, last: int) -> list[Choice]:
    """What a run selects in the step in which it is interrupted."""

    class ForgetsBefore(Callback):
        def on_step(self, report: StepReport) -> None:
            if report.step < last:
                choices.clear()

    with recorded_choices() as choices, contextlib.suppress(InterruptionError):
        train(config, callbacks=[ForgetsBefore(), Recorder(last)])
    return choices


def choices_and_metrics(config: TrainConfig) -> tuple[list[Choice], dict[str, float]]:
    """Metrics after a resume, and what the first step selects."""
    run = build(config, resume="yes")
    model, measured = run.stepper.model, config.validation.measure
    model.encoder.eval()
    users = open_users(run.prepared, "validation", measured, 8, model.group)
    ranker = StateRanker.of(model, 8, Blocks())
    metrics = measure(ranker, users, measured, run.prepared).metrics
    batches = list(islice(run.batches, config.optimizer.accumulate))
    with run.held, recorded_choices() as choices:
        run.stepper.take(batches, run.progress.step + 1)
    return choices, metrics


@pytest.mark.parametrize(
    "loss",
    [SCE(items_per_bucket=16), RECE(), HCE(items_per_bucket=16, num_negatives=16)],
    ids=["sce", "rece", "hce"],
)
def test_another_number_of_ranks_selects_and_measures_the_same(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any
) -> None:
    """As the interrupted run does in its next step, and did when it validated before."""
    for before in (1, 2, 3):
        config = config_of(
            data, tmp_path / f"{before}", loss, "adam", encoder=NO_DROPOUT, seed=SEED
        )
        of_ranks = ranks(before).run(choices_of_the_last_step, config, 5)
        expected = [of_all_ranks(list(parts)) for parts in zip(*of_ranks, strict=True)]
        assert len(expected) == config.optimizer.accumulate
        stored = metrics_told_at(tmp_path / f"{before}", 4)
        after = AFTER[loss.name][before]
        moved = copied(config, tmp_path / f"{before}-to-{after}")
        results = ranks(after).run(choices_and_metrics, moved)
        assert_same_choices([one for one, _ in results], expected, least=0.0)
        for _, metrics in results:
            assert metrics == pytest.approx(stored, rel=1e-6, nan_ok=True)


def metrics_told_at(output: Path, step: int) -> dict[str, float]:
    """What the validation of a step wrote."""
    told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    (found,) = [one for one in told if one["event"] == "validation" and one["step"] == step]
    return {n: math.nan if one is None else one for n, one in found["metrics"].items()}


def copied(config: TrainConfig, output: Path) -> TrainConfig:
    shutil.copytree(config.output, output)
    return dataclasses.replace(config, output=str(output))
