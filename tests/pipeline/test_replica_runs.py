"""Runs with replicas: resumed on other layouts, evaluated, exported, and what crosses replicas."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.group_traffic import Traffic, counted_traffic
from tests.pipeline.interrupted import STEPS, assert_recorded_once, train_and_read
from tests.pipeline.interrupted import config_of as interrupted_config
from tests.pipeline.small_data import NUM_ITEMS, small_config
from tests.ranks import Ranks

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE, CCEMinus
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.memorize import MemorizeConfig, memorize
from shardrec.pipeline.plan import Machine, plan
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.run.config import (
    InitConfig,
    LimitConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.interruption import Preempted
from shardrec.pipeline.similar import SimilarConfig, similar
from shardrec.pipeline.train import build, train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

GATHER = "_allgather_base"
# Where a run began, and where it goes on: each layout is gone on with, for each loss.
CONTINUED = {
    "cce": {(2, 2): [(1, 1), (2, 1), (1, 3)], (1, 1): [(2, 2), (3, 1)]},
    "cce_minus": {(3, 1): [(1, 1), (2, 2), (1, 3)], (1, 2): [(3, 1), (2, 1)]},
}


def laid_out(config: TrainConfig, output: Path, num_shards: int) -> TrainConfig:
    parallel = ParallelConfig(shards=num_shards)
    return dataclasses.replace(config, output=str(output), parallel=parallel)


def resumable(data: str, output: Path, loss: Any, table: str) -> TrainConfig:
    """Steps of six batches, the last of an epoch of fewer; dropout, clipping and decay are on."""
    optimizer = OptimizerConfig(
        warmup_steps=2, decay="cosine", clip_norm=0.5, accumulate=6, learning_rate=3e-3, eps=1e-4
    )
    batches = BatchConfig(batch_size=4)
    return interrupted_config(data, output, loss, table, optimizer=optimizer, batches=batches)


@pytest.mark.parametrize(
    ("loss", "table"),
    [(CCE(), "adam"), (CCEMinus(num_negatives=16, share=8), "rowwise_adagrad")],
    ids=CONTINUED,
)
def test_a_run_goes_on_with_any_replicas_and_shards(
    ranks: Ranks, weighted_data: str, tmp_path: Path, loss: Any, table: str
) -> None:
    config = resumable(weighted_data, tmp_path / "whole", loss, table)
    whole = train_and_read(config, "no")
    for before, continued in CONTINUED[loss.name].items():
        begun = laid_out(config, tmp_path / f"begun-{before}", before[1])
        ranks(before[0] * before[1]).run(train_and_read, begun, "no", 3)
        for after in continued:
            output = tmp_path / f"{before}-to-{after}"
            shutil.copytree(begun.output, output)
            moved = laid_out(config, output, after[1])
            for found in ranks(after[0] * after[1]).run(train_and_read, moved, "yes"):
                assert found["losses"].keys() == {3, 4, 5, 6}
                for step, value in found["losses"].items():
                    assert value == pytest.approx(whole["losses"][step], rel=2e-5)
                for name, value in found["tensors"].items():
                    torch.testing.assert_close(
                        value, whole["tensors"][name], rtol=2e-3, atol=1e-4, msg=name
                    )
            assert_recorded_once(output, 2)


def test_on_the_same_layout_a_run_goes_on_bit_for_bit(
    ranks: Ranks, weighted_data: str, tmp_path: Path
) -> None:
    """And its checkpoint holds each row once, a part from every rank."""
    loss = CCEMinus(num_negatives=16, share=8)
    config = resumable(weighted_data, tmp_path, loss, "adam")
    alone = train_and_read(laid_out(config, tmp_path / "alone", 1), "no")
    whole, *_ = ranks(4).run(train_and_read, laid_out(config, tmp_path / "whole", 2), "no")
    begun = laid_out(config, tmp_path / "begun", 2)
    ranks(4).run(train_and_read, begun, "no", 3)
    for found in ranks(4).run(train_and_read, begun, "yes"):
        assert found["progress"] == whole["progress"] and found["numbers"] == whole["numbers"]
        assert all(
            torch.equal(one, whole["tensors"][name]) for name, one in found["tensors"].items()
        )
    steps = [tmp_path / run / "checkpoints" / f"step-{STEPS:08d}" for run in ("alone", "whole")]
    sizes = [[file.stat().st_size for file in sorted(step.glob("*.bin"))] for step in steps]
    assert [len(of_ranks) for of_ranks in sizes] == [1, 4] and sum(sizes[0]) == sum(sizes[1])
    stored = json.loads((steps[1] / "metadata.json").read_text())["table.rows"]
    assert [one["rows"] > NUM_ITEMS // 5 for one in stored["chunks"]] == [True] * 4
    assert alone["numbers"] == whole["numbers"]


def stop_from(config: TrainConfig, rank: int) -> str:
    """Trains until one rank, of any replica, is interrupted."""
    asked = iter([False, torch.distributed.get_rank() == rank, False, False])
    try:
        train(config, interrupted=lambda: next(asked))
    except Preempted as error:
        return str(error)
    return "it went on"


def test_each_rank_of_each_replica_can_stop_the_run(
    ranks: Ranks, plain_data: str, tmp_path: Path
) -> None:
    config = resumable(plain_data, tmp_path, CCE(), "adam")
    config = dataclasses.replace(laid_out(config, tmp_path / "run", 1), validation=OFF)
    for said in ranks(3).run(stop_from, config, 2):
        assert "stopped after step 2" in said


OFF = ValidationConfig(every_epochs=None)


def step_with_a_broken_replica(config: TrainConfig, broken: int) -> tuple[bool, bool, bool]:
    """Whether the step was skipped, the table is as before, and a later step is taken."""
    run = build(config)
    stepper, batches = run.stepper, list(run.batches)[:4]
    catalog = stepper.model.catalog
    before = catalog.state_dict()["rows"].clone()
    weight = stepper.parameters[0]
    good = weight.detach().clone()
    assert catalog.replicas is not None
    if catalog.replicas.index == broken:
        weight.data.fill_(torch.nan)
    skipped = stepper.take(batches[:2], 1).skipped
    is_same = torch.equal(catalog.state_dict()["rows"], before)
    weight.data.copy_(good)
    later = stepper.take(batches[2:], 2).skipped
    run.held.close()
    return skipped, is_same, later


@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_is_not_finite_in_one_replica_is_skipped_by_all(
    ranks: Ranks, plain_data: str, tmp_path: Path, broken: int
) -> None:
    config = small_config(
        plain_data,
        tmp_path / "run",
        optimizer=OptimizerConfig(accumulate=2),
        parallel=ParallelConfig(shards=2),
        validation=OFF,
    )
    found = ranks(4).run(step_with_a_broken_replica, config, broken)
    assert found == [(True, True, False)] * 4


def traffic_of_a_step(config: TrainConfig) -> tuple[Traffic, int, int, int]:
    """What a rank sends in a step, and numbers of parameters, of its rows, and of its positions."""
    run = build(config)
    stepper, batches = run.stepper, list(run.batches)[:2]
    stepper.take(batches, 1)
    with counted_traffic() as traffic:
        outcome = stepper.take(batches, 2)
    parameters = sum(one.numel() for one in stepper.parameters)
    run.held.close()
    return traffic, parameters, len(stepper.model.catalog.shard.rows), outcome.positions


def test_only_the_sums_of_gradients_and_a_few_numbers_cross_replicas(
    ranks: Ranks, plain_data: str, tmp_path: Path
) -> None:
    config = small_config(
        plain_data,
        tmp_path / "run",
        loss=CCE(),
        catalog=CatalogConfig(optimizer="adam"),
        optimizer=OptimizerConfig(accumulate=2),
        parallel=ParallelConfig(shards=2),
    )
    num_items = Prepared.open(plain_data).num_items
    planned = plan(config, num_items, Machine(ranks=4)).moved
    groups = [[(0, 1), (0, 2)], [(0, 1), (1, 3)], [(2, 3), (0, 2)], [(2, 3), (1, 3)]]
    for (shard, replica), found in zip(
        groups, ranks(4).run(traffic_of_a_step, config), strict=True
    ):
        traffic, parameters, num_rows, positions = found
        sent = {ranks: 0 for ranks, _ in traffic}
        for (of_group, _), number in traffic.items():
            sent[of_group] += number
        assert sent.keys() == {shard, replica, (0, 1, 2, 3)}
        assert traffic[replica, "allreduce"] == 4 * 16 * num_rows
        if num_rows == -(-num_items // 2):  # of two replicas a rank receives what it sends
            assert planned["row gradients of replicas"] == traffic[replica, "allreduce"]
        assert planned["encoder gradients"] == 2 * 4 * parameters * 3 / 4
        small = 1000  # counts, flags, the loss, whether a gradient is dense
        assert sent[replica] - traffic[replica, "allreduce"] < small
        assert 4 * parameters < sent[0, 1, 2, 3] < 4 * parameters + small
        # Each of the two batches of the step is of one replica; states and vectors stay in there.
        assert sent[shard] > 4 * 16 * positions / 4


def stages(run: str, data: str, output: Path) -> tuple[dict[str, float], Traffic, Traffic]:
    """Metrics of a run, the traffic of evaluating and of recommending; writes all outputs."""
    with counted_traffic() as evaluating:
        metrics = evaluate(run, data, output=str(output / "metrics.json"), force=True)["metrics"]
    with counted_traffic() as recommending:
        recommend(RecommendConfig(run=run, prepared=data, output=str(output / "lists")))
    similar(SimilarConfig(run=run, prepared=data, output=str(output / "similar")))
    export(ExportConfig(run=run, prepared=data, output=str(output / "model")))
    memorize(MemorizeConfig(run=run, prepared=data, scales=(0.0, 1.0)))
    return metrics, evaluating, recommending


def train_on_replicas(config: TrainConfig) -> None:
    train(config)


def parquet(folder: Path) -> dict[str, list[Any]]:
    table = pq.read_table(folder)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def test_all_stages_give_on_replicas_what_they_give_alone(
    ranks: Ranks, plain_data: str, tmp_path: Path
) -> None:
    config = small_config(
        plain_data,
        tmp_path / "run",
        catalog=CatalogConfig(optimizer="adam", learning_rate=1e-2),
        optimizer=OptimizerConfig(accumulate=2),
        parallel=ParallelConfig(shards=2),
    )
    ranks(4).run(train_on_replicas, config)
    alone, *_ = stages(config.output, plain_data, tmp_path / "alone")
    shutil.rmtree(tmp_path / "run" / "memory")
    found = ranks(4).run(stages, config.output, plain_data, tmp_path / "four")
    for metrics, evaluating, recommending in found:
        assert metrics == pytest.approx(alone, rel=1e-6, nan_ok=True)
        for traffic in (evaluating, recommending):
            sent = {of: number for (of, name), number in traffic.items() if name == GATHER and of}
            assert sent.pop((0, 1, 2, 3), 0) < 4_000, "all ranks gather the sums of metrics alone"
            assert {len(of_group) for of_group in sent} == {2}, "states stay in their group"
    for name in ("lists", "similar"):
        one, four = parquet(tmp_path / "alone" / name), parquet(tmp_path / "four" / name)
        scores, theirs = one.pop("scores"), four.pop("scores")
        assert one == four
        for mine, its in zip(scores, theirs, strict=True):
            assert its == pytest.approx(mine, rel=1e-4, abs=1e-5)
    items = [parquet(tmp_path / name / "model" / "items") for name in ("alone", "four")]
    assert items[0] == items[1] and len(list((tmp_path / "four/model/items").iterdir())) == 2


def begun_state(config: TrainConfig) -> tuple[int, torch.Tensor]:
    run = build(config)
    run.held.close()
    catalog = run.stepper.model.catalog
    return catalog.row_range.start, catalog.state_dict()["rows"].clone()


def test_a_warm_start_gives_all_replicas_the_same_bits(
    ranks: Ranks, plain_data: str, data: str, tmp_path: Path
) -> None:
    """On other data, so that some items are new and get the mean of the others."""
    earlier = small_config(plain_data, tmp_path / "first", limits=LimitConfig(max_steps=2))
    train(earlier)
    warm = small_config(
        data,
        tmp_path / "warm",
        init_from=InitConfig(run=earlier.output, new_rows="mean"),
        optimizer=OptimizerConfig(accumulate=3),
        parallel=ParallelConfig(shards=1),
    )
    three = ranks(3).run(begun_state, warm)
    _, alone = begun_state(dataclasses.replace(warm, output=str(tmp_path / "alone")))
    for first, rows in three:
        assert first == 0 and torch.equal(rows, three[0][1])
        torch.testing.assert_close(rows, alone, rtol=1e-6, atol=1e-7)
