"""Nearest items equal those of brute force over the whole table, on any number of ranks."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.ranks import Ranks
from torch.nn.functional import normalize

from shardrec.modules.ranking import tie_keys
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.similar import SimilarConfig, similar

UNKNOWN = 10_000


def configured(run: str, data: str, output: Path | str, **options: Any) -> SimilarConfig:
    small = {"k": 4, "batch_size": 5, "block_rows": 7}
    return SimilarConfig(run=run, prepared=data, output=str(output), **(small | options))


def rows_of(output: Path | str) -> list[dict[str, Any]]:
    parts = sorted(Path(output).glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def by_brute_force(run: str, data: str, by: str, k: int) -> dict[int, list[int]]:
    prepared = Prepared.open(data)
    ids, counts = prepared.item_ids().to_pylist(), prepared.item_counts().tolist()
    table = Source.find(run, prepared, "best").load(prepared).catalog.shard.rows.detach()
    table = normalize(table) if by == "cosine" else table
    scores, keys = (table @ table.T).tolist(), tie_keys(torch.arange(len(ids))).tolist()
    left = [item for item in range(len(ids)) if counts[item]]
    return {
        ids[item]: [
            ids[other]
            for other in sorted(left, key=lambda j: (-scores[item][j], keys[j]))
            if other != item
        ][:k]
        for item in range(len(ids))
    }


@pytest.mark.parametrize("by", ["cosine", "dot"])
def test_lists_are_those_of_brute_force(
    run: str, data: str, tmp_path: Path, by: Literal["cosine", "dot"]
) -> None:
    done = similar(configured(run, data, tmp_path / "out", by=by))
    expected = by_brute_force(run, data, by, 4)
    found = {row["item_id"]: row["item_ids"] for row in rows_of(tmp_path / "out")}
    assert found == expected
    assert done.manifest["counts"] == {"items": len(expected), "unknown_items": 0}
    others = by_brute_force(run, data, "dot" if by == "cosine" else "cosine", 4)
    assert others != expected


def test_items_are_listed_in_the_order_asked_for_and_unknown_ones_are_empty(
    run: str, data: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"item_id": [7, UNKNOWN, 3, 7]}), tmp_path / "items.parquet")
    config = configured(run, data, tmp_path / "out", items=str(tmp_path / "items.parquet"))
    assert similar(config).manifest["counts"] == {"items": 4, "unknown_items": 1}
    expected, rows = by_brute_force(run, data, "cosine", 4), rows_of(tmp_path / "out")
    assert [row["item_id"] for row in rows] == [7, UNKNOWN, 3, 7]
    assert [row["item_ids"] for row in rows] == [expected[7], [], expected[3], expected[7]]
    assert rows[1]["scores"] is None
    assert not similar(config).is_new
    pq.write_table(pa.table({"item_id": [7]}), tmp_path / "items.parquet")
    with pytest.raises(FileExistsError, match="which differs in asked"):
        similar(config)


def similar_on_ranks(config: SimilarConfig) -> dict[str, Any]:
    return similar(config).manifest


@pytest.mark.slow
def test_the_number_of_ranks_changes_no_list(
    ranks: Ranks, run: str, data: str, tmp_path: Path
) -> None:
    similar(configured(run, data, tmp_path / "1"))
    for num_ranks in (2, 3):
        ranks(num_ranks).run(similar_on_ranks, configured(run, data, tmp_path / str(num_ranks)))
        for ours, theirs in zip(
            rows_of(tmp_path / str(num_ranks)), rows_of(tmp_path / "1"), strict=True
        ):
            assert ours["item_ids"] == theirs["item_ids"]
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"min_count": -1}, "min_count must be at least 0"),
        ({"by": "angle"}, "by must be one of cosine, dot, got 'angle'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured("run", "data", "out", **options)
