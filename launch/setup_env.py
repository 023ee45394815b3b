"""Set up ``.venv`` with the matching set of packages for this machine.

Runs before anything is installed, so it uses the standard library alone:
``python3 launch/setup_env.py [--device cpu|cuda]`` (``make setup``). Does nothing when the
environment is already the one that ``pyproject.toml`` and this file describe.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = ("torch==2.13.0", "triton==3.7.*")
FBGEMM = {"cpu": "fbgemm-gpu-cpu==1.8.0", "cuda": "fbgemm-gpu==1.8.0"}
TORCHREC = "torchrec==1.8.0"

ARCHITECTURES = {"cpu": ("x86_64", "aarch64"), "cuda": ("x86_64",)}
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
SUPPORTED = (
    "the training stack is built for Linux x86-64 (CPU or CUDA) and Linux aarch64 (CPU only) with "
    "Python 3.11 to 3.14; elsewhere `pip install .` gives shardrec.kernels alone, on plain torch"
)
STAMP = ".shardrec-setup.json"


class SetupError(Exception):
    """This machine cannot hold the environment; the message says why and what to do."""


@dataclass(frozen=True)
class Machine:
    """What the choice depends on, as observed or as a test pretends.

    Attributes:
        system: ``platform.system()``.
        architecture: ``platform.machine()``.
        python: (major, minor) of the interpreter that would own the environment.
        can_make_venv: whether ``venv`` can bring pip (Debian puts that in python3-venv).
        driver_answers: whether an NVIDIA driver reports at least one GPU.
    """

    system: str
    architecture: str
    python: tuple[int, int]
    can_make_venv: bool
    driver_answers: bool


def observe() -> Machine:
    """Facts about the machine and the interpreter this runs on."""
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        python=(sys.version_info[0], sys.version_info[1]),
        can_make_venv=all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        driver_answers=count_gpus() > 0,
    )


def count_gpus() -> int:
    """Number of GPUs the NVIDIA driver reports; 0 without a driver.

    Asks the driver and not torch: torch is often a CUDA build where there is no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def choose_device(machine: Machine, requested: str | None) -> str:
    """Return "cpu" or "cuda": ``requested`` if given, else by whether a driver answers.

    Raises:
        SetupError: the wheels do not exist for this machine, or ``venv`` cannot work here.
    """
    if requested is not None and requested not in FBGEMM:
        raise SetupError(
            f"DEVICE must be cpu or cuda, got {requested}; leave it out to let the driver decide"
        )
    check_python(machine)
    built_for_cuda = machine.architecture in ARCHITECTURES["cuda"]
    device = requested or ("cuda" if machine.driver_answers and built_for_cuda else "cpu")
    if machine.system != "Linux" or machine.architecture not in ARCHITECTURES[device]:
        raise SetupError(
            f"the machine must be one the wheels exist for, got {machine.system} "
            f"{machine.architecture} for DEVICE={device}; {SUPPORTED}"
        )
    return device


def check_python(machine: Machine) -> None:
    """Refuse an interpreter without wheels or without a working ``venv``.

    Raises:
        SetupError: with the way out.
    """
    major, minor = machine.python
    if not OLDEST_PYTHON <= machine.python <= NEWEST_PYTHON:
        raise SetupError(
            f"Python must be 3.11 to 3.14, got {major}.{minor}; name another with "
            f"`make setup PYTHON=python3.12`: {SUPPORTED}"
        )
    if machine.system == "Linux" and not machine.can_make_venv:
        raise SetupError(
            f"Python must be able to make a virtual environment, got {major}.{minor} without "
            f"ensurepip; on Debian and Ubuntu run `apt install python{major}.{minor}-venv`"
        )


def pip_commands(device: str, root: Path) -> list[list[str]]:
    """The two ``pip`` argument lists that fill the environment.

    TorchRec comes without its dependencies: its metadata always asks for the CUDA fbgemm, which
    would overwrite the CPU build, and for one old torchmetrics.
    """
    ours = ["--editable", f"{root}[pipeline,dev]"]
    return [
        ["install", *TORCH, FBGEMM[device], *ours],
        ["install", "--no-deps", TORCHREC],
    ]


def fingerprint(root: Path) -> str:
    """Digest of everything that decides what is installed."""
    digest = hashlib.sha256()
    for path in (root / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(venv: Path, root: Path, requested: str | None) -> bool:
    """Whether ``venv`` was completed from the present files, for the requested device.

    Without a request any device will do: a login node may have been set up for GPU nodes.
    """
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return False
    known = stamp.get("fingerprint") == fingerprint(root) and (venv / "bin" / "python").exists()
    return known and requested in (None, stamp.get("device"))


def set_up(venv: Path, root: Path, requested: str | None) -> None:
    """Make ``venv`` hold the matching set; the stamp is written last.

    Raises:
        SetupError: the machine is not supported.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    if is_current(venv, root, requested):
        return
    device = choose_device(observe(), requested)
    print(
        f"Setting up {venv} for {device} (a download of some hundred MB on a new machine)",
        flush=True,
    )
    (venv / STAMP).unlink(missing_ok=True)
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    drop_other_build(python, device)
    for arguments in pip_commands(device, root):
        subprocess.run([python, "-m", "pip", "--quiet", *arguments], check=True)
    stamp = {"device": device, "fingerprint": fingerprint(root)}
    (venv / STAMP).write_text(json.dumps(stamp) + "\n")
    print(f"Ready for {device}: {venv}/bin/shardrec --help", flush=True)


def drop_other_build(python: str, device: str) -> None:
    """Remove fbgemm's build for the other device: both install the same files."""
    other = FBGEMM["cuda" if device == "cpu" else "cpu"].partition("==")[0]
    command = [python, "-m", "pip", "--quiet", "uninstall", "--yes", other]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the set-up; 0 when the environment is complete, 2 when this machine cannot hold it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--device", default=None, help="cpu or cuda (default: ask the NVIDIA driver)"
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="default: .venv")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent.parent
    try:
        set_up(options.venv, root, options.device or None)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"setup: `{' '.join(error.cmd)}` failed; its message is above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
