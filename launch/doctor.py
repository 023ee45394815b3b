"""``shardrec doctor``: show what is installed, whether it fits together, and how to repair it.

The module imports at its top nothing that a broken environment could lack.
"""

import ctypes
import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shardrec.launch.cli import DRIVER_LIBRARIES
from shardrec.launch.setup_env import (
    FBGEMM_BUILDS,
    NEWEST_PYTHON,
    OLDEST_PYTHON,
    count_gpus,
    matching_sets,
)

NEEDED = (
    *("torch", "torchrec", "triton", "torchx", "torchmetrics"),
    *("pyarrow", "duckdb", "rich", "safetensors"),
)
REPAIR = "run `make setup`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts about an interpreter: installed packages, and the GPUs and driver of its machine."""

    python: tuple[int, int]
    machine: str
    versions: dict[str, str | None]  # by distribution; None where it is missing
    driver: str | None  # release of the NVIDIA driver
    gpus: int  # as many as the driver reports
    torch_cuda: str | None  # None for a CPU build, or no torch
    torch_sees_gpu: bool
    backends: tuple[str, ...]  # communication backends that torch has
    load_errors: dict[str, str]  # first line, by installed module that fails to import
    host: tuple[str, str | None] | None = None  # this machine's name and its address, if it has one
    has_java: bool = True

    @property
    def fbgemm_builds(self) -> tuple[str, ...]:
        """The builds of fbgemm that are installed, of "cpu" and "cuda"."""
        return tuple(build for build, name in FBGEMM_BUILDS.items() if self.versions.get(name))


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis; "wrong" prevents a run, "note" does not."""

    level: Literal["wrong", "note"]
    text: str


def gather() -> Facts:
    """Facts about this interpreter; imports torch, fbgemm and torchrec to see whether they load."""
    modules = ("torch", "fbgemm_gpu", "torchrec")
    load_errors = {name: error for name in modules if (error := _load_error(name))}
    torch_cuda, sees_gpu, backends = (
        _ask_torch() if "torch" not in load_errors else (None, False, ())
    )
    return Facts(
        python=sys.version_info[:2],
        machine=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in (*NEEDED, *FBGEMM_BUILDS.values(), "pyspark")},
        driver=driver_release(),
        gpus=count_gpus(),
        torch_cuda=torch_cuda,
        torch_sees_gpu=sees_gpu,
        backends=backends,
        load_errors=load_errors,
        host=_host(),
        has_java=find_java() is not None,
    )


def _host() -> tuple[str, str | None]:
    name = socket.gethostname()
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, None


def find_java() -> str | None:
    """The Java that Spark would start; None where there is none."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which(f"{home}/bin/java" if home else "java")


def driver_release() -> str | None:
    """Release of the NVIDIA driver, such as "550.54.15"; None without a driver."""
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")  # comes with the driver
    except OSError:
        return None
    release = ctypes.create_string_buffer(96)
    if management.nvmlInit_v2() != 0:
        return None
    failed = management.nvmlSystemGetDriverVersion(release, len(release)) != 0
    management.nvmlShutdown()
    return None if failed else release.value.decode()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load_error(module: str) -> str | None:
    """First line of what importing ``module`` raises; None when it loads or is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return None if error.name == module else str(error)
    except Exception as error:  # a broken binary raises anything, and that is what we report
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _ask_torch() -> tuple[str | None, bool, tuple[str, ...]]:
    """CUDA release of the build, whether a GPU is usable, and the communication backends."""
    try:
        import torch
        import torch.distributed as dist
    except ModuleNotFoundError:
        return None, False, ()
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    backends = tuple(name for name, there in available.items() if there)
    return torch.version.cuda, torch.cuda.is_available(), backends


def diagnose(facts: Facts) -> list[Finding]:
    """Every mismatch, each with its remedy; empty when all is well."""
    errors = [*_packages(facts), *_matching_set(facts)]
    return [
        *(Finding("wrong", text) for text in errors),
        *_device(facts),
        *_network(facts),
        *_spark(facts),
    ]


def _packages(facts: Facts) -> Iterator[str]:
    if not OLDEST_PYTHON <= facts.python <= NEWEST_PYTHON:
        python = ".".join(map(str, facts.python))
        yield f"Python must be 3.11 to 3.14, got {python}; `make setup PYTHON=python3.12`"
    for name in NEEDED:
        if facts.versions.get(name) is None:
            yield f"{name} is not installed; {REPAIR}"
    if not facts.fbgemm_builds:
        yield f"fbgemm is not installed, in neither build; {REPAIR}"
    if len(facts.fbgemm_builds) == 2:
        yield (
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files; "
            f"`pip uninstall` both, then {REPAIR}"
        )
    for name, error in facts.load_errors.items():
        if _lacks_driver(facts, error):
            continue
        yield f"{name} is installed but does not load ({error}); {REPAIR}"


def _lacks_driver(facts: Facts, error: str) -> bool:
    """Whether a CUDA build fails to load for want of the driver's libraries, as on login nodes."""
    is_of_driver = any(name in error for name in DRIVER_LIBRARIES)
    return is_of_driver and facts.fbgemm_builds == ("cuda",) and facts.driver is None


def _matching_set(facts: Facts) -> Iterator[str]:
    torch, known = facts.versions.get("torch"), matching_sets()
    if torch is None:
        return
    if _minor(torch) not in known:
        yield f"torch must be one of {', '.join(known)}, got {torch}; {REPAIR}"
        return
    for name, release in known[_minor(torch)].items():
        expected, found = _minor(release), facts.versions.get(name)
        if found is not None and _minor(found) != expected:
            yield f"{name} must be {expected} with torch {torch}, got {found}; {REPAIR}"


def _minor(version: str) -> str:
    """Major and minor release.

    Example:
        >>> _minor("2.13.0+cpu")
        '2.13'
    """
    return ".".join(version.split(".")[:2])


def _device(facts: Facts) -> Iterator[Finding]:
    has_torch = facts.versions.get("torch") is not None
    if has_torch and "gloo" not in facts.backends:
        yield Finding(
            "wrong", "torch has no gloo backend, so CPU workers cannot communicate; install a wheel"
        )
    if facts.gpus and facts.fbgemm_builds == ("cpu",):
        yield Finding(
            "note",
            f"the driver reports {facts.gpus} GPU(s), but fbgemm is the CPU build: they stay idle; "
            "`make setup DEVICE=cuda` uses them",
        )
    if has_torch and facts.gpus and not facts.torch_sees_gpu:
        reason = "a CPU build" if facts.torch_cuda is None else f"built for CUDA {facts.torch_cuda}"
        yield Finding(
            "wrong" if "cuda" in facts.fbgemm_builds else "note",
            f"the driver reports {facts.gpus} GPU(s), but torch ({reason}) cannot use them; "
            "update the driver or install the CUDA build of torch",
        )
    if not facts.gpus and facts.fbgemm_builds == ("cuda",):
        yield Finding(
            "note",
            "fbgemm is the CUDA build and no driver answers: right for a login node; to train "
            "on this machine `make setup DEVICE=cpu`",
        )
    lacking = [name for name, error in facts.load_errors.items() if _lacks_driver(facts, error)]
    if lacking:
        yield Finding(
            "note",
            f"{' and '.join(lacking)} load where there is a driver: here are plan, gate, launch, "
            "prepare and report, not train, evaluate, recommend and export",
        )


def _network(facts: Facts) -> Iterator[Finding]:
    name, address = facts.host or ("", "")
    if address is None or address.startswith("127."):
        found = "has no address" if address is None else f"has the address {address}"
        yield Finding(
            "note",
            f"the name of this machine, {name}, {found}: workers on other machines cannot reach "
            "those here by it; for jobs on several, correct /etc/hosts, or name the interface "
            "(one alone) in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )


def _spark(facts: Facts) -> Iterator[Finding]:
    if facts.versions.get("pyspark") and not facts.has_java:
        yield Finding(
            "note",
            "pyspark is installed, but there is no Java for prepare --engine spark; install one of "
            "17 or newer, such as openjdk-17-jre-headless, or set JAVA_HOME",
        )


def report(facts: Facts) -> str:
    """The facts and the findings as text for a terminal."""
    rows = {
        "python": ".".join(map(str, facts.python)),
        "machine": facts.machine,
        **{name: version for name, version in facts.versions.items() if version},
        "torch built for": f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU",
        "NVIDIA driver": facts.driver or "none",
        "GPUs": str(facts.gpus or "none"),
        "backends": ", ".join(facts.backends) or "none",
        "layout": "a node shares a table; nodes hold replicas if optimizer.accumulate is no less",
    }
    findings = diagnose(facts)
    lines = [f"{name:<16} {value}" for name, value in rows.items()]
    lines += ["", *(f"{finding.level}: {finding.text}" for finding in findings)]
    if not any(finding.level == "wrong" for finding in findings):
        device = "cuda" if facts.torch_sees_gpu and "cuda" in facts.fbgemm_builds else "cpu"
        if any(_lacks_driver(facts, error) for error in facts.load_errors.values()):
            lines.append("ready to submit jobs to machines with a driver")
        else:
            lines.append(f"ready to train on {device}")
    return "\n".join(lines)


def run() -> int:
    """Print the report; 0 when training can start here, 1 when something must be repaired."""
    facts = gather()
    print(report(facts))
    return int(any(finding.level == "wrong" for finding in diagnose(facts)))
