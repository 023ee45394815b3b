"""Which ranks share a table and which hold replicas: defaults, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks

from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import BatchConfig, TrainingBatches
from shardrec.pipeline.run.config import OptimizerConfig, ParallelConfig, TrainConfig
from shardrec.pipeline.run.layout import Layout, choose_layout
from shardrec.pipeline.run.mesh import agreed_node_size
from shardrec.pipeline.train import build


def test_one_node_is_one_group() -> None:
    assert choose_layout(None, 4, num_ranks=8, node_size=8) == Layout(1, 8)
    assert choose_layout(None, 1, num_ranks=1, node_size=1) == Layout(1, 1)
    assert choose_layout(None, 4, num_ranks=8, node_size=None) == Layout(1, 8)


def test_nodes_hold_replicas_where_a_step_has_a_batch_for_each() -> None:
    assert choose_layout(None, 8, num_ranks=32, node_size=8) == Layout(4, 8)
    uneven = choose_layout(None, 6, num_ranks=32, node_size=8)
    assert (uneven.num_replicas, uneven.num_shards, uneven.turns(6)) == (4, 8, 2)
    assert "a step takes as long as one of 8; optimizer.accumulate=8" in uneven.advice
    assert uneven.describe(6).endswith("each replica takes 1 or 2 of 6 batches of a step")
    kept = choose_layout(None, 1, num_ranks=32, node_size=8)
    assert (kept.num_replicas, kept.num_shards) == (1, 32)
    assert "the 4 nodes share one table" in kept.advice
    assert "optimizer.accumulate=4 (or a multiple)" in kept.advice


def test_all_ranks_share_a_table_if_asked_to() -> None:
    assert choose_layout(0, 4, num_ranks=32, node_size=8) == Layout(1, 32)


@pytest.mark.parametrize(
    ("shards", "ranks", "said"),
    [(4, 6, "got 4; use 3 or 6"), (5, 4, "got 5; use 4"), (7, 16, "got 7; use 4 or 8")],
)
def test_shards_that_do_not_divide_the_ranks_are_refused(
    shards: int, ranks: int, said: str
) -> None:
    with pytest.raises(ValueError, match=f"must divide the {ranks} ranks of the job, {said}"):
        choose_layout(shards, 1, num_ranks=ranks, node_size=None)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_replicas_without_a_batch_are_refused(accumulate: int) -> None:
    said = f"at least the 4 replicas .* got {accumulate}; use 4 or a multiple"
    with pytest.raises(ValueError, match=said):
        choose_layout(2, accumulate, num_ranks=8, node_size=None)


def node_size_of(sizes: list[int | None]) -> int | None:
    return agreed_node_size(sizes[dist.get_rank()])


def test_nodes_of_different_sizes_are_no_replicas(ranks: Ranks) -> None:
    """A size that only some ranks go by would leave them in different groups."""
    assert ranks(3).run(node_size_of, [2, 2, 1]) == [None] * 3
    assert ranks(3).run(node_size_of, [1, 1, 1]) == [1] * 3


def test_replicas_deal_the_batches_of_each_step_among_themselves(plain_data: str) -> None:
    """Also a number of them that does not divide the batches of a step, or of an epoch."""
    held = []
    for replica in range(2):
        batches = TrainingBatches(
            Prepared.open(plain_data),
            BatchConfig(batch_size=8),
            max_length=8,
            replica=replica,
            num_replicas=2,
            accumulate=3,
        )
        held.append([batch.num_positions > 0 for batch in batches])
    assert len(held[0]) % 3, "the last step of the epoch is short"
    dealt = [index % 3 % 2 for index in range(len(held[0]))]
    assert held == [[one == replica for one in dealt] for replica in range(2)]


def built(config: TrainConfig, node_size: int | None) -> tuple[str, int | None]:
    try:
        run = build(config, node_size=node_size)
    except ValueError as error:
        return str(error), None
    with run.held:
        return run.stepper.model.catalog.describe().split("\n")[0], run.config.parallel.shards


def test_a_run_says_its_layout_and_stores_it(ranks: Ranks, plain_data: str, tmp_path: Path) -> None:
    config = small_config(plain_data, tmp_path / "run", optimizer=OptimizerConfig(accumulate=2))
    assert ranks(2).run(built, config, 1) == [("2 replicas of this", 1)] * 2
    refused = dataclasses.replace(
        config, output=str(tmp_path / "other"), parallel=ParallelConfig(shards=3)
    )
    for said, _ in ranks(2).run(built, refused, 1):
        assert "parallel.shards must divide the 2 ranks" in said
    assert not (tmp_path / "other").exists()
