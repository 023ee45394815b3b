"""What the operating system refuses becomes a message of what must hold, in every stage alike."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardrec.launch import cli
from shardrec.launch.cli import explain
from shardrec.launch.demo import start_folder

SMALL = ["--users", "300", "--items", "203", "--events", "3000", "--clusters", "16"]
TINY = ["--recipe", "tiny_cpu", "limits.max_steps=1", "validation.every_steps=none"]


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody where the tests run as root, for whom permissions do not count."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """A log, a prepared folder and a run that anybody may read and nobody but us may write."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        log, prepared = str(folder / "log.parquet"), str(folder / "prepared")
        assert cli.main(["synth", "--output", log, *SMALL]) == 0
        assert cli.main(["prepare", "--events", log, "--output", prepared]) == 0
        words = ["train", "--prepared", prepared, "--run", str(folder / "run"), *TINY]
        assert cli.main(words) == 0
        words = ["evaluate", "--prepared", prepared, "--run", str(folder / "run")]
        warm = ["--output", str(folder / "warm.json")]  # what nobody may be unable to import
        assert cli.main([*words, *warm]) == 0
        start_folder(folder / "demo")
        (folder / "demo" / "kept").touch()
        (folder / "unreadable.parquet").write_bytes((folder / "log.parquet").read_bytes())
        (folder / "unreadable.parquet").chmod(0)
        for path in [folder, *folder.rglob("*")]:
            if path.name != "unreadable.parquet":
                path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IRWXU)


STAGES = {
    "synth": ["--output", "D/new.parquet", *SMALL],
    "prepare": ["--events", "D/log.parquet", "--output", "D/new"],
    "train": ["--prepared", "D/prepared", "--run", "D/new", *TINY],
    "evaluate": ["--prepared", "D/prepared", "--run", "D/run"],
    "recommend": ["--prepared", "D/prepared", "--run", "D/run", "--output", "D/new"],
    "export": ["--prepared", "D/prepared", "--run", "D/run", "--output", "D/new"],
    "report": ["D/run", "--output", "D/new.html"],
    "demo": ["--events", "D/log.parquet", "--output", "D/new"],
}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, stage: str, *words: str) -> str:
    """What a stage says that is refused in one line, with exit code 2."""
    capsys.readouterr()
    code = cli.main([stage, *(word.replace("D/", f"{folder}/") for word in words)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (code, said.partition(": ")[0]) == (2, f"shardrec {stage}") and "[Errno" not in said, (
        said
    )
    return said.partition(": ")[2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_cannot_be_written_is_named(
    stage: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data / "run" if stage == "evaluate" else data
    with unprivileged():
        said = refused(capsys, data, stage, *STAGES[stage])
    assert said == (
        f"output must be in a folder that can be written, got {str(folder)!r} (Permission denied); "
        "choose another folder or fix its permissions"
    )


def test_an_earlier_demo_that_cannot_be_replaced_is_named_and_stays(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with unprivileged():
        said = refused(capsys, data, "demo", "--output", "D/demo")
    assert said.startswith("output must be in a folder that can be written, got "), said
    assert f"{data}/demo" in said and (data / "demo" / "kept").is_file()


@pytest.mark.parametrize("stage", ["synth", "prepare", "train", "recommend", "export", "demo"])
def test_an_output_below_a_file_is_refused_by_name(
    stage: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("D/new", "D/log.parquet/new") for word in STAGES[stage]]
    said = refused(capsys, data, stage, *words)
    assert "log.parquet'" in said and "is a file" in said, said


@pytest.mark.parametrize("stage", ["synth", "prepare", "train", "recommend", "export", "demo"])
def test_a_name_that_is_too_long_is_refused(
    stage: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("D/new", f"{tmp_path}/{'x' * 300}") for word in STAGES[stage]]
    said = refused(capsys, data, stage, *words)
    assert said.startswith("names must be short enough for the file system, got "), said
    assert "xxxx" in said


@pytest.mark.parametrize("stage", ["prepare", "demo"])
def test_a_log_that_cannot_be_read_is_named(
    stage: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = data / "unreadable.parquet"
    words = ["--events", str(log), "--output", str(tmp_path / "new")]
    with unprivileged():
        said = refused(capsys, data, stage, *words)
    assert said == (
        f"input must be a file or folder that can be read, got {str(log)!r} (Permission denied); "
        "choose another or fix its permissions"
    )


def test_a_full_disk_is_no_wrong_input() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl")
    assert cli.exit_code(error) == 1
    assert explain(error) == (
        "the disk of the output must have room for it, got No space left on device at "
        "'run/metrics.jsonl'; free some space and start again"
    )


def test_a_message_of_ours_stays_as_it_is() -> None:
    assert explain(OSError(errno.EBUSY, "a must be b, got c; do d")) == "a must be b, got c; do d"
    assert explain(OSError("the bucket answers nothing")) == "the bucket answers nothing"
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "x")) == (
        "path must exist, got 'x'; check it"
    )


def test_a_closed_folder_is_not_mistaken_for_a_file_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        kept, closed = Path(name) / "kept", Path(name) / "closed"
        kept.touch(0o444)
        closed.mkdir(0o700)
        closed.chmod(0)
        Path(name).chmod(0o777)
        with unprivileged():
            errors = [
                PermissionError(errno.EACCES, "refused", str(path)) for path in (kept, closed / "x")
            ]
            file, folder = (explain(error) for error in errors)
        closed.chmod(0o700)
    assert file == (
        f"output must be a file that can be written, got {str(kept)!r} (Permission denied); choose "
        "another name or fix its permissions"
    )
    assert folder == (
        f"path must be in folders that can be entered, got {str(closed / 'x')!r} (Permission "
        f"denied in {str(closed)!r}); choose another or fix its permissions"
    )
