"""The recipe ``default`` follows the counts of the log, and ends with a memory."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks

from shardrec.launch import cli
from shardrec.modules.losses import CCE, CCEMinus
from shardrec.pipeline.config import override
from shardrec.pipeline.default_recipe import LogSize, default, options_for, read_size
from shardrec.pipeline.memorize import MemorizeConfig, memorize
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.config import MemoryConfig, TrainConfig
from shardrec.pipeline.train import train

QUICK = ["limits.max_epochs=1", "show_progress=no", "device=cpu", "encoder.width=16"]


def chosen(**counts: int) -> TrainConfig:
    return options_for(LogSize(**counts), "data", "run")


def test_a_few_items_are_compared_exactly() -> None:
    assert isinstance(chosen(items=4_096).loss, CCE)
    assert isinstance(chosen(items=4_097).loss, CCEMinus)


def test_very_many_items_keep_one_number_a_row() -> None:
    assert chosen(items=1_000_000).catalog.optimizer == "adam"
    assert chosen(items=1_000_001).catalog.optimizer == "rowwise_adagrad"


def test_the_length_covers_nearly_all_sequences_within_limits() -> None:
    longest = {1: 10, 10: 10, 11: 20, 41: 50, 50: 50, 9_999: 50}
    for length, expected in longest.items():
        assert chosen(long_sequence=length).encoder.max_length == expected


def test_an_epoch_has_some_hundred_steps_whatever_the_log() -> None:
    for sequences in (1, 1_000, 22_363, 200_000, 10**9):
        size = LogSize(sequences=sequences, events=5 * sequences)
        batch = options_for(size, "data", "run").batches.batch_size
        assert 32 <= batch <= 512 and batch & (batch - 1) == 0
        if 32 < batch < 512:
            assert 140 < 1.1 * sequences / batch < 290


def test_larger_logs_take_fewer_epochs_and_narrower_vectors() -> None:
    epochs = {0: 12, 300_000: 12, 1_200_000: 6, 10**9: 3}
    for events, expected in epochs.items():
        assert chosen(events=events).limits.max_epochs == expected
    assert chosen(items=200_000).encoder.width == 128
    assert chosen(items=200_001).encoder.width == 64


def test_dropout_is_less_where_items_have_many_events() -> None:
    assert chosen(items=100, events=9_999).encoder.dropout == 0.3
    assert chosen(items=100, events=10_000).encoder.dropout == 0.2


def test_pairs_of_a_huge_log_are_not_counted_in_one_process() -> None:
    assert chosen(events=50_000_000).memory.neighbors == 32
    assert chosen(events=50_000_001).memory.neighbors == 0


def test_a_log_that_is_not_there_has_the_options_of_a_middling_one(tmp_path: Path) -> None:
    assert default(str(tmp_path), "run") == options_for(LogSize(), str(tmp_path), "run")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("log"))


def test_the_counts_are_those_of_the_prepared_log(log: str) -> None:
    found, prepared = read_size(log), Prepared.open(log)
    events = sum(pc.sum(pq.read_table(p)["length"]).as_py() for p in prepared.train_files)
    assert (found.items, found.events) == (prepared.num_items, events)
    lengths = prepared.manifest.quantiles["train_sequence_length"]
    assert lengths["0.5"] <= found.long_sequence <= lengths["1"]
    assert found.validation_users == 97


def test_the_run_ends_with_the_memory_of_the_best_weights(log: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = override(default(log, str(run)), QUICK)
    end = train(config)
    kept = json.loads((run / "memory/manifest.json").read_text())
    assert kept["tried"][0] == {"scale": 0.0, "NDCG@10": pytest.approx(end.best_metrics["NDCG@10"])}
    written = (run / "memory/manifest.json").stat().st_mtime_ns
    train(config, resume="auto")
    assert (run / "memory/manifest.json").stat().st_mtime_ns == written, "done already"
    shutil.rmtree(run / "memory")
    asked = MemorizeConfig(run=str(run), prepared=log, scales=config.memory.scales, ks=(10,))
    assert memorize(asked).manifest["tried"] == kept["tried"]


def test_without_validation_users_the_usual_scale_is_taken(tmp_path: Path) -> None:
    data, run = prepare_small(tmp_path / "all", validation="none"), tmp_path / "run"
    config = override(default(data, str(run)), QUICK)
    assert train(config).best_step is None
    kept = json.loads((run / "memory/manifest.json").read_text())
    assert kept["tried"] == [] and kept["scale"] == pytest.approx(
        config.memory.scales[0] * config.loss.temperature
    )
    several = dataclasses.replace(
        config, output=str(tmp_path / "new"), memory=MemoryConfig(neighbors=4)
    )
    with pytest.raises(ValueError, match="memory.scales must be one value"):
        train(several)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_workers_end_with_the_same_memory(ranks: Ranks, log: str, tmp_path: Path) -> None:
    pairs = []
    for size in (1, 2):
        memory = MemoryConfig(neighbors=4, scales=(2.0,))
        config = small_config(log, tmp_path / f"run{size}", memory=memory)
        ranks(size).run(train, config)
        pairs.append((tmp_path / f"run{size}/memory/successors.parquet").read_bytes())
    assert pairs[0] == pairs[1]


def test_the_command_says_what_was_chosen_and_why(
    log: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--prepared", log, "--run", str(tmp_path / "run")]
    assert cli.main([*words, "encoder.width=16", "limits.max_epochs=1", "device=cpu"]) == 0
    shown = capfd.readouterr().err
    assert f"recipe default for {read_size(log).items} items" in shown
    assert "item pairs, at the scale" in shown
