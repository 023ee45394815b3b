"""Text columns beyond 2 GiB, for real: where 32-bit offsets end, nothing is cut or refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.launch.cli import main
from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.prepare import prepare
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.serve import Recommender

ITEMS, BLOCK, PADDING = 1_200_000, 100_000, "x" * 1880


def ids(numbers: range) -> list[str]:
    return [f"{PADDING}{number:020d}" for number in numbers]


def write_long_log(path: Path) -> None:
    """Every item twice, in blocks: 2.3 GB of different ids, with 20 items a user."""
    schema = [("user_id", pa.int64()), ("item_id", pa.string()), ("timestamp", pa.int64())]
    with pq.ParquetWriter(path, pa.schema(schema), compression="zstd", use_dictionary=False) as out:
        for again in range(2):
            for start in range(0, ITEMS, BLOCK):
                numbers = np.arange(start, start + BLOCK)
                values = [numbers // 20, ids(range(start, start + BLOCK)), numbers + again * 10**7]
                out.write_table(
                    pa.Table.from_arrays(list(map(pa.array, values)), schema=out.schema)
                )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_item_ids_beyond_2_gib_are_prepared_trained_on_and_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_long_log(Path("log.parquet"))
    options = {"split": "leave_one_out", "validation": "none", "memory_limit": "6GB"}
    config = PrepareConfig(events="log.parquet", output="prepared", threads=1, **options)  # type: ignore[arg-type]
    assert prepare(config).counts["items"] == ITEMS
    items = pq.read_table("prepared/items.parquet", columns=["item_id", "item"])
    assert items.nbytes > 2**31
    first = pq.read_table("prepared/test.parquet").slice(0, 1).to_pylist()[0]
    numbers = range(20 * first["user_id"], 20 * first["user_id"] + 20)
    dense = first["items"] + first["targets"]
    item_ids = items["item_id"].cast(pa.large_string())
    assert item_ids.take(dense).to_pylist() == 2 * ids(numbers)
    catalog = ItemIds(item_ids.combine_chunks())
    assert catalog.items(pa.array(ids(numbers))).tolist() == dense[:20]
    del items, item_ids, catalog
    train = ["train", "--prepared", "prepared", "--run", "run", "--recipe", "tiny_cpu"]
    train += ["validation.every_epochs=none", "validation.every_steps=none"]
    assert main([*train, "limits.max_steps=1", "encoder.width=8", "show_progress=false"]) == 0
    stage = ["--prepared", "prepared", "--run", "run"]
    assert main(["export", *stage, "--output", "model"]) == 0
    (listed,) = Recommender.open("model").recommend([ids(numbers)], k=3)
    assert len(listed) == 3 and str(listed[0]).count(PADDING)
