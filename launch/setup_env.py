"""Set up ``.venv`` with a matching set of packages for this machine (``make setup``).

It runs before anything is installed, so it uses only the standard library. The sets are the files
``constraints/torch-*.txt``; ``constraints/others.txt`` holds the tested release of every other
package. It does nothing if the environment is already complete.
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

DEFAULT_TORCH = "2.13"
CONSTRAINTS = Path(__file__).resolve().parent / "constraints"
FBGEMM_BUILDS = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
ARCHITECTURES = {"cpu": ("x86_64", "aarch64"), "cuda": ("x86_64",)}
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
SUPPORTED = (
    "the training stack is built for Linux x86-64 (CPU or CUDA) and Linux aarch64 (CPU only) with "
    "Python 3.11 to 3.14; elsewhere `pip install .` gives shardrec.kernels alone, on plain torch"
)
STAMP = ".shardrec-setup.json"


class SetupError(Exception):
    """The environment cannot be set up on this machine; the message says why and what to do."""


@dataclass(frozen=True)
class Machine:
    """Facts about a machine and the Python interpreter for the environment."""

    system: str
    architecture: str
    python: tuple[int, int]
    can_make_venv: bool  # Debian leaves that out of python3
    driver_answers: bool  # an NVIDIA driver reports at least one GPU


def matching_sets() -> dict[str, dict[str, str]]:
    """The sets of releases that were built against each other, by the minor release of torch.

    Newest first; each set maps the name of a package to its release, such as "1.8.0" or "3.7.*".
    """
    sets = {}
    for path in CONSTRAINTS.glob("torch-*.txt"):
        lines = path.read_text().split()
        sets[path.stem.removeprefix("torch-")] = dict(line.split("==") for line in lines)
    return dict(sorted(sets.items(), key=lambda one: int(one[0].split(".")[1]), reverse=True))


def observe() -> Machine:
    """Facts about this machine and this interpreter."""
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        python=sys.version_info[:2],
        can_make_venv=all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        driver_answers=count_gpus() > 0,
    )


def count_gpus() -> int:
    """Number of GPUs the NVIDIA driver reports; 0 without a driver.

    It asks the driver and not torch, because torch is often a CUDA build on machines without a GPU.
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
    """The device to install for, "cpu" or "cuda": as requested, else "cuda" if a driver responds.

    Raises:
        SetupError: The wheels do not exist for this machine, or ``venv`` cannot work on it.
    """
    if requested not in (None, *FBGEMM_BUILDS):
        raise SetupError(
            f"DEVICE must be cpu or cuda, got {requested}; leave it out to let the driver decide"
        )
    built_for_cuda = machine.architecture in ARCHITECTURES["cuda"]
    device = requested or ("cuda" if machine.driver_answers and built_for_cuda else "cpu")
    python = ".".join(map(str, machine.python))
    if not OLDEST_PYTHON <= machine.python <= NEWEST_PYTHON:
        raise SetupError(
            f"Python must be 3.11 to 3.14, got {python}; choose another with "
            f"`make setup PYTHON=python3.12`: {SUPPORTED}"
        )
    if machine.system != "Linux" or machine.architecture not in ARCHITECTURES[device]:
        raise SetupError(
            f"the machine must be one the wheels exist for, got {machine.system} "
            f"{machine.architecture} for DEVICE={device}; {SUPPORTED}"
        )
    if not machine.can_make_venv:
        raise SetupError(
            f"Python must be able to make a virtual environment, got {python} without ensurepip; "
            f"on Debian and Ubuntu run `apt install python{python}-venv`"
        )
    return device


def choose_torch(requested: str | None) -> str:
    """The minor release of torch to install.

    Raises:
        SetupError: There is no set for the release requested.
    """
    known = matching_sets()
    if requested not in (None, *known):
        raise SetupError(
            f"TORCH must be one of {', '.join(known)}, got {requested}; "
            f"leave it out for {DEFAULT_TORCH}"
        )
    return requested or DEFAULT_TORCH


def pip_commands(device: str, torch: str, root: Path) -> list[list[str]]:
    """The argument lists of the ``pip`` calls that fill the environment, in order.

    TorchRec is installed without its dependencies: its metadata always require the CUDA build of
    fbgemm, which would overwrite the CPU build, and one old release of torchmetrics.
    """
    of_set = ["--constraint", str(CONSTRAINTS / f"torch-{torch}.txt")]
    of_others = ["--constraint", str(CONSTRAINTS / "others.txt")]
    (other_build,) = (name for build, name in FBGEMM_BUILDS.items() if build != device)
    ours = ["torch", "triton", FBGEMM_BUILDS[device], "--editable", f"{root}[pipeline,dev]"]
    return [
        ["--quiet", "uninstall", "--yes", other_build],  # both builds install the same files
        ["install", *of_set, *of_others, *ours],
        ["install", *of_set, "--no-deps", "torchrec"],
    ]


def fingerprint(root: Path) -> str:
    """Digest of everything that determines what is installed."""
    version = root.glob("src/*/__init__.py")
    files = [root / "pyproject.toml", *version, Path(__file__), *sorted(CONSTRAINTS.iterdir())]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """The device, torch and fingerprint that ``venv`` was completed for; empty if it was not."""
    try:
        return dict(json.loads((venv / STAMP).read_text()))
    except (OSError, ValueError):
        return {}


def is_current(venv: Path, root: Path, requested: dict[str, str]) -> bool:
    """Whether ``venv`` was completed from the current files, for the requested device and torch.

    Without a request any device and torch count: a login node may be set up for GPU nodes.
    """
    stamp = read_stamp(venv)
    expected = {**stamp, **requested, "fingerprint": fingerprint(root)}
    return stamp == expected and (venv / "bin" / "python").exists()


def set_up(venv: Path, root: Path, requested: dict[str, str]) -> None:
    """Install a matching set of packages into ``venv``; writes the stamp last.

    Args:
        venv: Folder of the environment.
        root: The repository.
        requested: Any of "device" and "torch"; the others stay as ``venv`` was last completed.

    Raises:
        SetupError: The environment cannot be set up on this machine.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    if is_current(venv, root, requested):
        return
    wanted = {**read_stamp(venv), **requested}
    device = choose_device(observe(), wanted.get("device"))
    torch = choose_torch(wanted.get("torch"))
    size = "some hundred MB, and some GB where torch is a CUDA build"
    print(f"Setting up {venv} with torch {torch} for {device} (a download of {size})", flush=True)
    (venv / STAMP).unlink(missing_ok=True)
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    for arguments in pip_commands(device, torch, root):
        subprocess.run([venv / "bin" / "python", "-m", "pip", "--quiet", *arguments], check=True)
    stamp = {"device": device, "torch": torch, "fingerprint": fingerprint(root)}
    (venv / STAMP).write_text(json.dumps(stamp) + "\n")
    print(f"Ready for {device}: {venv}/bin/shardrec --help", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the set-up; 0 if the environment is complete, 2 if this machine does not support it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu or cuda (default: ask the NVIDIA driver)")
    parser.add_argument("--torch", help=f"minor release of torch (default: {DEFAULT_TORCH})")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="default: .venv")
    options = parser.parse_args(arguments)
    given = {"device": options.device, "torch": options.torch}
    root = Path(__file__).resolve().parent.parent
    try:
        set_up(options.venv, root, {name: value for name, value in given.items() if value})
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"setup: `{command}` failed; its message is above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
