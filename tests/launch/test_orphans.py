"""A process that has ended is not taken for a later one of the same number."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shardrec.launch.orphans import end_with_launcher, is_running, logs_of_launch, this_process


def test_this_process_runs_and_another_of_its_number_does_not() -> None:
    assert is_running(this_process())
    assert not is_running(f"{os.getpid()}-1"), "the number was given out again"


def test_a_process_that_ended_does_not_run_even_if_nobody_has_waited_for_it() -> None:
    code = "from shardrec.launch.orphans import this_process; print(this_process())"
    words = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert name.startswith(f"{process.pid}-") and not is_running(name)


def test_folders_of_dead_launchers_are_removed_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, odd = tmp_path / f"shardrec-launch-{os.getpid()}-1_abc", tmp_path / "shardrec-launch-x"
    ours = tmp_path / f"shardrec-launch-{this_process()}_a_b"  # a random name may have such a part
    for folder in (dead, odd, ours):
        folder.mkdir()
    with logs_of_launch() as first, logs_of_launch() as second:
        assert set(tmp_path.iterdir()) == {odd, ours, first, second}
    assert set(tmp_path.iterdir()) == {odd, ours}


def test_a_process_that_was_started_by_hand_is_left_alone() -> None:
    with end_with_launcher({"RANK": "0"}):
        assert is_running(this_process())
