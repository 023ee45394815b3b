import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardrec.launch import setup_env
from shardrec.launch.setup_env import Machine, SetupError, choose_device

LAPTOP = Machine(
    system="Linux", architecture="x86_64", python=(3, 12), can_make_venv=True, driver_answers=False
)


@pytest.mark.parametrize(
    ("changes", "requested", "expected"),
    [
        ({}, None, "cpu"),
        ({"driver_answers": True}, None, "cuda"),
        ({"driver_answers": True}, "cpu", "cpu"),
        ({}, "cuda", "cuda"),
        ({"architecture": "aarch64"}, None, "cpu"),
        ({"architecture": "aarch64", "driver_answers": True}, None, "cpu"),
        ({"python": (3, 11)}, None, "cpu"),
        ({"python": (3, 14)}, None, "cpu"),
    ],
    ids=[
        "no-driver",
        "driver",
        "driver-but-cpu-asked",
        "login-node-asks-cuda",
        "arm",
        "arm-with-driver",
        "oldest-python",
        "newest-python",
    ],
)
def test_the_device_follows_the_driver_unless_one_is_asked_for(
    changes: dict[str, object], requested: str | None, expected: str
) -> None:
    assert choose_device(replace(LAPTOP, **changes), requested) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "requested", "words"),
    [
        ({"system": "Darwin", "architecture": "arm64"}, None, "Linux x86-64"),
        ({"system": "Windows", "architecture": "AMD64"}, "cpu", "Linux x86-64"),
        ({"architecture": "aarch64"}, "cuda", "aarch64 for DEVICE=cuda"),
        ({"architecture": "ppc64le"}, None, "Linux x86-64"),
        ({"python": (3, 10)}, None, "Python must be 3.11 to 3.14, got 3.10"),
        ({"python": (3, 15)}, None, "Python must be 3.11 to 3.14, got 3.15"),
        ({"can_make_venv": False}, None, "apt install python3.12-venv"),
        ({}, "gpu", "DEVICE must be cpu or cuda, got gpu"),
    ],
    ids=["mac", "windows", "arm-cuda", "power", "old", "new", "no-venv", "no-such-device"],
)
def test_a_machine_without_wheels_is_told_what_is_supported(
    changes: dict[str, object], requested: str | None, words: str
) -> None:
    with pytest.raises(SetupError) as refused:
        choose_device(replace(LAPTOP, **changes), requested)  # type: ignore[arg-type]
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torchrec_never_pulls_the_other_build_of_fbgemm(device: str) -> None:
    first, second = setup_env.pip_commands(device, Path("/somewhere"))
    other = {"cpu": "fbgemm-gpu==1.8.0", "cuda": "fbgemm-gpu-cpu==1.8.0"}[device]
    assert setup_env.FBGEMM[device] in first and other not in first
    assert "torchrec==1.8.0" not in first
    assert second == ["install", "--no-deps", "torchrec==1.8.0"]


def finished_environment(folder: Path, device: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    stamp = {"device": device, "fingerprint": setup_env.fingerprint(folder.parent)}
    (folder / setup_env.STAMP).write_text(json.dumps(stamp))
    return folder


def test_nothing_is_done_when_the_environment_is_already_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = finished_environment(tmp_path / "venv", "cuda")
    setup_env.set_up(venv, tmp_path, None)
    setup_env.set_up(venv, tmp_path, "cuda")
    assert sorted(path.name for path in venv.iterdir()) == [setup_env.STAMP, "bin"]
    assert not setup_env.is_current(venv, tmp_path, "cpu")


def test_a_changed_requirement_makes_the_environment_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = finished_environment(tmp_path / "venv", "cpu")
    assert setup_env.is_current(venv, tmp_path, None)
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert not setup_env.is_current(venv, tmp_path, None)
    (venv / setup_env.STAMP).write_text("{ cut off")
    assert not setup_env.is_current(venv, tmp_path, None)


def test_the_script_needs_nothing_installed_and_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", setup_env.__file__, "--device", "tpu"]
    done = subprocess.run(
        [*command, "--venv", str(tmp_path / "venv")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        "setup: DEVICE must be cpu or cuda, got tpu; leave it out to let the driver decide\n"
    )
    assert not (tmp_path / "venv").exists()
