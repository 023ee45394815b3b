"""Averaged weights: what they are; training does not see them, and goes on with its own."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.interrupted import STEPS, assert_recorded_once, config_of, train_and_read
from tests.ranks import Ranks
from torch import Tensor

from shardrec.modules.losses import CCEMinus
from shardrec.pipeline.checkpoint.store import load_checkpoint
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.plan import Machine, plan
from shardrec.pipeline.run.config import OptimizerConfig, ParallelConfig, TrainConfig

DECAY, EVERY = 0.7, 2
LOSS = CCEMinus(num_negatives=16, share=8)  # most rows have no gradient in a step


def averaging(data: str, output: Path, table: str = "rowwise_adagrad", shards: int = 0) -> Any:
    optimizer = OptimizerConfig(
        ema_decay=DECAY, ema_every=EVERY, accumulate=2, learning_rate=3e-3, eps=1e-4, clip_norm=0.5
    )
    parallel = ParallelConfig(shards=shards)
    return config_of(data, output, LOSS, table, optimizer=optimizer, parallel=parallel)


def tensors_after(config: TrainConfig, step: int) -> dict[str, Tensor]:
    folder = Path(config.output) / "checkpoints" / f"step-{step:08d}"
    whole, rows = load_checkpoint(folder).tensors()
    return {name: one.double() for name, one in (whole | rows).items()}


def test_checkpoints_hold_the_average_of_weights_that_training_does_not_see(
    weighted_data: str, tmp_path: Path
) -> None:
    config = averaging(weighted_data, tmp_path / "averaged")
    plain = dataclasses.replace(config.optimizer, ema_decay=0.0, ema_every=10)
    plain = dataclasses.replace(config, output=str(tmp_path / "plain"), optimizer=plain)
    found, expected = train_and_read(config, "no"), train_and_read(plain, "no")
    assert found["losses"] == expected["losses"] and found["metrics"] != expected["metrics"]
    average: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        live, stored = tensors_after(plain, step), tensors_after(config, step)
        weights = {k: v for k, v in live.items() if k.startswith(("encoder.", "table.rows"))}
        if step % EVERY == 1:
            share = max(1 - DECAY**EVERY, 9 / (9 + step // EVERY))
            average = {k: (1 - share) * average.get(k, v) + share * v for k, v in weights.items()}
        for name, value in average.items():
            torch.testing.assert_close(stored[name], value, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(stored["table.unaveraged"], live["table.rows"])
    assert not torch.equal(stored["table.unaveraged"], stored["table.rows"])
    how = config.validation.measure
    last = evaluate(config.output, config.data, how, split="validation", checkpoint="last")
    for name, value in found["metrics"][STEPS].items():
        assert last["metrics"][name] == pytest.approx(value, nan_ok=True), name


@pytest.mark.slow
def test_an_averaging_run_goes_on_bit_by_bit_and_does_not_depend_on_the_ranks(
    ranks: Ranks, weighted_data: str, tmp_path: Path
) -> None:
    alone = train_and_read(averaging(weighted_data, tmp_path / "alone"), "no")
    for size, shards in ((1, 0), (2, 0), (3, 0), (2, 1)):  # the last as two replicas
        config = averaging(weighted_data, tmp_path / f"{size}-{shards}", shards=shards)
        whole = ranks(size).run(train_and_read, config, "no")
        for name, value in whole[0]["tensors"].items():
            torch.testing.assert_close(
                value, alone["tensors"][name], rtol=2e-3, atol=1e-4, msg=name
            )
        begun = dataclasses.replace(config, output=str(tmp_path / f"begun-{size}-{shards}"))
        ranks(size).run(train_and_read, begun, "no", 4)
        again = ranks(size).run(train_and_read, begun, "yes")
        for found, expected in zip(again, whole, strict=True):
            for name, value in found["tensors"].items():
                assert torch.equal(value, expected["tensors"][name]), name
        assert_recorded_once(Path(begun.output), 3)


def test_the_plan_counts_averages_of_rows_and_encoder(tmp_path: Path) -> None:
    config = averaging("data", tmp_path)
    plain = dataclasses.replace(config.optimizer, ema_decay=0.0, ema_every=10)
    found, expected = (
        plan(one, 100_000, Machine(ranks=2))
        for one in (config, dataclasses.replace(config, optimizer=plain))
    )
    averages = 4 * 50_000 * 16 + expected.memory["encoder"] // 5
    assert found.memory["averaged weights"] == averages
    assert found.memory["checkpoint copy"] == expected.memory["checkpoint copy"] + averages
    assert found.peak_bytes == expected.peak_bytes + 2 * averages


def test_an_interval_without_an_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema_every must come with optimizer\.ema_decay, got 3"):
        OptimizerConfig(ema_every=3)
