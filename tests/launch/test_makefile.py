"""What the Makefile hands on, from whatever folder it is called and whatever the path is."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SHOW = "#!/bin/sh\nprintf '%s\\n' \"$@\"\n"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder: Path, *words: str) -> list[str]:
    """The lines that make prints when it is called from ``folder``."""
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "log", ["plain.parquet", "a$b.parquet", 'it\'s "mine" é/l og.parquet', "$(x)`y`/*.parquet"]
)
def test_the_path_of_a_log_arrives_as_it_was_typed(log: str, tmp_path: Path) -> None:
    (tmp_path / "shardrec").write_text(SHOW)
    (tmp_path / "shardrec").chmod(0o755)
    words = [f"EVENTS={log}", f"BIN={tmp_path}", "PYTHON=true", "ARGS=--user-column 'Kunde Nr.'"]
    assert make(tmp_path, "demo", *words) == ["demo", "--events", log, "--user-column", "Kunde Nr."]
    assert make(tmp_path, "demo", *words[1:3]) == ["demo"]


def test_setup_from_another_folder_is_of_the_repository(tmp_path: Path) -> None:
    (said,) = make(tmp_path, "setup", "PYTHON=echo")
    script, option, venv = said.split()
    assert (Path(script), option, Path(venv)) == (
        ROOT / "launch" / "setup_env.py",
        "--venv",
        ROOT / ".venv",
    )
    assert not (tmp_path / ".venv").exists()


def test_setup_hands_on_the_device_and_the_torch_asked_for(tmp_path: Path) -> None:
    (said,) = make(tmp_path, "setup", "PYTHON=echo", "DEVICE=cuda", "TORCH=2.14")
    assert said.split()[3:] == ["--device", "cuda", "--torch", "2.14"]
