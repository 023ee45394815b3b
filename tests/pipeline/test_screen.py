"""What a run prints at its start and its end."""

import dataclasses
from pathlib import Path

import pytest
from tests.pipeline.small_data import small_config

from shardrec.modules.losses import SCE
from shardrec.pipeline.run.callbacks import EndReport
from shardrec.pipeline.run.config import LimitConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.run.screen import ending, opening
from shardrec.pipeline.train import train

ENDED = EndReport(
    output="run",
    reason="max_epochs reached",
    step=400,
    epoch=20.0,
    seconds=61.0,
    seconds_per_step=0.1,
    positions_per_second=1e3,
    padding_share=0.0,
    memory_bytes=1,
    num_skipped=0,
    best_step=400,
    best_metrics={"NDCG@10": 0.1234},
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_config("data", tmp_path / "run", limits=LimitConfig(max_epochs=20))


def test_only_options_other_than_the_defaults_are_shown(config: TrainConfig) -> None:
    chosen = dataclasses.replace(config, loss=SCE(items_per_bucket=7), seed=3)
    lines = opening(chosen, "the plan", 1.0).splitlines()
    assert {'  loss = "sce"', "  loss.items_per_bucket = 7", "  seed = 3"} <= set(lines)
    assert lines[-1] == "the plan" and not any("precision" in line for line in lines)


def test_what_is_not_trained_on_is_said(config: TrainConfig) -> None:
    text = " ".join(opening(config, "the plan", 0.424).split())
    length = config.encoder.max_length
    assert f"an epoch has 42.4% of the training targets: the last {length} of each" in text
    assert "batches.windows=all" in text


def test_a_run_that_was_still_improving_says_which_limit_to_raise(config: TrainConfig) -> None:
    first, second, last = ending(ENDED, config).splitlines()
    assert first == "best NDCG@10 0.1234 at step 400 of 400, 61 s in all"
    assert "still rising; raise limits.max_epochs (now 20)" in second
    assert last.endswith(f"next: shardrec evaluate --prepared data --run {config.output}")


@pytest.mark.parametrize(
    "change", [{"best_step": 390}, {"reason": "no better NDCG@10 in 3 validations"}]
)
def test_a_run_past_its_best_is_not_told_to_go_on(
    config: TrainConfig, change: dict[str, object]
) -> None:
    assert "raise" not in ending(dataclasses.replace(ENDED, **change), config)  # type: ignore[arg-type]


def test_a_run_without_validation_names_its_folder(config: TrainConfig) -> None:
    without = dataclasses.replace(ENDED, best_step=None, best_metrics={})
    assert ending(without, config).splitlines()[0].startswith(f"run folder {config.output}")


def test_a_run_prints_both(
    plain_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits, validation = LimitConfig(max_steps=2), ValidationConfig(every_steps=2)
    config = small_config(plain_data, tmp_path / "run", limits=limits, validation=validation)
    train(dataclasses.replace(config, show_progress=True))
    said = capsys.readouterr().err
    assert "options other than the defaults" in said and "limits.max_steps = 2" in said
    assert "raise limits.max_steps (now 2)" in said and "next: shardrec evaluate" in said
