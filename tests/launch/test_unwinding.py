"""Signals to stages of one process: their code, no traceback, nothing left over."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.pipeline.event_logs import write_random_log

from shardrec.launch.unwinding import sigterm_unwinds

CLI = [sys.executable, "-P", "-m", "shardrec.launch.cli"]
SYNTH = ["synth", "--events", "50_000_000", "--users", "2_000_000", "--output"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A log that takes seconds to prepare."""
    return write_random_log(tmp_path_factory.mktemp("log") / "log.parquet", 4_000_000)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("stage", "started"),
    [("prepare", Path(".out.partial", "work", "events.duckdb")), ("synth", Path("out.partial"))],
)
def test_a_signal_ends_a_stage_without_a_trace(
    number: signal.Signals, stage: str, started: Path, log: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    prepare = ["prepare", "--events", log, "--threads", "1", "--output", output]
    words = prepare if stage == "prepare" else [*SYNTH, output]
    process = subprocess.Popen([*CLI, *words], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / started, process)
        time.sleep(0.2)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (CODES[number], "")
    assert list(tmp_path.iterdir()) == []


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.005)


def test_a_second_sigterm_does_not_disturb_the_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(SystemExit) as stopped, sigterm_unwinds():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert stopped.value.code == 143 and cleaned
    assert signal.getsignal(signal.SIGTERM) is before
