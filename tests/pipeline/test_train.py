"""The trainer: the same on any number of ranks, and honest about what it did."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from tests.pipeline.choices import assert_same_choices, recorded_choices
from tests.pipeline.recorder import Recorder
from tests.pipeline.small_data import Running, prepare_small, small_config
from tests.ranks import RankError, Ranks
from torch import Tensor, nn

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE, RECE, SCE, CCEMinus
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.config import LimitConfig, OptimizerConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

# The gradient of a key's bias is rounding and nothing else: without this Adam would blow it up.
EPS = 1e-4
OFF = ValidationConfig(every_epochs=None)


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


@pytest.fixture(scope="module")
def weighted_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("weighted"), weight_column="weight")


def run_and_summarise(config: TrainConfig) -> dict[str, Any]:
    """Losses, metrics, weights of a run on the ranks of the default group."""
    recorder = Recorder()
    with recorded_choices() as choices:
        train(config, callbacks=[recorder])
    folder = Checkpoints(Path(config.output) / "checkpoints", None).find("last")
    state = load_checkpoint(folder)
    return {
        "losses": [report.loss for report in recorder.steps],
        "norms": [report.gradient_norm for report in recorder.steps],
        "positions": [report.positions for report in recorder.steps],
        "metrics": [dict(report.metrics) for report in recorder.validations],
        "encoder": {name: value.clone() for name, value in state.encoder.items()},
        "rows": state.table["rows"].clone(),
        "choices": choices,
    }


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["positions"] == expected["positions"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    torch.testing.assert_close(found["rows"], expected["rows"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["encoder"], expected["encoder"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "optimizer", "numbers"),
    [  # each loss on both numbers; test_invariants has the optimizers on both too
        (CCE(), "rowwise_adagrad", (2,)),
        (CCE(), "adam", (3,)),
        (CCEMinus(num_negatives=16, share=8), "sparse_adam", (3,)),
        (CCEMinus(num_negatives=16, share=8, proposal="mixed"), "adagrad", (2,)),
        (SCE(items_per_bucket=16), "rowwise_adagrad", (2, 3)),
        (RECE(), "sgd", (2, 3)),
    ],
    ids=["cce", "cce-adam", "cce_minus", "cce_minus-mixed", "sce", "rece"],
)
def test_the_number_of_ranks_is_not_a_hyperparameter(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any, optimizer: str, numbers: tuple[int, ...]
) -> None:
    config = small_config(
        data,
        tmp_path / "alone",
        loss=loss,
        catalog=CatalogConfig(optimizer=optimizer),
        limits=LimitConfig(max_steps=7),
        optimizer=OptimizerConfig(clip_norm=0.5, warmup_steps=3, learning_rate=3e-3, eps=EPS),
        seed=2 if isinstance(loss, SCE) else 1,  # with which every choice is certain
    )
    alone = run_and_summarise(config)
    assert len(set(alone["losses"])) == 7
    assert len(alone["choices"]) == (7 if isinstance(loss, SCE | RECE) else 0)
    for num_ranks in numbers:
        config = dataclasses.replace(config, output=str(tmp_path / f"ranks-{num_ranks}"))
        together = ranks(num_ranks).run(run_and_summarise, config)
        of_ranks = [found["choices"] for found in together]
        # Two scores move apart by at most twice what one moves; rounding grows over the steps.
        assert_same_choices(of_ranks, alone["choices"], times=4, least=0.0)
        for found in together:
            assert_same_run(found, alone)
            for theirs, ours in zip(found["metrics"], alone["metrics"], strict=True):
                assert theirs == pytest.approx(ours, rel=1e-3, nan_ok=True)


def test_a_rank_without_sequences_takes_part(ranks: Ranks, data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path / "alone",
        batches=BatchConfig(batch_size=2),  # fewer sequences than ranks
        limits=LimitConfig(max_steps=3),
        optimizer=OptimizerConfig(eps=EPS),
        validation=OFF,
    )
    alone = run_and_summarise(config)
    config = dataclasses.replace(config, output=str(tmp_path / "ranks"))
    for found in ranks(3).run(run_and_summarise, config):
        assert_same_run(found, alone)


@pytest.mark.parametrize("loss", [SCE(items_per_bucket=16), RECE()], ids=["sce", "rece"])
def test_bucketed_losses_train_on_two_ranks(
    ranks: Ranks, data: str, tmp_path: Path, loss: Any
) -> None:
    limits = LimitConfig(max_epochs=8)
    config = small_config(data, tmp_path / "run", loss=loss, validation=OFF, limits=limits)
    first, second = ranks(2).run(run_and_summarise, config)
    assert first["losses"] == second["losses"]
    part = len(first["losses"]) // 4
    assert sum(first["losses"][-part:]) < sum(first["losses"][:part])


def test_accumulated_batches_are_one_large_batch(weighted_data: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"validation": OFF, "limits": LimitConfig(max_epochs=3)}
    whole = small_config(
        weighted_data,
        tmp_path / "whole",
        batches=BatchConfig(batch_size=1000),
        optimizer=OptimizerConfig(eps=EPS),
        **settings,
    )
    parts = small_config(
        weighted_data,
        tmp_path / "parts",
        batches=BatchConfig(batch_size=17),
        optimizer=OptimizerConfig(accumulate=1000, eps=EPS),
        **settings,
    )
    assert_same_run(run_and_summarise(parts), run_and_summarise(whole))


def test_a_run_repeats_itself_with_dropout(data: str, tmp_path: Path) -> None:
    encoder = EncoderConfig(width=16, max_length=8, dropout=0.5)
    runs = [
        run_and_summarise(small_config(data, tmp_path / name, encoder=encoder, validation=OFF))
        for name in ("first", "second")
    ]
    assert runs[0]["losses"] == runs[1]["losses"]
    plain = run_and_summarise(small_config(data, tmp_path / "plain", validation=OFF))
    assert plain["losses"] != runs[0]["losses"]


def train_another_encoder(config: TrainConfig) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())  # the ranks start apart: rank 0's weights must win
    recorder = Recorder()
    encoder = Running()
    train(config, encoder=encoder, callbacks=[recorder])
    return {
        "losses": [report.loss for report in recorder.steps],
        "weight": encoder.linear.weight.detach(),
    }


def test_any_causal_module_can_be_the_encoder(ranks: Ranks, data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", validation=OFF)
    first, second = ranks(2).run(train_another_encoder, config)
    assert first["losses"] == second["losses"] and first["losses"][-1] < first["losses"][0]
    assert torch.equal(first["weight"], second["weight"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["encoder"] == "Running"


def test_an_encoder_without_parameters_trains_the_table(data: str, tmp_path: Path) -> None:
    recorder = Recorder()
    config = small_config(data, tmp_path / "run", validation=OFF)
    train(config, encoder=nn.Identity(), callbacks=[recorder])
    assert recorder.steps[-1].loss < recorder.steps[0].loss


def test_an_encoder_of_another_shape_or_that_looks_ahead_is_refused(
    data: str, tmp_path: Path
) -> None:
    config = small_config(data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"encoder must return shape \(2, 2, 16\)"):
        train(config, encoder=nn.Linear(16, 8))

    class LooksAhead(nn.Module):
        def forward(self, vectors: Tensor) -> Tensor:
            return vectors + vectors.flip(1)

    with pytest.raises(ValueError, match="encoder must be causal"):
        train(config, encoder=LooksAhead())
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a prepared folder must hold manifest.json"):
        train(small_config(str(tmp_path), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_training_learns_the_successor_of_an_item(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path / "run",
        catalog=CatalogConfig(optimizer="adam", learning_rate=1e-2),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        limits=LimitConfig(max_epochs=30),
        validation=ValidationConfig(
            every_epochs=10, metric="NDCG@5", measure=MeasureConfig(ks=(5,))
        ),
    )
    report = train(config)
    assert report.best_metrics["NDCG@5"] > 0.4  # chance is about 0.06


def test_the_run_folder_says_what_the_run_was(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", log_every=2)
    report = train(config)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["loss"]["type"] == "cce" and stored["encoder"]["width"] == 16
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    events = [line["event"] for line in lines]
    assert events.count("validation") == 2 and events[-1] == "end"
    assert lines[-1]["memory_bytes"] > 10**7 and 0 < lines[-1]["padding_share"] < 0.5
    assert report.seconds_per_step > 0 and report.positions_per_second > 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_folder_that_holds_another_run_is_refused_and_left_alone(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    config = small_config(data, tmp_path / "run")
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"):
        train(config)
    with pytest.raises(RankError, match="output must be a new or empty folder"):
        ranks(2).run(run_and_summarise, config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_bad_options_are_refused_with_the_way_out(data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean NDCG@10"):
        ValidationConfig(metric="ndgc@10")
    with pytest.raises(ValueError, match="limits must name at least one limit"):
        LimitConfig(max_epochs=None)
    with pytest.raises(ValueError, match="limits.max_steps must be above 0, got 0"):
        LimitConfig(max_steps=0)
    with pytest.raises(ValueError, match="optimizer.accumulate must be at least 1"):
        OptimizerConfig(accumulate=0)
    with pytest.raises(ValueError, match="optimizer.clip_norm must be above 0"):
        OptimizerConfig(clip_norm=0.0)
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda"):
        small_config(data, tmp_path, device="gpu")
    endless = small_config(
        data,
        tmp_path / "run",
        limits=LimitConfig(max_epochs=None, max_minutes=1.0),
        optimizer=OptimizerConfig(decay="cosine"),
    )
    with pytest.raises(ValueError, match="optimizer.decay must be 'constant'"):
        train(endless)
    assert not (tmp_path / "run").exists()


def test_validation_without_validation_users_is_refused(tmp_path: Path) -> None:
    data = prepare_small(tmp_path / "data", validation="none")
    with pytest.raises(ValueError, match="validation must be off"):
        train(small_config(data, tmp_path / "run"))
    report = train(small_config(data, tmp_path / "run", validation=OFF))
    assert report.best_step is None and report.best_metrics == {}


def break_one_row_group(data: str) -> None:
    """Put an item outside the catalog into the first row group, and bring the manifest in line."""
    path = Path(data) / "train" / "part-00000.parquet"
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
    items = groups[0]["items"].to_pylist()
    items[0][0] = 10**6
    column = pa.array(items, groups[0].schema.field("items").type)
    groups[0] = groups[0].set_column(groups[0].schema.get_field_index("items"), "items", column)
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for group in groups:
            writer.write_table(group.cast(file.schema_arrow))
    manifest = json.loads((Path(data) / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "train/part-00000.parquet":
            entry["bytes"] = path.stat().st_size
    (Path(data) / "manifest.json").write_text(json.dumps(manifest))


def train_and_catch(config: TrainConfig) -> str:
    try:
        train(config)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "trained"


def test_a_rank_that_cannot_read_stops_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    data = prepare_small(tmp_path / "data")
    break_one_row_group(data)
    batches = BatchConfig(batch_size=1000, shuffle_row_groups=1)
    config = small_config(data, tmp_path / "run", batches=batches)
    messages = ranks(3).run(train_and_catch, config, timeout=30)
    assert all("row group 0, column items must be" in message for message in messages), messages
