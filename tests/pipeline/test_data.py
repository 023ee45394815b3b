"""Order, coverage, resumption and bytes of the data loader."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipeline.counted_log import NUM_ITEMS, lengths_of, loader, write_prepared

from shardrec.pipeline.prepared.loader import Batch, EvaluationBatches, Prepared, TrainingBatches

Pair = tuple[list[int], list[int]]
WORLD_SIZES = (1, 2, 3, 4)


def sequences(batch: Batch) -> list[Pair]:
    """Inputs and targets of each sequence, without padding."""
    return [
        (row[:n].tolist(), target[:n].tolist())
        for row, target, n in zip(batch.items, batch.targets, batch.lengths.tolist(), strict=True)
    ]


def global_batches(folder: Path, world_size: int, **options: Any) -> list[list[Pair]]:
    """One epoch: the ranks' parts of each global batch, put together in order of rank."""
    parts = [list(loader(folder, rank, world_size, **options)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    return [
        [pair for batch in step for pair in sequences(batch)] for step in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared", lengths_of(157))


@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    folder: Path, world_size: int, windows: str
) -> None:
    assert global_batches(folder, world_size, windows=windows) == global_batches(
        folder, 1, windows=windows
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_position_comes_once_an_epoch(folder: Path, world_size: int, batch_size: int) -> None:
    batches = global_batches(folder, world_size, windows="all", batch_size=batch_size)
    inputs = [item for batch in batches for items, _ in batch for item in items]
    targets = [item for batch in batches for _, items in batch for item in items]
    lengths = lengths_of(157)
    ends = np.cumsum(lengths)
    expected = np.setdiff1d(np.arange(ends[-1]), ends - 1)
    assert sorted(inputs) == expected.tolist()
    assert sorted(targets) == (expected + 1).tolist()
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_the_last_window_is_the_end_of_each_sequence(folder: Path) -> None:
    found = sorted(pair for batch in global_batches(folder, 1) for pair in batch)
    lengths = lengths_of(157)
    ends = np.cumsum(lengths)
    expected = []
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        taken = min(length - 1, 9)
        inputs = list(range(end - 1 - taken, end - 1))
        expected.append((inputs, [item + 1 for item in inputs]))
    assert found == sorted(expected)


def test_epochs_differ_and_a_seed_repeats(folder: Path) -> None:
    batches = loader(folder)
    first, second = ([sequences(batch) for batch in batches] for _ in range(2))
    assert batches.epoch == 2
    assert first != second
    assert [sequences(batch) for batch in loader(folder)] == first


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("later", [1, 2, 3])
def test_restoring_at_every_step_gives_the_same_tail_at_any_number_of_ranks(
    folder: Path, windows: str, later: int
) -> None:
    def two_epochs(batches: TrainingBatches) -> list[list[Pair]]:
        while batches.epoch < 2:
            for batch in batches:
                states.append(json.loads(json.dumps(batches.state_dict())))
                whole.append(sequences(batch))
        return whole

    whole: list[list[Pair]] = []
    states: list[dict[str, Any]] = [loader(folder, windows=windows).state_dict()]
    two_epochs(loader(folder, windows=windows))
    for done, state in enumerate(states):
        tails = []
        for rank in range(later):
            batches = loader(folder, rank, later, windows=windows)
            batches.load_state_dict(state)
            tail = [sequences(batch) for batch in batches]
            while batches.epoch < 2:
                tail += [sequences(batch) for batch in batches]
            tails.append(tail)
        joined = [[pair for part in parts for pair in part] for parts in zip(*tails, strict=True)]
        assert joined[: len(whole) - done] == whole[done:]


def test_a_state_of_another_order_is_refused(folder: Path) -> None:
    state = loader(folder).state_dict()
    with pytest.raises(ValueError, match="must be 10 to continue from this state, got 20"):
        loader(folder, batch_size=20).load_state_dict(state)
    state["step"] = 99
    with pytest.raises(ValueError, match=r"step must be in \[0, 16\], got 99"):
        loader(folder).load_state_dict(state)


@pytest.mark.parametrize("step", [0, 5, 16])
def test_a_state_of_an_earlier_order_goes_on_at_its_step_and_says_so(
    folder: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = list(loader(folder))
    state = loader(folder).state_dict()
    del state["order"]["version"]  # as up to 0.2.0
    state["step"] = step
    parts = [loader(folder, rank, 2) for rank in range(2)]
    for batches in parts:
        batches.load_state_dict(state)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (step == 5)  # at the border of two epochs nothing is lost
    if told:
        assert told[0].startswith("the first 5 of the 16 batches of epoch 1 were in the order of")
    if step < 16:
        rest = [sequences(batch) for batch in parts[0]]
        assert rest == [sequences(batch)[:5] for batch in whole[step:]]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spread = np.random.default_rng(1).lognormal(2.5, 0.8, size=20_000)
    lengths = np.clip(spread, 2, 300).astype(np.int64)
    folder = tmp_path_factory.mktemp("large") / "prepared"
    return write_prepared(folder, lengths, row_group_size=256, files=3)


@pytest.mark.parametrize("windows", ["last", "all"])
def test_the_share_of_targets_is_that_of_the_positions_in_an_epoch(
    folder: Path, windows: str
) -> None:
    batches = loader(folder, windows=windows)
    everything = sum(int(length) - 1 for length in lengths_of(157) if length > 1)
    in_epoch = sum(batch.num_positions for batch in batches)
    assert batches.target_share() == pytest.approx(in_epoch / everything)
    assert (batches.target_share() < 1) is (windows == "last")


@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("batch_size", [37, 256, 2000])
def test_four_ranks_together_read_little_more_than_the_data(
    large: Path, windows: str, batch_size: int
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "windows": windows}
    read = 0
    for rank in range(4):
        batches = loader(large, rank, 4, max_length=50, shuffle_row_groups=32, **options)
        for _ in batches:
            pass
        read += batches.bytes_read
    stored = sum(path.stat().st_size for path in Prepared.open(large).train_files)
    assert 0.9 * stored < read < 1.2 * stored


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_row_groups_are_opened_twice_only_where_ranks_or_windows_meet(
    large: Path, world_size: int
) -> None:
    options: dict[str, Any] = {"batch_size": 64, "shuffle_row_groups": 16}
    opened = 0
    for rank in range(world_size):
        batches = loader(large, rank, world_size, **options)
        before = batches.bytes_read
        for _ in batches:
            pass
        opened += batches.bytes_read - before
    groups = batches._groups
    one_pass = loader(large, **options | {"shuffle_row_groups": 10_000})
    before = one_pass.bytes_read
    for _ in one_pass:
        pass
    share = opened / (one_pass.bytes_read - before)
    num_windows = len(groups) // 16
    # Row groups differ a little in bytes, hence the margin.
    assert share <= 1.02 * (1 + (num_windows * world_size - 1) / len(groups))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts the process's reads")
def test_counted_bytes_are_what_the_process_reads(large: Path) -> None:
    def read_by_process() -> int:
        match = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
        assert match
        return int(match[1])

    batches = loader(large, 1, 4, shuffle_row_groups=16, batch_size=64)
    counted, before = batches.bytes_read, read_by_process()
    for _ in batches:
        pass
    counted, really = batches.bytes_read - counted, read_by_process() - before
    assert counted <= really < 1.02 * counted + 20_000


def batch_of_each_sample(batches: TrainingBatches) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples in the order of the log: the batch of an epoch, and the length."""
    first, batch_of, lengths = [], [], []
    for index, batch in enumerate(batches):
        first += batch.items[:, 0].tolist()
        batch_of += [index] * len(batch.lengths)
        lengths += batch.lengths.tolist()
    order = np.argsort(first)
    return np.array(batch_of)[order], np.array(lengths)[order]


def test_whether_two_samples_share_a_batch_does_not_depend_on_their_lengths(large: Path) -> None:
    batches = loader(large, batch_size=64, shuffle_row_groups=1000, max_length=50)
    shared, alike, epochs = 0.0, 0.0, 6
    for _ in range(epochs):
        batch_of, lengths = batch_of_each_sample(batches)
        table = np.zeros((len(batches), 51))
        np.add.at(table, (batch_of, lengths), 1)
        shared += (table.sum(1) * (table.sum(1) - 1)).sum()
        alike += (table * (table - 1)).sum()
    counts = np.bincount(lengths, minlength=51).astype(float)
    expected = (counts * (counts - 1)).sum() / (len(lengths) * (len(lengths) - 1.0))
    # The share of pairs of equal length, among all pairs of a batch; they come twice in the sums.
    error = (expected * (1 - expected) / (shared / 2)) ** 0.5
    assert abs(alike / shared - expected) < 5 * error


def test_positions_of_batches_vary_as_those_of_random_draws_do(large: Path) -> None:
    batches = loader(large, batch_size=64, shuffle_row_groups=1000, max_length=50)
    positions = [
        batch.num_positions for _ in range(4) for batch in batches if len(batch.lengths) == 64
    ]
    batch_of, lengths = batch_of_each_sample(batches)
    ratio = np.var(positions) / (64 * lengths.var())
    assert 0.75 < ratio < 1.25  # batches of like lengths have a ratio of about 64


def test_padding_is_zero_and_real_positions_are_packed_in_order(folder: Path) -> None:
    batch = next(iter(loader(folder)))
    flat = batch.real_positions()
    assert batch.items.reshape(-1)[flat].tolist() == sum((s for s, _ in sequences(batch)), [])
    padding = torch.ones(batch.items.numel(), dtype=torch.bool).index_fill(0, flat, False)
    assert not batch.items.reshape(-1)[padding].any()
    assert not batch.targets.reshape(-1)[padding].any()
    assert batch.items.shape[1] == batch.lengths.max()


def test_ranks_without_sequences_still_get_every_batch(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "p", np.array([4, 3, 5]), files=1)
    parts = [list(loader(folder, rank, 4, batch_size=2)) for rank in range(4)]
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    empty = parts[0][0]
    assert empty.items.shape == (0, 1) and empty.lengths.shape == (0,)
    assert sum(batch.num_positions for part in parts for batch in part) == 9


def test_the_weight_of_a_position_is_its_targets(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "p", lengths_of(20), weights=True)
    for batch in loader(folder, windows="all"):
        assert batch.weights is not None and batch.weights.dtype == torch.float32
        assert torch.equal(batch.weights, batch.targets / 2)
    assert batch.to("cpu").weights is not None


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_each_user_is_evaluated_once_over_ranks(folder: Path, world_size: int) -> None:
    prepared, users = Prepared.open(folder), []
    counts = set()
    for rank in range(world_size):
        batches = EvaluationBatches(
            prepared, "test", batch_size=3, max_length=4, rank=rank, world_size=world_size
        )
        given = list(batches)
        counts |= {len(given), len(batches)}
        for batch in given:
            seen, targets = (
                [part.tolist() for part in values.split(lengths.tolist())]
                for values, lengths in (batch.seen, batch.targets)
            )
            for row, length, history, wanted in zip(
                batch.items.tolist(), batch.lengths.tolist(), seen, targets, strict=True
            ):
                assert row[:length] == history[-4:] and not any(row[length:])
                users.append((history[0], history, wanted))
    assert len(counts) == 1
    expected = [
        (u, list(range(u, u + 1 + u % 7)), list(range(100 + u, 101 + u + u % 3))) for u in range(23)
    ]
    assert sorted(users) == expected


def test_a_split_without_users_gives_no_batches(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "p", lengths_of(5), test_users=0)
    batches = EvaluationBatches(Prepared.open(folder), "validation", batch_size=3, max_length=4)
    assert batches.num_users == len(batches) == len(list(batches)) == 0


def test_items_are_read_with_their_ids(tmp_path: Path) -> None:
    prepared = Prepared.open(write_prepared(tmp_path / "p", np.array([3])))
    assert prepared.num_items == NUM_ITEMS and prepared.manifest.counts["train_sequences"] == 1
    assert torch.equal(prepared.item_counts(), torch.arange(NUM_ITEMS) % 5)
    assert prepared.item_ids()[7].as_py() == 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"windows": "first"}, "batches.windows must be one of last, all, got 'first'"),
        ({"shuffle_row_groups": -1}, "shuffle_row_groups must be at least 1, got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(folder, **options)
