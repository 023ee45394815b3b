"""A thread that makes the next batch changes no run, on any rank, however it ends or goes on."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks
from typing_extensions import override

from shardrec.pipeline.prepared.loader import TrainingBatches
from shardrec.pipeline.run.ahead import made_ahead
from shardrec.pipeline.run.build import build
from shardrec.pipeline.run.callbacks import Callback, StepReport, ValidationReport
from shardrec.pipeline.run.config import (
    LimitConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.loop import Loop


class Recorder(Callback):
    """Every loss and every validation, bit by bit."""

    def __init__(self) -> None:
        self.seen = list[Any]()

    @override
    def on_step(self, report: StepReport) -> None:
        self.seen.append((report.step, report.loss, report.gradient_norm))

    @override
    def on_validation(self, report: ValidationReport) -> None:
        self.seen.append(dict(report.metrics))


def run_to_end(config: TrainConfig, ahead: bool, resume: Any = "no") -> list[Any]:
    run = build(config, resume=resume)
    recorder = Recorder()
    with run.held:
        Loop(dataclasses.replace(run, ahead=ahead), [recorder], lambda: False).run_to_end()
    return recorder.seen


def config_of(data: str, folder: Path, steps: int, accumulate: int) -> TrainConfig:
    return small_config(
        data,
        folder,
        optimizer=OptimizerConfig(accumulate=accumulate),
        limits=LimitConfig(max_epochs=None, max_steps=steps),
        validation=ValidationConfig(every_epochs=None, every_steps=2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_is_the_same_bit_by_bit_with_validations_between_and_after_a_resume(
    plain_data: str, tmp_path: Path, accumulate: int
) -> None:
    steps = 2 * -(-5 // accumulate) + 1  # into the third epoch
    expected = run_to_end(config_of(plain_data, tmp_path / "plain", steps, accumulate), False)
    whole = run_to_end(config_of(plain_data, tmp_path / "ahead", steps, accumulate), True)
    assert whole == expected
    parts = list[Any]()
    for end in range(1, steps + 1):
        config = config_of(plain_data, tmp_path / "parts", end, accumulate)
        parts += run_to_end(config, True, "auto" if end > 1 else "no")
    assert [one for one in parts if isinstance(one, tuple)] == [
        one for one in expected if isinstance(one, tuple)
    ]


def test_the_next_item_is_made_while_the_current_one_is_in_use() -> None:
    made = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        made.set()
        yield 2

    coming = made_ahead(items())
    assert next(coming) == 1 and made.wait(10)
    assert list(coming) == [2]


def test_the_thread_ends_where_no_more_items_are_asked_for() -> None:
    before = threading.active_count()
    coming = made_ahead(iter(range(10)))
    assert next(coming) == 0 and threading.active_count() == before + 1
    coming.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def damaged(self: TrainingBatches, *args: Any) -> Any:
    raise ValueError("row group 7 of train.parquet must be readable, got a damaged one")


def fail_on_rank_1(config: TrainConfig, rank_1_alone: bool) -> str:
    run = build(config)
    with run.held, pytest.MonkeyPatch.context() as patch:
        if not run.is_first or not rank_1_alone:
            patch.setattr(TrainingBatches, "_read", damaged)
        try:
            Loop(dataclasses.replace(run, ahead=True), [], lambda: False).run_to_end()
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["W1", "W2"])
def test_an_error_of_the_thread_reaches_the_user_on_every_rank(
    ranks: Ranks, plain_data: str, tmp_path: Path, num_ranks: int
) -> None:
    config = config_of(plain_data, tmp_path / "run", 4, 1)
    for said in ranks(num_ranks).run(fail_on_rank_1, config, num_ranks > 1):
        assert said.startswith("row group 7 of train.parquet must be readable")
