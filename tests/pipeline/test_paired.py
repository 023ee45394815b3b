"""Two runs on the same users: a paired comparison by hand, and when there is none."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.outputs.files import sha256
from shardrec.pipeline.report.paired import compare_pairs, paired
from shardrec.pipeline.report.records import RunRecord

PROTOCOL = {
    **{"data_fingerprint": "f00d", "split": "test", "candidates": "all"},
    **{"seen_items": "removed", "ties": "by a hash of the item"},
}


def evaluated(folder: Path, ranks: list[list[int]], split: str = "test") -> RunRecord:
    """A run with these ranks of its users' targets, -1 for those in no list."""
    folder.mkdir()
    path = folder / "metrics.users.parquet"
    pq.write_table(pa.table({"ranks": pa.array(ranks, pa.list_(pa.int32()))}), path)
    evaluation = {
        "request": {"ks": [5, 10]},
        "protocol": {**PROTOCOL, "split": split},
        "users": {"file": path.name, "sha256": sha256(path)},
    }
    record = RunRecord(name=folder.name, config={}, details={}, evaluation=evaluation)
    record.folder = folder
    return record


def gain(rank: int) -> float:
    return 1 / math.log2(rank + 2) if 0 <= rank < 10 else 0.0


def test_a_small_steady_difference_is_found_that_single_errors_would_hide(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(-1, 9, 400)
    second = np.where((generator.random(400) < 0.2) & (first >= 0), first + 1, first)
    records = [
        evaluated(tmp_path / name, ranks[:, None].tolist())
        for name, ranks in (("worse", second), ("better", first))
    ]
    gains = [np.array([gain(rank) for rank in ranks]) for ranks in (first, second)]
    differences = gains[0] - gains[1]
    mean, error = differences.mean(), differences.std(ddof=1) / 20
    (sentence,) = compare_pairs(records, 10)
    assert sentence.startswith(
        f"NDCG@10 of better is {mean:.4f} ± {error:.4f} above that of worse on the same 400 users"
    )
    assert "more than noise (paired" in sentence and "no more" not in sentence
    alone = [one.std(ddof=1) / 20 for one in gains]
    assert mean < 2 * math.hypot(*alone), "unpaired, it would be noise"
    assert paired(differences) == pytest.approx((mean, error))


def test_noise_is_called_noise(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    records = [
        evaluated(tmp_path / name, generator.integers(-1, 10, (400, 1)).tolist())
        for name in ("one", "other")
    ]
    (sentence,) = compare_pairs(records, 10)
    assert "no more than noise" in sentence


def test_other_users_and_missing_files_are_not_compared(tmp_path: Path) -> None:
    ranks = [[0], [3, -1]]
    one, other = (
        evaluated(tmp_path / "one", ranks),
        evaluated(tmp_path / "two", ranks, "validation"),
    )
    assert compare_pairs([one, other], 10) == []
    same = evaluated(tmp_path / "three", ranks)
    assert len(compare_pairs([one, same], 10)) == 1
    assert compare_pairs([one, same], 20) == []
    (tmp_path / "three" / "metrics.users.parquet").unlink()
    assert compare_pairs([one, same], 10) == []
    other = evaluated(tmp_path / "four", ranks)
    path = tmp_path / "four" / "metrics.users.parquet"
    pq.write_table(pa.table({"ranks": pa.array([[1], [1, 1]], pa.list_(pa.int32()))}), path)
    with pytest.raises(ValueError, match="must belong to the metrics.json next to it"):
        compare_pairs([one, other], 10)
