"""Exports by somebody else: opening one runs no code, and reads nothing outside of its folder."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from tests.pipeline.exports import ATTACKS, OLD_EXPORT, attacked, own_export, reseal

from shardrec.launch.cli import main
from shardrec.pipeline.gate import measure_export
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.serve import Recommender

DATA = OLD_EXPORT.parent / "prepared"
HISTORIES = [[3], [5, 1, 4]]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """An export of an encoder of this package, made from the stored one."""
    folder = own_export(tmp_path / "ours")
    assert Recommender.open(folder).recommend(HISTORIES, k=2)[0]
    return folder


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_way_of_opening_an_export_runs_its_code(attack: str, tmp_path: Path) -> None:
    folder, marker = attacked(attack, tmp_path)
    with pytest.raises(ValueError, match=r"encoder.pt2 must be trusted to be opened, because"):
        Recommender.open(folder)
    with pytest.raises(ValueError, match="must be trusted"):
        measure_export(folder, Prepared.open(DATA), MeasureConfig(ks=(5,)), "test")
    assert (
        main(["publish", "--export", str(folder), "--published", f"{tmp_path}/p", "--force"]) == 0
    )
    with pytest.raises(ValueError, match="must be trusted"):
        Recommender.open(tmp_path / "p")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["pickled_weight", "opaque_constant", "expression"])
def test_the_attacks_are_real(attack: str, tmp_path: Path) -> None:
    folder, marker = attacked(attack, tmp_path)
    with contextlib.suppress(Exception):
        Recommender.open(folder, trust_code=True)
    assert marker.exists()


def test_a_program_is_not_opened_in_the_place_of_weights(ours: Path, tmp_path: Path) -> None:
    folder, marker = attacked("pickled_weight", tmp_path)
    shutil.copy(folder / "encoder.pt2", ours / "encoder.safetensors")
    reseal(ours)
    with pytest.raises(ValueError, match=r"encoder.safetensors must hold the weights"):
        Recommender.open(ours, trust_code=True)
    assert not marker.exists()


@pytest.mark.parametrize("listed", [[], ["encoder.pt2"]], ids=["none", "program"])
def test_a_file_that_the_manifest_does_not_list_is_not_opened(
    ours: Path, listed: list[str]
) -> None:
    shutil.copy(OLD_EXPORT / "encoder.pt2", ours)
    files = json.loads((ours / "manifest.json").read_text())["files"]
    files = [e for e in files if "items" in e["path"]] + [{"path": name} for name in listed]
    reseal(ours, files=files)
    with pytest.raises(ValueError, match=r"must list encoder.safetensors|must be trusted"):
        Recommender.open(ours)


def absolute(folder: Path, outside: Path) -> str:
    return str(outside)


def upward(folder: Path, outside: Path) -> str:
    return f"items/../../{outside.name}"


def link(folder: Path, outside: Path) -> str:
    (folder / "items/linked.parquet").symlink_to(outside)
    return "items/linked.parquet"


@pytest.mark.parametrize("way", [absolute, upward, link])
def test_files_outside_of_the_export_are_refused(
    ours: Path, tmp_path: Path, way: Callable[[Path, Path], str]
) -> None:
    files = json.loads((ours / "manifest.json").read_text())["files"]
    (items,) = (entry for entry in files if "items" in entry["path"])
    outside = tmp_path / "outside.parquet"
    shutil.move(ours / items["path"], outside)
    items["path"] = way(ours, outside)
    reseal(ours, files=files)
    with pytest.raises(ValueError, match=r"manifest.json must be a file inside of the folder, got"):
        Recommender.open(ours)


def test_a_pipe_or_a_folder_is_refused_and_not_waited_for(ours: Path) -> None:
    manifest, weights = ours / "manifest.json", ours / "encoder.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(FileNotFoundError, match=r"encoder.safetensors' must exist"):
        Recommender.open(ours)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(FileNotFoundError, match=r"must hold manifest.json"):
        Recommender.open(ours)


HUGE = 10**12


@pytest.mark.parametrize(
    "config",
    [
        {"width": HUGE},
        {"max_length": HUGE},
        {"hidden": HUGE},
        {"num_blocks": HUGE},
        {"num_blocks": 1},
        {"kind": "sasrec", "norm": None, "positions": None},
        {"dropout": "often"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_refused_before_memory_is_taken(
    ours: Path, config: dict[str, object]
) -> None:
    before = json.loads((ours / "manifest.json").read_text())["encoder"]
    sizes = {key: value for key, value in config.items() if key in ("width", "max_length")}
    reseal(ours, encoder=before | config, **sizes)
    with pytest.raises(ValueError, match=r"must hold the weights of|that its files can hold"):
        Recommender.open(ours)


def test_no_config_is_refused(ours: Path) -> None:
    reseal(ours, encoder=None)
    with pytest.raises(ValueError, match="must hold the weights of the encoder in its manifest"):
        Recommender.open(ours)


def test_weights_of_another_type_are_refused(ours: Path) -> None:
    path = ours / "encoder.safetensors"
    stored = safetensors.torch.load_file(path)
    halves = {name: value.half() for name, value in stored.items()}
    safetensors.torch.save_file(halves, path)
    reseal(ours)
    with pytest.raises(ValueError, match="differ in name, shape or type"):
        Recommender.open(ours)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_items": HUGE}, "num_items and width that its files can hold"),
        ({"num_items": 1}, "must be 1 with ids of one type"),
        ({"num_items": -1}, "num_items and width"),
        ({"scores": "euclid"}, "scores of"),
        ({"max_length": 0}, "max_length of"),
    ],
)
def test_sizes_that_the_items_do_not_have_are_refused(
    ours: Path, changes: dict[str, object], words: str
) -> None:
    reseal(ours, **changes)
    with pytest.raises(ValueError, match=words):
        Recommender.open(ours)


def test_items_of_other_columns_are_refused(ours: Path) -> None:
    path = next((ours / "items").iterdir())
    table = pq.read_table(path)
    counts = table.column("count").cast(pa.string())
    for changed in (table.drop(["count"]), table.set_column(2, "count", counts)):
        pq.write_table(changed, path)
        reseal(ours)
        with pytest.raises(ValueError, match="must hold items of an export"):
            Recommender.open(ours)
    path.write_bytes(b"PAR1 no parquet PAR1")
    reseal(ours)
    with pytest.raises(ValueError, match="must hold items of an export"):
        Recommender.open(ours)


def test_ids_are_taken_as_they_are_or_refused(ours: Path) -> None:
    model = Recommender.open(ours)
    same = model.recommend([[3, 5]], k=3)
    assert model.recommend([[3.0, 5]], k=3) == same  # type: ignore[list-item]
    assert model.recommend([torch.tensor([3, 5]).numpy()], k=3) == same  # type: ignore[list-item]
    assert model.recommend([[2**70, 3, -(2**64), 5]], k=3) == same
    for wrong in (3.5, "3", None, True, float("nan")):
        with pytest.raises(TypeError, match=r"ids of history 1 must be whole numbers .* got"):
            model.recommend([[5], [wrong]], k=3)  # type: ignore[list-item]


def test_lists_are_never_longer_than_the_catalog(ours: Path) -> None:
    model = Recommender.open(ours, min_count=0)
    (row,) = model.recommend([[3]], k=10**12)
    assert len(row) == len(model.ids) - 1  # all but the one that was seen
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        model.recommend([[3]], k=0)
