"""The demo from one end to the other, and that it replaces nothing before its options are right."""

import shlex
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from shardrec.launch import cli
from shardrec.launch.demo import (
    CLUSTERS,
    LOSS_SETTINGS,
    SETTINGS,
    DemoConfig,
    check_stages,
    next_steps,
    program,
    start_folder,
)
from shardrec.launch.demo_table import METRICS, Row, table
from shardrec.launch.rendezvous import Place
from shardrec.launch.workers import choose_device
from shardrec.pipeline.config import override, snake_case
from shardrec.pipeline.log.generator import SynthConfig, World, blocks
from shardrec.pipeline.recipes import RECIPES


@pytest.mark.parametrize("loss", DemoConfig().losses)
def test_the_settings_of_each_loss_fit_the_recipe(loss: str) -> None:
    start = RECIPES[DemoConfig().recipe](data="data", output="run")
    config = override(
        start, [f"loss={loss}", "limits.max_steps=1", *SETTINGS, *LOSS_SETTINGS.get(loss, ())]
    )
    assert snake_case(type(config.loss).__name__) == loss
    assert not config.validation.is_on


def test_the_generated_catalog_has_fifty_thousand_items_or_more() -> None:
    demo = DemoConfig()
    config = SynthConfig(
        users=demo.users, items=demo.items, events=demo.size, clusters=CLUSTERS, seed=demo.seed
    )
    seen = {int(item) for block in blocks(World(config)) for item in block.item}
    assert len(seen) >= 50_500


def test_the_table_shows_the_share_of_the_gap_where_the_true_model_is_known() -> None:
    rows = [Row("popularity", dict.fromkeys(METRICS, 0.05))]
    rows.append(Row("cce", dict.fromkeys(METRICS, 0.15), 0.25, 2**30))
    known, unknown = shown(rows, 0.25), shown(rows, None)
    assert (
        "50 %" in known and "Coverage@10" in known and "true model" in known and "0.2500" in known
    )
    assert "%" not in unknown and "true model" not in unknown


def shown(rows: list[Row], ceiling: float | None) -> str:
    """The table as text."""
    console = Console(file=StringIO(), width=80)
    console.print(table(rows, 400, 2, ceiling))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("gpus", "expected"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_takes_as_many_workers_as_the_machine_has_gpus_for(
    gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, gpus)
    config = DemoConfig()
    assert config.num_workers == expected
    check_stages(config)
    places = [Place(rank=rank, local_rank=rank, world_size=expected) for rank in range(expected)]
    devices = {str(choose_device(place)) for place in places}
    assert devices == ({f"cuda:{rank}" for rank in range(expected)} if gpus else {"cpu"})
    told = next_steps(config, "log", Path("data"), "shardrec")
    assert f"launch train -j 1x{expected} --" in told


def test_more_workers_than_gpus_are_refused_before_an_earlier_demo_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpus(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"workers must be at most the 1 GPU\(s\) .* got 2"):
        check_stages(DemoConfig(workers=2))


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets torch say that there are GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)


SMALL = ["--users", "400", "--items", "300", "--size", "4000", "--steps", "3"]


@pytest.mark.slow
def test_the_demo_generates_trains_and_shows_a_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "de mo"
    words = ["--output", str(folder), *SMALL, "--losses", "cce_minus", "--workers", "1"]
    assert cli.main(["demo", *words]) == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    for name in ("popularity", "knn_next", "cce_minus", "true model", "NDCG@10"):
        assert name in shown
    assert (folder / "runs" / "cce_minus" / "metrics.json").is_file()
    assert "stopped at step 3" in (folder / "logs" / "cce_minus.log").read_text()
    (folder / "prepared" / "manifest.json").rename(folder / "prepared" / "kept")
    assert cli.main(["demo", *words, "--recipe", "dmeo"]) == 2
    assert "did you mean demo" in capfd.readouterr().err
    assert (folder / "prepared" / "kept").is_file(), "an earlier demo stays"


@pytest.mark.slow
def test_the_demo_takes_a_log_with_other_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    events = [(f"u{k % 50}", k * k % 31, 1_700_000_000 + k) for k in range(2000)]
    names = ["Kunde Nr.", "item_id", "timestamp"]
    pq.write_table(pa.table(dict(zip(names, zip(*events, strict=True), strict=True))), "l og.pq")
    words = ["--events", "l og.pq", "--user-column", "Kunde Nr.", "--losses", "rece"]
    assert cli.main(["demo", *words, "--steps", "2"]) == 0
    shown = capfd.readouterr().out
    assert "popularity" in shown and "rece" in shown and "true model" not in shown
    prepare = next(line for line in shown.splitlines() if "prepare --events" in line)
    command, *again = shlex.split(prepare)
    assert Path(command).is_file(), "PATH does not lead to it"
    assert cli.main(again) == 0, "the printed command works as it stands"


def test_the_printed_commands_start_the_program_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a path below the current folder is told without it
    found = program()
    monkeypatch.setenv("PATH", "/nowhere")
    assert Path(program()).is_file() and found in ("shardrec", program())
    told = next_steps(DemoConfig(losses=("sce",)), "log", Path("data"), ".venv/bin/shardrec")
    assert "  .venv/bin/shardrec prepare --events path/to/log.parquet --output data" in told
    assert "--recipe demo loss=sce" in told
    assert "with the recipe's own model" in told and "The same" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "foo"], "recipe must be a known name, got 'foo'"),
        (["--losses", "ces"], "losses must be a known name, got 'ces'; did you mean sce, hce, cce"),
        (["--losses", "sce,sce"], "losses must be named once each, got sce,sce"),
        (["--users", "0"], "users must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be"),
        (["--user-column", "customer"], "user_column must come with events, got 'customer'"),
        (["--events", "l.parquet", "--items", "3"], "items must come without events, got 3"),
    ],
)
def test_a_wrong_option_is_refused_before_an_earlier_demo_goes(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    start_folder(folder)
    (folder / "kept").touch()
    assert cli.main(["demo", "--output", str(folder), *words]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "kept").is_file()
    start_folder(folder)
    assert not (folder / "kept").exists()
