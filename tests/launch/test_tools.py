"""The words of `shardrec launch`: to which command each option belongs, and what is refused."""

import pytest

from shardrec.launch import cli

PREPARE = ["prepare", "--", "--events", "l.parquet", "--output", "p"]
TRAIN = ["--", "--prepared", "data", "--run", "run"]


@pytest.mark.parametrize("before", [[], ["-s", "slurm"], ["-s", "local_cwd", "--log-dir", "train"]])
def test_a_stage_s_arguments_may_follow_the_component_s_name_at_once(
    before: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *before, "--dryrun", *PREPARE]) == 0
    shown = " ".join(capsys.readouterr().out.replace("'", " ").replace(",", " ").split())
    assert "prepare --events l.parquet --output p" in shown


def test_a_second_pair_of_dashes_belongs_to_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "-j1x2", "--name=me", *TRAIN, "--", "loss=sce"]
    assert cli.main(["launch", "-s", "slurm", "--dryrun", *words]) == 0
    shown = capsys.readouterr().out
    assert "-- train --prepared data --run run -- loss=sce" in shown
    assert "--nproc_per_node 2" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--nosuch", "1"], "option of train must be a known name, got '--nosuch'"),
        (["train", "--max-restarts", "1"], "did you mean --max_restarts"),
        (["prepare", "--events", "x"], "(what `shardrec prepare` itself takes follows `--`)"),
        (["prepare", "x"], "arguments must follow an option, got 'x'; what `shardrec prepare`"),
        (["train", "--cpu", "x"], "--cpu must be a whole number, got 'x'; give one"),
        (["train", "--cpu"], "--cpu must be followed by a value, got none; give one"),
        (["train", "--cpu", "--gpu", "1"], "--cpu must be followed by a value, got none"),
        (["train", "--env", "OMP"], "--env must be NAME=VALUE,NAME=VALUE…, got 'OMP'"),
        (["train", "--dryrun"], "--dryrun must stand before train, got it behind; move it"),
        (["traim", "-j", "1x2"], "component must be a known name, got 'traim'; did you mean train"),
        (["--dryrn", "train"], "option must be a known name, got '--dryrn'; did you mean --dryrun"),
        (["train", "-j", "1x0"], "-j must be NODESxWORKERS, both 1 or more, got '1x0'; use 1x2"),
        (["train", "-j", "0x2"], "-j must be NODESxWORKERS, both 1 or more, got '0x2'"),
        (["train", "-j", "ax2"], "-j must be NODESxWORKERS, both 1 or more, got 'ax2'"),
        (["-s", "slurm", "--log-dir", "x", "train"], "--log-dir must come with local workers"),
        (["evaluate", "-j", "2"], "-j must be NODESxWORKERS, both 1 or more, got '2'"),
    ],
)
def test_wrong_words_are_refused_in_one_line_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *words, *TRAIN]) == 2
    said = capsys.readouterr().err
    assert said.startswith("shardrec launch: ") and message in said
    assert said.count("\n") == 1
