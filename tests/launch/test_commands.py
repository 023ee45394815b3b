"""The stages from the command line, one after the other, and what they say to a wrong input."""

import json
from pathlib import Path

import pytest

from shardrec.launch import cli
from shardrec.launch.printing import print_beside

TINY = ("--recipe", "tiny_cpu", "limits.max_steps=2", "validation.every_steps=none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    log, size = (
        str(folder / "log.parquet"),
        ["--users", "300", "--items", "203", "--events", "3000"],
    )
    assert cli.main(["synth", "--output", log, *size, "--clusters", "16"]) == 0
    assert cli.main(["prepare", "--events", log, "--output", str(folder / "prepared")]) == 0
    run = ["--run", str(folder / "run"), *TINY]
    assert cli.main(["train", "--prepared", str(folder / "prepared"), *run]) == 0
    return folder


def test_the_stages_follow_one_another(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prepared", str(data / "prepared"), "--run", str(data / "run"), "--ks", "5,10"]
    assert cli.main(["evaluate", *words]) == 0
    shown = capsys.readouterr().out
    assert "@5" in shown and "@10" in shown and "NDCG" in shown and "±" in shown
    assert "candidates: items with a training event; seen items: removed; ties: by a h" in " ".join(
        shown.split()
    )
    assert len(shown[: shown.index("users, ")].splitlines()) <= 8
    whole = [line for line in shown.splitlines() if str(data) not in line]
    assert max(map(len, whole)) <= 60, "fits a narrow terminal"
    lines = [line.split() for line in shown.splitlines() if line.startswith("NDCG@10")]
    assert {line[2] for line in lines} >= {"popularity", "run"}
    values = [float(line[1]) for line in lines]
    assert values == sorted(values, reverse=True)
    written = json.loads((data / "run" / "metrics.json").read_text())
    assert 0 <= written["metrics"]["NDCG@10"] <= 1


@pytest.mark.parametrize(("value", "said"), [(0.1, True), (0.2, False), (0.3, False)])
def test_a_run_that_a_baseline_beats_is_told_so(
    value: float, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_beside({"NDCG@10": value}, {"popularity": {"NDCG@10": 0.2}}, "run")
    assert ("run is worse than popularity" in capsys.readouterr().out) is said


def test_prepare_says_how_much_of_the_log_each_rank_gets(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--events", str(data / "log.parquet"), "--output", str(data / "prepared")]
    capsys.readouterr()
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    manifest = json.loads((data / "prepared" / "manifest.json").read_text())
    assert f"test: the events from {manifest['split']['test_time']} " in "\n".join(said)
    assert any(line.startswith("training sequences: median ") for line in said)
    (line,) = [line for line in said if "load of the fullest of 2, 3, 4, 8 ranks: " in line]
    loads = [float(word) for word in line.partition(": ")[2].split()]
    largest = [max(shares) * len(shares) for shares in manifest["load_per_rank"].values()]
    assert loads == pytest.approx(largest, abs=0.0051)


def test_preparing_the_same_again_succeeds_and_something_else_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--events", str(data / "log.parquet"), "--output", str(data / "prepared")]
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "is complete already: nothing was done" in capsys.readouterr().out
    assert cli.main([*words, "--force"]) == 0
    assert f"wrote {data / 'prepared'}" in capsys.readouterr().out
    assert cli.main([*words, "--split", "leave_one_out"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("shardrec prepare: output must be a new folder") and said.count("\n") == 1
    )


def test_popularity_is_judged_without_a_run(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--prepared", str(data / "prepared"), "--popularity"]) == 0
    assert "NDCG" in capsys.readouterr().out


def test_the_metrics_of_popularity_are_a_report_like_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pop.json"
    words = ["evaluate", "--prepared", str(data / "prepared"), "--popularity", "--ks", "5"]
    words += ["--output", str(path)]
    assert cli.main(words) == 0
    assert f"metrics in {path}" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["format"] == "shardrec.metrics" and "NDCG@5" in report["metrics"]
    assert report["request"]["source"]["ranking"] == "popularity"
    written = path.stat().st_ino
    assert cli.main(words) == 0 and path.stat().st_ino == written
    assert "nothing to do" in caplog.text and "NDCG" in capsys.readouterr().out
    assert cli.main([*words, "--no-filter-seen"]) == 2
    assert "differs in filter_seen" in capsys.readouterr().err
    assert cli.main([*words, "--force"]) == 0 and path.stat().st_ino != written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--prepared", "P", "--run", "R", "los=cce"], "did you mean"),
        (["train", "--prepared", "P", "--run", "R", "loss=cee"], "did you mean sce, hce, cce"),
        (["train", "--prepared", "P", "--run", "R", "--recipe", "dmeo"], "did you mean demo"),
        (["train", "--prepared", "P", "--run", "R", "--recipe", "demo"], "P"),
        (["train", "--prepare", "P", "--run", "R"], "'--prepare'; did you mean --prepared"),
        (
            ["train", "--prepared", "P", "--run", "R", "output=x"],
            "got --run R and output=x; remove",
        ),
        (
            ["train", "--prepared", "P", "--run", "R", "data=x"],
            "got --prepared P and data=x; remove",
        ),
        (["train", "--prepared", "P", "--run", "R", "seed=1", "seed=2"], "got seed=1 and seed=2"),
        (
            ["train", "--prepared", "P", "--run", "R", "--init-from", "Q", "init_from.run=S"],
            "init_from.run must be set once, got --init-from Q and init_from.run=S; remove one",
        ),
        (["train", "--prepared", "P", "--run", "R", "--grace", "nan"], "--grace must be a number"),
        (["evaluate", "--prepared", "P", "--run", "R", "--ks", "a"], "--ks must be int,int,…, got"),
        (["evaluate", "--prepared", "P", "--popularity", "--run", "R"], "without"),
        (
            ["evaluate", "--prepared", "P", "--popularity", "--checkpoint", "best"],
            "--checkpoint must come with --run, got best; remove it",
        ),
        (["evaluate", "--prepared", "P", "--popularity", "--force"], "--force must come with"),
        (["evaluate", "--prepared", "P", "--run", "R"], "P"),
        (["prepare", "--events", "nowhere.parquet", "--output", "R"], "nowhere.parquet"),
        (["prepare", "--events", "x", "--output", "R", "--splt", "y"], "did you mean --split"),
        (["synth", "--output", "R", "--users", "0"], "users must be at least 1, got 0"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capsys.readouterr().err
    assert code == 2, said
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "R").exists()


def test_a_run_folder_is_written_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (data / "run").iterdir())
    words = ["train", "--prepared", str(data / "prepared"), "--run", str(data / "run"), *TINY]
    assert cli.main(words) == 2
    assert "new or empty folder" in capsys.readouterr().err
    assert before == sorted(path.name for path in (data / "run").iterdir())


def test_a_run_starts_from_another_by_one_option(data: Path, tmp_path: Path) -> None:
    words = ["--prepared", str(data / "prepared"), "--run", str(tmp_path / "run"), *TINY]
    start = ["--init-from", str(data / "run"), "init_from.new_rows=mean"]
    assert cli.main(["train", *words, *start]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())["init_from"]
    assert (told["run"], told["step"], told["new_rows"]) == (str(data / "run"), 2, "mean")
    assert (told["matched_by"], told["items_new"]) == ("same data", 0)
