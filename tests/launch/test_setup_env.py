import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardrec.launch import setup_env
from shardrec.launch.setup_env import (
    Machine,
    SetupError,
    choose_device,
    choose_torch,
    matching_sets,
)

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


def test_the_default_set_or_the_one_asked_for_is_installed() -> None:
    assert choose_torch(None) == setup_env.DEFAULT_TORCH
    assert [choose_torch(name) for name in matching_sets()] == ["2.14", "2.13", "2.11"]
    with pytest.raises(SetupError, match=r"TORCH must be one of 2.14, 2.13, 2.11, got 2.12; leave"):
        choose_torch("2.12")


def test_a_set_names_every_package_that_is_built_against_torch() -> None:
    packages = ["torch", "triton", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec"]
    for name, releases in matching_sets().items():
        assert list(releases) == packages
        assert releases["torch"].startswith(f"{name}.")
    assert matching_sets()["2.13"]["torchrec"] == "1.8.0"


@pytest.mark.parametrize("torch", ["2.13", "2.14"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torchrec_never_pulls_the_other_build_of_fbgemm(device: str, torch: str) -> None:
    first, second, third = setup_env.pip_commands(device, torch, Path("/somewhere"))
    builds = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
    build = builds.pop(device)
    (other,) = builds.values()
    assert "uninstall" in first and first[-1] == other
    assert second[0] == "install" and build in second and other not in second
    assert "torchrec" not in second
    of_set = ["--constraint", str(setup_env.CONSTRAINTS / f"torch-{torch}.txt")]
    assert third == ["install", *of_set, "--no-deps", "torchrec"]
    assert second[1:3] == of_set


def test_every_package_but_the_sets_has_one_tested_release() -> None:
    lines = (setup_env.CONSTRAINTS / "others.txt").read_text().split()
    names = [
        name.lower().replace("_", "-") for name, _, _ in (one.partition("==") for one in lines)
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line) for line in lines)
    assert not {name for one in matching_sets().values() for name in one} & set(names)
    assert {"duckdb", "pyarrow", "torchmetrics", "pytest", "mypy", "ruff"} <= set(names)


def finished_environment(folder: Path, **chosen: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    stamp = chosen | {"fingerprint": setup_env.fingerprint(folder.parent)}
    (folder / setup_env.STAMP).write_text(json.dumps(stamp))
    return folder


def test_nothing_is_done_when_the_environment_is_already_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = finished_environment(tmp_path / "venv", device="cuda", torch="2.14")
    for requested in ({}, {"device": "cuda"}, {"torch": "2.14"}):
        setup_env.set_up(venv, tmp_path, requested)
    assert sorted(path.name for path in venv.iterdir()) == [setup_env.STAMP, "bin"]
    assert not setup_env.is_current(venv, tmp_path, {"device": "cpu"})
    assert not setup_env.is_current(venv, tmp_path, {"torch": "2.13"})


def test_a_changed_requirement_makes_the_environment_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = finished_environment(tmp_path / "venv", device="cpu", torch="2.13")
    assert setup_env.is_current(venv, tmp_path, {})
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert not setup_env.is_current(venv, tmp_path, {})
    (venv / setup_env.STAMP).write_text("{ cut off")
    assert not setup_env.is_current(venv, tmp_path, {})


def test_an_environment_out_of_date_keeps_the_device_and_the_torch_it_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = finished_environment(tmp_path / "venv", device="cuda", torch="2.14")
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    monkeypatch.setattr(setup_env, "observe", lambda: LAPTOP)
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command[4:]))
    setup_env.set_up(venv, tmp_path, {})
    assert ran == setup_env.pip_commands("cuda", "2.14", tmp_path)
    setup_env.set_up(venv, tmp_path, {"torch": "2.13"})
    assert ran[3:] == setup_env.pip_commands("cuda", "2.13", tmp_path)
    assert setup_env.is_current(venv, tmp_path, {"device": "cuda", "torch": "2.13"})


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
