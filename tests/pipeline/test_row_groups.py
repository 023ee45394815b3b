"""Row groups that are damaged, gone or outside the catalog are named by place."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.pipeline.counted_log import lengths_of, loader, write_prepared

from shardrec.pipeline.prepared.loader import TrainingBatches


def damaged(tmp_path: Path) -> tuple[TrainingBatches, Path]:
    """A loader over one file that is about to be damaged."""
    folder = write_prepared(tmp_path / "p", lengths_of(40), files=1, weights=True)
    return loader(folder), folder / "train/part-00000.parquet"


def test_a_flipped_bit_is_named_by_file_row_group_and_column(tmp_path: Path) -> None:
    batches, path = damaged(tmp_path)
    footer = pq.read_metadata(path).row_group(3)
    chunk = next(
        footer.column(i) for i in range(4) if footer.column(i).path_in_schema.startswith("weights")
    )
    data = bytearray(path.read_bytes())
    data[chunk.dictionary_page_offset + chunk.total_compressed_size // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"part-00000.parquet, row group 3, column weights must be"
    ):
        list(batches)


def test_a_file_cut_short_under_way_is_named_with_its_row_group(tmp_path: Path) -> None:
    batches, path = damaged(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    with pytest.raises(ValueError, match=r"part-00000.parquet, row group \d, column items must be"):
        list(batches)


def test_a_file_cut_short_before_the_start_is_named(tmp_path: Path) -> None:
    _, path = damaged(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="part-00000.parquet"):
        loader(tmp_path / "p")


def test_a_file_without_a_footer_is_named(tmp_path: Path) -> None:
    _, path = damaged(tmp_path)
    data = bytearray(path.read_bytes())
    data[-4:] = b"PAR2"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="part-00000.parquet must end in a readable Parquet footer"
    ):
        loader(tmp_path / "p")


def test_a_vanished_file_is_named(tmp_path: Path) -> None:
    batches, path = damaged(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="part-00000.parquet must be there"):
        list(batches)
    with pytest.raises(FileNotFoundError, match="part-00000.parquet"):
        loader(tmp_path / "p")


def test_an_item_outside_the_catalog_is_named_by_place(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "p", np.array([5, 4]), files=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["counts"]["items"] = 7
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"row group 0, column items must be in \[0, 7\), got 0 to 8"
    ):
        list(loader(folder))
