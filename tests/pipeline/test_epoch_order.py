"""The order of an epoch on its own: sample numbers instead of data."""

import numpy as np
import pytest

from shardrec.pipeline.prepared.epoch_order import EpochOrder

SIZES = [8] * 19 + [5]


def epoch_of(
    sizes: list[int], batch_size: int, shuffle_row_groups: int, num_ranks: int = 1, epoch: int = 0
) -> list[list[int]]:
    """The batches of an epoch as sample numbers, the ranks' parts put together."""
    order = EpochOrder(np.array(sizes), batch_size, shuffle_row_groups, seed=3, epoch=epoch)
    first, batches = np.cumsum([0, *sizes]), [list[int]() for _ in range(order.num_steps)]
    for rank in range(num_ranks):
        step = 0
        while step < order.num_steps:
            window = order.window(step)
            slots = window.slots(rank, num_ranks)
            run = window.slot_start(np.array(slots))
            samples, keys = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
            for piece in order.pieces(window, int(run[0]), int(run[1])):
                shuffled, random_keys = order.shuffled(piece.row_group, sizes[piece.row_group])
                own = slice(piece.first, piece.last)
                samples.append(first[piece.row_group] + shuffled[own])
                keys.append(random_keys[own])
            chosen, counts = order.assign(window, slots, np.concatenate(keys))
            parts = np.split(np.concatenate(samples)[chosen], np.cumsum(counts)[:-1])
            for index, part in enumerate(parts):
                batches[window.first_step + index] += part.tolist()
            step = window.first_step + window.num_steps
    return batches


@pytest.mark.parametrize("sizes", [SIZES, [1], [3], [8, 8, 2]], ids=["many", "one", "few", "three"])
@pytest.mark.parametrize("batch_size", [1, 7, 10, 64, 1000])
@pytest.mark.parametrize("shuffle_row_groups", [1, 3, 100])
def test_every_sample_comes_once_and_batches_are_those_of_any_number_of_ranks(
    sizes: list[int], batch_size: int, shuffle_row_groups: int
) -> None:
    whole = epoch_of(sizes, batch_size, shuffle_row_groups)
    assert sorted(sum(whole, [])) == list(range(sum(sizes)))
    assert all(len(batch) == batch_size for batch in whole[:-1])
    for num_ranks in (2, 3, 4):
        assert epoch_of(sizes, batch_size, shuffle_row_groups, num_ranks) == whole


def test_all_pairs_of_two_row_groups_share_a_batch_equally_often() -> None:
    number, epochs = sum(SIZES), 200
    shared = np.zeros((number, number))
    for epoch in range(epochs):
        batch_of = np.zeros(number, dtype=np.int64)
        for index, batch in enumerate(epoch_of(SIZES, 8, 100, epoch=epoch)):
            batch_of[batch] = index
        shared += batch_of[:, None] == batch_of
    row_group = np.arange(number) // 8
    found = shared[row_group[:, None] < row_group] / epochs
    assert found.mean() == pytest.approx(1 / 20, rel=0.1)  # 20 batches
    # As if a coin were tossed for each pair and epoch.
    spread = (found.mean() * (1 - found.mean()) / epochs) ** 0.5
    assert found.std() == pytest.approx(spread, rel=0.1)
