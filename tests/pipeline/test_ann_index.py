"""The FAISS index of an export: what it finds, what it must not, and what the manifest says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks

from shardrec.kernels.shard import RowShard
from shardrec.launch.cli import main
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE
from shardrec.modules.ranking import top_items
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.served.ann_index import IndexConfig, build_index, index_top_items, open_index
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

HISTORIES = [[3, 9, 4], [], [10_000], list(range(20)), [7]]
WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None
from shardrec.pipeline.serve import Recommender
assert Recommender.open(sys.argv[1]).recommend([[3, 9, 4]], k=4)[0]
try:
    Recommender.open(sys.argv[1], approximate=True, trust_code=True)
except ModuleNotFoundError as error:
    print(error.name)
"""


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(data, tmp_path_factory.mktemp("run") / "run", CCE())


def trained(data: str, folder: Path, loss: CCE) -> str:
    train(small_config(data, folder, catalog=CatalogConfig(learning_rate=0.1), loss=loss))
    return str(folder)


def configured(run: str, data: str, output: Path, **options: Any) -> ExportConfig:
    return ExportConfig(run=run, prepared=data, output=str(output), **options)


@pytest.fixture(scope="module")
def indexed(run: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    export(configured(run, data, folder, faiss="Flat"))
    return folder


@pytest.mark.parametrize("normalize", [False, True], ids=["inner-product", "cosine"])
def test_exact_index_serves_the_lists_of_exact_search(
    data: str, indexed: Path, tmp_path: Path, normalize: bool
) -> None:
    folder = indexed
    if normalize:
        run = trained(data, tmp_path / "run", CCE(normalize=True, temperature=0.1))
        folder = tmp_path / "out"
        export(configured(run, data, folder, faiss="Flat"))
    told = json.loads((folder / "manifest.json").read_text())["faiss"]
    assert told["recall@10"] == 1.0 and told["queries"] > 50
    assert told["num_items"] == int(Recommender.open(folder).allowed.sum()) < 56
    exact = Recommender.open(folder)
    quick = Recommender.open(folder, approximate=True, trust_code=True)
    for filter_seen in (True, False):
        ours = quick.recommend(HISTORIES, k=6, filter_seen=filter_seen)
        theirs = exact.recommend(HISTORIES, k=6, filter_seen=filter_seen)
        assert [[item for item, _ in row] for row in ours] == [
            [item for item, _ in row] for row in theirs
        ]
        for row, other in zip(ours, theirs, strict=True):
            assert [score for _, score in row] == pytest.approx(
                [score for _, score in other], abs=1e-5, nan_ok=True
            )
    whole = quick.recommend([[7]], k=100)[0]
    assert len(whole) == told["num_items"] - 1  # all but the one that was seen


def test_recall_is_measured_against_exact_search(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = F.normalize(torch.randn(3000, 16, generator=generator))
    states = torch.randn(200, 16, generator=generator)
    allowed = torch.arange(3000) % 3 > 0
    path = tmp_path / "index"
    poor = build_index(path, IndexConfig("IVF50,Flat", "nprobe=1"), vectors, allowed, states)
    assert 0.05 < poor["recall@10"] < 0.8
    _, found = index_top_items(open_index(path), states, 10)  # nprobe is stored in the index
    _, exact = top_items(states, RowShard(vectors, 0, 3000, None), 10, allowed=allowed)
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
    assert poor["recall@10"] == pytest.approx(hits / 2000)
    assert allowed[found[found >= 0]].all()
    good = build_index(path, IndexConfig("HNSW32", "efSearch=200"), vectors, allowed, states)
    assert good["recall@10"] > 0.98
    assert good["num_items"] == 2000 and good["queries"] == 200


def test_lists_are_full_after_long_histories(tmp_path: Path) -> None:
    vectors = torch.eye(8) * torch.arange(8, 0, -1)[:, None]
    path = tmp_path / "index"
    build_index(path, IndexConfig("Flat"), vectors, torch.ones(8, dtype=torch.bool), torch.eye(8))
    states, index = torch.ones(2, 8), open_index(path)
    seen = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]), torch.tensor([6, 2])
    scores, items = index_top_items(index, states, 3, seen)
    assert items.tolist() == [[6, 7, -1], [0, 1, 2]]
    assert scores[0].tolist() == [2.0, 1.0, float("-inf")]


@pytest.mark.parametrize("factory", ["HNSW8", "IVF8,Flat"])
def test_a_search_that_finds_too_few_items_is_repeated_exactly(
    run: str, data: str, tmp_path: Path, factory: str
) -> None:
    search = "nprobe=1" if "IVF" in factory else "efSearch=1"
    export(configured(run, data, tmp_path / "out", faiss=factory, faiss_search=search))
    exact = Recommender.open(tmp_path / "out")
    quick = Recommender.open(tmp_path / "out", approximate=True, trust_code=True)
    ids = exact.ids.ids.to_pylist()
    asked = [ids[:20], ids[30:31]]
    ours, theirs = (model.recommend(asked, k=25) for model in (quick, exact))
    assert [len(one) for one in ours] == [len(one) for one in theirs] == [25, 25]
    for one, history in zip(ours, asked, strict=True):
        assert not {name for name, _ in one} & set(history)
    if "IVF" in factory:
        _, found = index_top_items(quick.index, quick.states([torch.tensor([0])]), 25)
        assert (found < 0).any(), "the index alone finds too few"


def test_an_index_that_equal_vectors_spoil_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As new items that begin with the mean vector: the links of a graph lead to one another."""
    generator = torch.Generator().manual_seed(3)
    vectors = F.normalize(torch.randn(1500, 16, generator=generator))
    vectors[500:] = vectors[500]
    states = torch.randn(40, 16, generator=generator)
    allowed, path = torch.ones(1500, dtype=torch.bool), tmp_path / "index"
    built = build_index(path, IndexConfig("HNSW32", "efSearch=16"), vectors, allowed, states)
    assert built["recall@10"] < 0.8
    assert "best items (999 of 1500 vectors are equal to another)" in caplog.text
    seen = torch.arange(50).repeat(40), torch.full((40,), 50)
    _, items = index_top_items(open_index(path), states, 10, seen)
    assert (items >= 50).all(), "full lists, without seen items"
    caplog.clear()
    build_index(path, IndexConfig("Flat"), vectors[:500], allowed[:500], states)
    assert not caplog.text


def export_on_ranks(config: ExportConfig) -> dict[str, Any]:
    return export(config).manifest


def test_any_number_of_ranks_makes_one_index(
    ranks: Ranks, run: str, data: str, tmp_path: Path
) -> None:
    config = configured(run, data, tmp_path / "out", faiss="Flat")
    for manifest in ranks(3).run(export_on_ranks, config):
        assert manifest["faiss"]["recall@10"] == 1.0
        assert [e["path"] for e in manifest["files"]].count("items.faiss") == 1
    served = Recommender.open(tmp_path / "out", approximate=True, trust_code=True)
    assert served.recommend([[7]], k=2)[0]


def test_serving_needs_faiss_only_for_its_index(indexed: Path) -> None:
    words = [sys.executable, "-P", "-c", WITHOUT_FAISS, str(indexed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "faiss\n"), done.stderr


def test_command_builds_an_index_and_refuses_bad_options(
    run: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--run", run, "--prepared", data, "--output", str(tmp_path / "out")]
    assert main([*words, "--faiss", "Nonsense7"]) == 2
    assert "faiss must be an index that FAISS can make" in capsys.readouterr().err
    assert main([*words, "--faiss", "IVF4096,Flat"]) == 2
    assert "faiss must be an index that" in capsys.readouterr().err
    assert main([*words, "--faiss-search", "nprobe=4"]) == 2
    assert "faiss_search must come with an index" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--faiss", "HNSW8", "--faiss-search", "efSearch=64"]) == 0
    assert "recall@10" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["faiss"]
    assert (told["factory"], told["search"]) == ("HNSW8", "efSearch=64")
    assert main(words) == 2  # another request for the same folder
    assert "other input or options" in capsys.readouterr().err


def test_an_index_that_is_not_trusted_is_refused(indexed: Path) -> None:
    with pytest.raises(ValueError, match=r"items.faiss must be trusted .* search exactly"):
        Recommender.open(indexed, approximate=True)


def test_search_without_an_index_is_refused(
    run: str, data: str, indexed: Path, tmp_path: Path
) -> None:
    export(configured(run, data, tmp_path / "out"))
    with pytest.raises(ValueError, match="must hold an index for approximate search"):
        Recommender.open(tmp_path / "out", approximate=True, trust_code=True)
    with pytest.raises(ValueError, match="min_count must be 1 for approximate search, got 0"):
        Recommender.open(indexed, approximate=True, min_count=0)
