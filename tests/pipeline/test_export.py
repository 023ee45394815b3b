"""Exports: the vectors and the encoder of the live model, usable without the training stack."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.small_data import Running, small_config
from tests.ranks import Ranks

from shardrec.launch.cli import main
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder
from shardrec.modules.losses import CCE
from shardrec.pipeline.export import ExportConfig, encoder_difference, export
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.served.encoder_file import (
    PROGRAM,
    WEIGHTS,
    export_program,
    read_encoder,
    write_encoder,
)
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

README = Path(__file__).resolve().parents[2] / "README.md"
WITHOUT_THE_TRAINING_STACK = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchrec", "fbgemm_gpu", "torchmetrics", "duckdb", "torchx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""
SERVE = f"""{WITHOUT_THE_TRAINING_STACK}
import json
import math
from shardrec.pipeline.serve import Recommender
served = Recommender.open(sys.argv[1])
print(json.dumps(served.recommend(json.loads(sys.argv[2]), k=4)))
"""


@pytest.fixture(scope="module")
def exported(run: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    assert export(configured(run, data, folder)).is_new
    return folder


def configured(run: str, data: str, output: Path, **options: Any) -> ExportConfig:
    return ExportConfig(run=run, prepared=data, output=str(output), block_rows=20, **options)


def lists_of(run: str, data: str, histories: list[list[int]], output: Path) -> Any:
    """What the recommend stage says of the same histories."""
    path = output.with_suffix(".parquet")
    users = {"user_id": list(range(len(histories))), "items": histories}
    pq.write_table(pa.table(users), path)
    recommend(RecommendConfig(run=run, prepared=data, output=str(output), histories=str(path), k=4))
    return pq.read_table(next(output.glob("part-*"))).to_pylist()


class Foreign(TransformerEncoder):
    """An encoder that is not of this package."""


@pytest.mark.parametrize(
    ("encoder_class", "file"), [(TransformerEncoder, WEIGHTS), (Foreign, PROGRAM)]
)
@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("sasrec", None),
        ("modern", None),
        ("sasrec", "learned_from_last"),
        ("ligr", None),
        ("hstu", None),
    ],
)
def test_the_exported_encoder_is_the_live_one_for_any_batch_and_length(
    kind: Any,
    positions: Any,
    encoder_class: type[TransformerEncoder],
    file: str,
    tmp_path: Path,
) -> None:
    config = EncoderConfig(
        width=16, max_length=9, kind=kind, num_heads=2, dropout=0.3, positions=positions
    )
    encoder = encoder_class(config, seed=3)
    name, stored = write_encoder(tmp_path, encoder, 16, 9)
    assert name == file
    manifest = {"files": [{"path": name}], "encoder": stored, "width": 16, "max_length": 9}
    manifest["reads_lengths"] = encoder.reads_lengths
    loaded = read_encoder(tmp_path, manifest, trust_code=file == PROGRAM)
    encoder.eval()
    for shape in [(1, 1), (1, 9), (2, 3), (7, 5), (300, 1)]:
        inputs = [torch.randn(*shape, 16)]
        if encoder.reads_lengths:
            inputs.append(torch.randint(1, shape[1] + 1, shape[:1]))
        torch.testing.assert_close(loaded(*inputs), encoder(*inputs), atol=1e-6, rtol=1e-5)


def test_positions_from_the_last_item_are_served_as_they_were_trained(
    data: str, tmp_path: Path
) -> None:
    encoder = EncoderConfig(width=16, max_length=8, positions="learned_from_last")
    config = small_config(data, tmp_path / "run", encoder=encoder)
    train(config)
    export(configured(config.output, data, tmp_path / "out"))
    served = Recommender.open(tmp_path / "out")
    assert served.manifest["reads_lengths"]
    model = Source.find(config.output, Prepared.open(data), "best").load(Prepared.open(data))
    histories = [torch.tensor([5]), torch.tensor([2, 8, 1, 9]), torch.tensor([7, 3])]
    items = torch.nn.utils.rnn.pad_sequence(histories, batch_first=True)
    with torch.no_grad():
        live = model.last_states(items, torch.tensor([1, 4, 2]))
        torch.testing.assert_close(served.states(histories), live)
        alone = [served.states([one]) for one in histories]
    torch.testing.assert_close(torch.cat(alone), live)


def test_vectors_and_ids_are_those_of_the_model(run: str, data: str, exported: Path) -> None:
    prepared = Prepared.open(data)
    model = Source.find(run, prepared, "best").load(prepared)
    table = pq.read_table(exported / "items")
    assert table.column("item").to_pylist() == list(range(prepared.num_items))
    assert table.column("item_id").to_pylist() == prepared.item_ids().to_pylist()
    assert table.column("count").to_pylist() == prepared.item_counts().tolist()
    vectors = torch.tensor(table.column("vector").to_pylist())
    assert torch.equal(vectors, model.catalog.shard.rows.detach())


def test_manifest_names_run_data_and_catalog(run: str, data: str, exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    prepared = Prepared.open(data)
    source = Source.find(run, prepared, "best")
    assert manifest["request"]["source"] == source.identity
    assert source.identity["data"] == prepared.fingerprint and source.identity["run"]
    assert manifest["catalog_version"] == Recommender.open(exported).ids.version
    assert {"items/part-00000-of-00001.parquet", "encoder.safetensors"} == {
        entry["path"] for entry in manifest["files"]
    }


def export_on_ranks(config: ExportConfig) -> dict[str, Any]:
    return export(config).manifest


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_number_of_ranks_changes_no_vector(
    ranks: Ranks, run: str, data: str, exported: Path, tmp_path: Path, num_ranks: int
) -> None:
    manifests = ranks(num_ranks).run(export_on_ranks, configured(run, data, tmp_path / "out"))
    alone = json.loads((exported / "manifest.json").read_text())
    assert len(manifests[0]["files"]) == num_ranks + 1
    for manifest in manifests:
        assert manifest["catalog_version"] == alone["catalog_version"]
        assert manifest["request"] == alone["request"]
    ours, theirs = pq.read_table(tmp_path / "out" / "items"), pq.read_table(exported / "items")
    assert ours.sort_by("item").equals(theirs)


def test_serving_needs_no_training_stack_and_agrees_with_recommend(
    run: str, data: str, exported: Path, tmp_path: Path
) -> None:
    histories = [[3, 9, 4], [], [10_000], list(range(20)), [7]]
    words = [sys.executable, "-P", "-c", SERVE, str(exported), json.dumps(histories)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    served = json.loads(done.stdout)
    expected = lists_of(run, data, histories, tmp_path / "lists")
    assert [[item for item, _ in row] for row in served] == [row["item_ids"] for row in expected]
    for row, other in zip(served, expected, strict=True):
        scores = other["scores"] or [math.nan] * 4
        assert [score for _, score in row] == pytest.approx(scores, abs=1e-5, nan_ok=True)
    assert [row["scores"] is None for row in expected] == [False, True, True, False, False]


def readme_example() -> str:
    """The block of the README that serves an export."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "pipeline.serve" in block)
    return example


def test_the_example_of_the_readme_serves_in_ten_lines_without_the_training_stack(
    exported: Path, tmp_path: Path
) -> None:
    assert len(readme_example().splitlines()) <= 10
    (tmp_path / "model").symlink_to(exported)
    words = [sys.executable, "-P", "-c", WITHOUT_THE_TRAINING_STACK + readme_example()]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" -> [(") == 2
    probe = [sys.executable, "-P", "-c", f"{WITHOUT_THE_TRAINING_STACK}\nimport torchrec"]
    assert subprocess.run(probe, capture_output=True).returncode  # the block blocks


def test_a_unit_length_loss_is_served_by_angle(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", loss=CCE(normalize=True, temperature=0.1))
    train(config)
    export(configured(config.output, data, tmp_path / "out"))
    histories = [[3, 9, 4], [7]]
    served = Recommender.open(tmp_path / "out").recommend(histories, k=4)
    expected = lists_of(config.output, data, histories, tmp_path / "lists")
    assert [[item for item, _ in row] for row in served] == [row["item_ids"] for row in expected]


def test_another_catalog_is_refused(exported: Path, tmp_path: Path) -> None:
    version = json.loads((exported / "manifest.json").read_text())["catalog_version"]
    assert Recommender.open(exported, catalog_version=version).ids.version == version
    with pytest.raises(ValueError, match="must be of catalog version 0123456789abcdef, got"):
        Recommender.open(exported, catalog_version="0123456789abcdef")


def test_files_of_two_exports_are_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "mixed")
    part = next((tmp_path / "mixed" / "items").iterdir())
    table = pq.read_table(part)
    swapped = table.set_column(0, "item_id", table.column("item_id").combine_chunks()[::-1])
    pq.write_table(swapped, part)
    with pytest.raises(ValueError, match="files of two exports do not fit together"):
        Recommender.open(tmp_path / "mixed")
    (tmp_path / "mixed" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="an export must hold manifest.json"):
        Recommender.open(tmp_path / "mixed")


def test_user_supplied_encoder_is_exported(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run")
    train(config, encoder=Running())
    export(configured(config.output, data, tmp_path / "out"), encoder=Running())
    with pytest.raises(ValueError, match=r"encoder.pt2 must be trusted to be opened"):
        Recommender.open(tmp_path / "out")
    served = Recommender.open(tmp_path / "out", trust_code=True)
    prepared = Prepared.open(data)
    model = Source.find(config.output, prepared, "best", Running()).load(prepared, Running())
    items = torch.tensor([[5, 2, 8]])
    with torch.no_grad():
        live = model.last_states(items, torch.tensor([3]))
        torch.testing.assert_close(served.states([items[0]]), live)


class Untraceable(torch.nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors * 2 if float(vectors.sum()) > 0 else vectors


def test_an_encoder_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(ValueError, match=r"torch.export can trace .* got Untraceable"):
        export_program(Untraceable(), 4, 4)


class Noisy(torch.nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors + torch.randn_like(vectors)


def test_export_is_compared_with_the_live_encoder(exported: Path) -> None:
    told = json.loads((exported / "manifest.json").read_text())
    assert 0 <= told["encoder_difference"] < 1e-5
    with pytest.raises(RuntimeError, match="must return the states of the original"):
        encoder_difference(export_program(Noisy(), 4, 6).module(), Noisy(), 4, 6)


def test_the_command_exports_once(
    run: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--run", run, "--prepared", data, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "catalog version" in capsys.readouterr().out
    assert main(words) == 0
    assert "nothing to do" in capsys.readouterr().out
