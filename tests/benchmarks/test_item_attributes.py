"""Held-out items are in no training event, and ties count by chance."""

from pathlib import Path

import attributes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch


def test_a_held_out_item_is_only_the_last_event_of_a_user(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    users, items = draw.integers(0, 40, 600), draw.integers(0, 30, 600)
    log = pa.table({"user_id": users, "item_id": items, "timestamp": draw.permutation(600)})
    pq.write_table(log, tmp_path / "log.parquet")
    attributes.write_cold_log(tmp_path / "log.parquet", tmp_path / "cold.parquet", 0.2, seed=1)
    rows = sorted(log.to_pylist(), key=lambda row: (row["user_id"], row["timestamp"]))
    pairs = zip(rows, [*rows[1:], {"user_id": -1}], strict=True)
    last = [row for row, following in pairs if row["user_id"] != following["user_id"]]
    kept = pq.read_table(tmp_path / "cold.parquet").to_pylist()
    before_last = {row["item_id"] for row in kept if row not in last}
    assert len(before_last) == 24 and all(row in kept for row in last)
    assert kept == [row for row in rows if row in last or row["item_id"] in before_last]


@pytest.mark.parametrize(
    ("scores", "hits"),
    [
        ([9.0] * 9 + [5.0, 1.0], 1.0),  # nine are better
        ([9.0] * 10 + [5.0], 0.0),
        ([9.0] * 8 + [5.0] * 4, 0.5),  # two places for the target and its three equals
    ],
)
def test_a_target_among_equals_is_found_by_chance(scores: list[float], hits: float) -> None:
    target = scores.index(5.0)
    allowed = torch.ones(len(scores), dtype=torch.bool)
    assert attributes.expected_hits(torch.tensor(scores), target, allowed) == hits
