"""The generated log: exact sizes, reproducible, known probabilities, an order of four rankings."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.log import generator
from shardrec.pipeline.log.generator import World, blocks
from shardrec.pipeline.synth import SynthConfig, generate

SMALL = SynthConfig(users=300, items=500, events=6_001, clusters=16, seed=5, report_users=100)


def test_the_log_has_the_asked_size_and_columns(tmp_path: Path) -> None:
    report = generate(SMALL, tmp_path / "deep" / "log.parquet")
    table = pq.read_table(tmp_path / "deep" / "log.parquet")
    assert table.schema.names == ["user_id", "item_id", "timestamp"]
    assert set(table.schema.types) == {pa.int64()}
    assert (report.events, report.users, report.items) == (6_001, 300, 500)
    assert table.num_rows == 6_001
    users, counts = np.unique(table.column("user_id"), return_counts=True)
    assert users.tolist() == list(range(300)) and counts.min() >= 2
    items = table.column("item_id").to_numpy()
    assert items.min() >= 0 and items.max() < 500
    times = table.column("timestamp").to_numpy()
    assert times.min() >= SMALL.start_time
    assert times.max() < SMALL.start_time + SMALL.duration_s
    assert (np.diff(times) >= 0).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["log.parquet"]


def test_a_seed_repeats_the_log_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "EVENTS_PER_BLOCK", 2_000)
    reports, tables = [], []
    for chunk in (7_000, 512, 100):
        config = replace(SMALL, chunk_events=chunk)
        reports.append(generate(config, tmp_path / "log.parquet", force=True))
        tables.append(pq.read_table(tmp_path / "log.parquet"))
        groups = pq.read_metadata(tmp_path / "log.parquet").num_row_groups
        assert groups == -(-6_001 // chunk)
    assert reports[0] == reports[1] == reports[2]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    generate(replace(SMALL, seed=6), tmp_path / "log.parquet", force=True)
    assert not pq.read_table(tmp_path / "log.parquet").equals(tables[0])


def test_popularity_falls_as_a_power_of_the_rank(tmp_path: Path) -> None:
    config = SynthConfig(users=10_000, items=5_000, events=200_000)
    generate(config, tmp_path / "log.parquet")
    items = pq.read_table(tmp_path / "log.parquet", columns=["item_id"]).column(0).to_numpy()
    counts = np.sort(np.bincount(items, minlength=5_000))[::-1][10:3_000].astype(float)
    rank = np.log(np.arange(11, 3_001))
    slope, _ = np.polyfit(rank, np.log(np.maximum(counts, 1)), 1)
    assert -1.6 < slope < -0.7
    assert np.corrcoef(rank, np.log(np.maximum(counts, 1)))[0, 1] < -0.97


def test_the_stated_probabilities_are_those_of_the_events() -> None:
    config = SynthConfig(users=60_000, items=400, events=360_000, clusters=8, tastes=2)
    world = World(config)
    stated, seen = np.zeros(8), np.zeros(8)
    total_log = 0.0
    for block in blocks(world):
        probability = world.cluster_probability(block.tastes, block.previous)
        np.testing.assert_allclose(probability.sum(axis=1), 1.0)
        cluster = block.item[block.last] % 8
        stated += probability.sum(axis=0)
        seen += np.bincount(cluster, minlength=8)
        chosen = probability[np.arange(len(cluster)), cluster]
        # A calibrated model's log-likelihood equals its own negative entropy in expectation.
        total_log += float((np.log(chosen) - (probability * np.log(probability)).sum(axis=1)).sum())
    np.testing.assert_allclose(seen, stated, rtol=0.05)
    assert abs(total_log / config.users) < 0.01


def test_the_true_top_ten_is_the_top_of_the_whole_catalog() -> None:
    world = World(replace(SMALL, items=70, clusters=9))
    random = np.random.default_rng(0)
    cluster_probability = random.dirichlet(np.ones(9), size=20)
    items = np.arange(70)
    cluster, rank = items % 9, items // 9
    inside = world.zipf[rank] / world.zipf_cdf[world.sizes[cluster] - 1]
    whole = cluster_probability[:, cluster] * inside
    np.testing.assert_allclose(whole.sum(axis=1), 1.0)
    expected = np.argsort(-whole, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(world.top_items(cluster_probability), expected)


def test_tastes_drift_and_stay_without_drift() -> None:
    def share_of_tastes_kept(drift: float) -> float:
        config = SynthConfig(
            users=500, items=2_000, events=30_000, taste=1.0, follow=0.0, drift=drift, tastes=1
        )
        block = next(iter(blocks(World(config))))
        first = np.append(0, block.last[:-1] + 1)
        return float((block.item[first] % 128 == block.item[block.last] % 128).mean())

    assert share_of_tastes_kept(0.0) == 1.0
    assert share_of_tastes_kept(0.05) < 0.5


def test_the_ceiling_clearly_beats_markov_and_markov_beats_popularity(tmp_path: Path) -> None:
    report = generate(SynthConfig(), tmp_path / "log.parquet")
    assert report.ceiling > 1.6 * report.markov_limit > 1.6 * report.markov
    assert report.markov > 3 * report.popularity
    items = pq.read_table(tmp_path / "log.parquet", columns=["item_id"]).column(0)
    assert len(items.unique()) > 50_000
    text = str(report)
    assert f"{report.ceiling:.4f}" in text and f"{report.popularity:.4f}" in text


def test_markov_without_counted_events_is_popularity(tmp_path: Path) -> None:
    report = generate(replace(SMALL, markov_events=0), tmp_path / "log.parquet")
    assert report.markov == report.popularity


def test_one_cluster_and_one_item_each_are_legal(tmp_path: Path) -> None:
    for clusters in (1, 12):
        config = SynthConfig(users=1, items=12, events=2, clusters=clusters)
        assert generate(config, tmp_path / f"{clusters}.parquet").events == 2


def test_a_log_that_no_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="events must fit on the disk of the output, got 1,000,0"):
        generate(replace(SMALL, events=10**18), tmp_path / "log.parquet")
    assert not list(tmp_path.iterdir())


def test_a_log_is_written_once_and_another_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.parquet"
    first = generate(SMALL, path)
    written = path.stat().st_mtime_ns
    assert generate(SMALL, path) == first
    assert "nothing to do" in caplog.text and path.stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="of other input or options, which differs in seed"):
        generate(replace(SMALL, seed=6), path)
    assert generate(replace(SMALL, seed=6), path, force=True) != first
    path.write_text("not ours")
    with pytest.raises(FileExistsError, match="is another file"):
        generate(SMALL, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 0}, "users must be at least 1, got 0"),
        ({"items": 9}, "items must be at least 10"),
        ({"events": 599}, "events must be at least 2 per user = 600, got 599"),
        ({"clusters": 501}, "clusters must be at most items = 500, got 501"),
        ({"taste": 0.8, "follow": 0.4}, "taste \\+ follow must be at most 1"),
        ({"drift": -0.1}, r"drift must be within \[0, 1\], got -0.1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["", "log\0.parquet", "log\udcff.parquet"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="output must be a path"):
        generate(SMALL, path)


def test_a_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shardrec.pipeline.synth.to_json", no_room)
    with pytest.raises(OSError, match="No space left"):
        generate(SMALL, tmp_path / "log.parquet", force=True)  # fails when the events are written
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_four_times_the_events_need_no_more_memory(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("synth_memory.py"))
    # Freed blocks of more than this size go back to the system, whatever the process did before.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    peaks = []
    for events in (250_000, 1_000_000):
        command = [sys.executable, "-P", script, str(tmp_path / "log.parquet"), str(events)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.3 * peaks[0], peaks
