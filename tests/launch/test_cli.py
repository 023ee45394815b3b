"""The command line: help, exit codes, one line for a user's mistake, a traceback for a bug."""

import linecache
import os
import subprocess
import sys

import pytest

from shardrec.launch import cli, components
from shardrec.launch.stages import COMMANDS, STAGES


def shardrec(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "shardrec.launch.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_help_names_every_command() -> None:
    done = shardrec("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if f"  {name} " not in done.stdout] == []


# Packages that a user who only asks for help should not wait for.
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "triton", "torchx", "pyarrow", "duckdb", "numpy")
OF_TRAINING = (
    *("torchrec", "fbgemm_gpu", "triton", "torchx", "matplotlib", "tensorboard", "mlflow"),
)
NAMES_LOADED = (
    "import sys\n"
    "from shardrec.launch.cli import main\n"
    "code = main(sys.argv[1:])\n"
    "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
)


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        pytest.param(["--help"], (*HEAVY, "docstring_parser", "rich"), id="shardrec"),
        pytest.param(["prepare", "--help"], ("torch", "torchrec", "torchx", "rich"), id="prepare"),
        pytest.param(["train", "--help"], OF_TRAINING, id="train"),
    ],
)
def test_help_loads_no_heavy_package(words: list[str], heavy: tuple[str, ...]) -> None:
    command = [sys.executable, "-P", "-c", NAMES_LOADED, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    code, *loaded = done.stderr.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert [name for name in heavy if name in loaded] == []


def test_every_stage_has_a_component_of_its_name() -> None:
    found = {
        name: value
        for name, value in vars(components).items()
        if getattr(value, "__module__", "") == components.__name__ and not name.startswith("_")
    }
    assert found.keys() == STAGES.keys()
    for name, component in found.items():
        assert (component.__doc__ or "").splitlines()[0].endswith("."), name


def test_the_help_of_a_component_needs_no_stage_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["launch", "train", "--help"]) == 0
    assert "--max_restarts" in capsys.readouterr().out


def test_a_misspelt_command_lists_near_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evalaute"]) == 2
    assert capsys.readouterr().err == (
        "shardrec: command must be a known name, got 'evalaute'; did you mean evaluate, gate?\n"
    )


def test_nothing_at_all_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: shardrec COMMAND")


def raised_by(source: str) -> Exception:
    """The error of running ``source`` in a module of ours."""
    namespace: dict[str, object] = {"__name__": "shardrec.pipeline.planted"}
    lines = source.splitlines(keepends=True)
    linecache.cache["planted.py"] = (len(source), None, lines, "planted.py")
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
        ("def f():\n    raise ValueError(\n        'on several lines'\n    )\nf()", 2),
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
        "try:\n    int('x')\nexcept ValueError:\n    raise",
    ],
)
def test_a_bug_keeps_its_traceback(source: str) -> None:
    assert not cli.is_for_the_user(raised_by(source))


def test_a_package_that_is_missing_is_named_unless_it_is_ours() -> None:
    error = raised_by("import nowhere_at_all.part")
    assert cli.is_for_the_user(error) and cli.exit_code(error) == 1
    assert cli.one_line(error).startswith("nowhere_at_all is not installed; run `make setup`")
    assert not cli.is_for_the_user(raised_by("import shardrec.nowhere"))


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_variable_shows_the_traceback_of_every_error(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDREC_DEBUG", value)
    assert cli.main(["synth", "--output", "R", "--users", "0"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("shardrec synth: users must be at least 1, got 0")
    assert ("Traceback" in said) == (value == "1")


def test_gpu_memory_is_kept_in_segments_that_grow_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    cli.main(["publish", "--help"])
    assert os.environ.pop(names[0]) == "expandable_segments:True"
    monkeypatch.setenv(names[1], "max_split_size_mb:64")
    cli.main(["publish", "--help"])
    assert names[0] not in os.environ
