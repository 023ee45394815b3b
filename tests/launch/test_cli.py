"""The command's manners: help, exit codes, one line for a user's mistake, a traceback for ours."""

import subprocess
import sys

import pytest

from shardrec.launch import cli


def shardrec(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "shardrec.launch.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_help_names_every_command() -> None:
    done = shardrec("--help")
    assert done.returncode == 0
    assert [name for name in cli.COMMANDS if f"  {name} " not in done.stdout] == []


def test_the_help_of_a_component_needs_no_stage_arguments() -> None:
    done = shardrec("launch", "train", "--help")
    assert done.returncode == 0 and "--max_restarts" in done.stdout, done.stderr


def test_a_misspelt_command_lists_near_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evalaute"]) == 2
    assert capsys.readouterr().err == (
        "shardrec: command must be a known name, got 'evalaute'; did you mean evaluate, gate?\n"
    )


def test_nothing_at_all_prints_the_help_and_fails() -> None:
    assert shardrec().returncode == 2


def raised_by(source: str) -> Exception:
    """The error of running ``source`` in a module of ours."""
    namespace: dict[str, object] = {"__name__": "shardrec.pipeline.planted"}
    try:
        exec(compile(source, "planted.py", "exec"), namespace)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("raise ValueError('users must be ints')", 2),
        ("raise TypeError('ids must be ints')", 2),
        ("raise RuntimeError('the loss is not finite')", 1),
        ("try:\n    int('x')\nexcept ValueError as e:\n    raise ValueError('told') from e", 2),
        ("open('/nowhere/at/all')", 2),
        ("raise OSError(28, 'No space left on device')", 1),
    ],
)
def test_what_is_raised_for_the_user_becomes_an_exit_code(source: str, code: int) -> None:
    error = raised_by(source)
    assert cli.is_for_the_user(error)
    assert cli.exit_code(error) == code


@pytest.mark.parametrize(
    "source",
    [
        "assert False, 'our bug'",
        "int('not a number')",
        "len()",
        "(lambda a: a)()",
        "{}['missing']",
        "[][0]",
    ],
)
def test_a_bug_keeps_its_traceback(source: str) -> None:
    assert not cli.is_for_the_user(raised_by(source))
