"""``shardrec doctor``: what is installed, whether it fits together, and how to mend it.

Imports nothing at the top that a broken environment could lack.
"""

import ctypes
import importlib
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shardrec.launch.setup_env import NEWEST_PYTHON, OLDEST_PYTHON, count_gpus

# Releases that were built against each other, by the minor release of torch.
MATCHING_SETS = {
    "2.13": {"fbgemm": "1.8", "torchrec": "1.8", "triton": "3.7"},
    "2.11": {"fbgemm": "1.6", "torchrec": "1.6", "triton": "3.6"},
}
FBGEMM_BUILDS = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
NEEDED = ("torch", "torchrec", "triton", "torchx", "torchmetrics", "pyarrow", "duckdb", "rich")
REPAIR = "run `make setup`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the diagnosis is made from, as found or as a test pretends.

    Attributes:
        python: (major, minor).
        machine: operating system and architecture.
        versions: version of each distribution, None where it is missing.
        driver: release of the NVIDIA driver; None where there is none.
        gpus: number of GPUs the NVIDIA driver reports.
        torch_cuda: CUDA release torch was built for; None for a CPU build or no torch.
        torch_sees_gpu: whether torch can use a GPU.
        backends: communication backends torch has.
        load_errors: first line of the error of each module that is installed but fails to import.
    """

    python: tuple[int, int]
    machine: str
    versions: dict[str, str | None]
    driver: str | None
    gpus: int
    torch_cuda: str | None
    torch_sees_gpu: bool
    backends: tuple[str, ...]
    load_errors: dict[str, str]

    @property
    def fbgemm_builds(self) -> tuple[str, ...]:
        """Which of fbgemm's builds are installed, "cpu" and "cuda"."""
        return tuple(build for build, name in FBGEMM_BUILDS.items() if self.versions.get(name))


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis: ``wrong`` stops a run, ``note`` does not."""

    level: Literal["wrong", "note"]
    text: str


def gather() -> Facts:
    """Facts about this interpreter; imports torch, fbgemm and torchrec to see whether they load."""
    names = (*NEEDED, *FBGEMM_BUILDS.values())
    load_errors = {
        name: error for name in ("torch", "fbgemm_gpu", "torchrec") if (error := _load_error(name))
    }
    torch_cuda, sees_gpu, backends = (
        _ask_torch() if "torch" not in load_errors else (None, False, ())
    )
    major, minor, _ = platform.python_version_tuple()
    return Facts(
        python=(int(major), int(minor)),
        machine=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in names},
        driver=driver_release(),
        gpus=count_gpus(),
        torch_cuda=torch_cuda,
        torch_sees_gpu=sees_gpu,
        backends=backends,
        load_errors=load_errors,
    )


def driver_release() -> str | None:
    """Release of the NVIDIA driver, such as "550.54.15"; None where there is none."""
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
    except Exception as error:  # whatever a broken binary raises is what we are here to report
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
    return [*_machine(facts), *_packages(facts), *_matching_set(facts), *_device(facts)]


def _machine(facts: Facts) -> Iterator[Finding]:
    if not OLDEST_PYTHON <= facts.python <= NEWEST_PYTHON:
        spelled = ".".join(map(str, facts.python))
        yield Finding(
            "wrong",
            f"Python must be 3.11 to 3.14, got {spelled}; `make setup PYTHON=python3.12`",
        )


def _packages(facts: Facts) -> Iterator[Finding]:
    for name in NEEDED:
        if facts.versions.get(name) is None:
            yield Finding("wrong", f"{name} is not installed; {REPAIR}")
    if not facts.fbgemm_builds:
        yield Finding("wrong", f"fbgemm is not installed, in neither build; {REPAIR}")
    if len(facts.fbgemm_builds) == 2:
        yield Finding(
            "wrong",
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files; "
            f"`pip uninstall` both, then {REPAIR}",
        )
    for name, error in facts.load_errors.items():
        yield Finding("wrong", f"{name} is installed but does not load ({error}); {REPAIR}")


def _matching_set(facts: Facts) -> Iterator[Finding]:
    torch = facts.versions.get("torch")
    if torch is None:
        return
    expected = MATCHING_SETS.get(_minor(torch))
    if expected is None:
        known = ", ".join(MATCHING_SETS)
        yield Finding("wrong", f"torch must be one of {known}, got {torch}; {REPAIR}")
        return
    fbgemm = [FBGEMM_BUILDS[build] for build in facts.fbgemm_builds]
    families = {"fbgemm": fbgemm, "torchrec": ["torchrec"], "triton": ["triton"]}
    for family, distributions in families.items():
        for name in distributions:
            found = facts.versions.get(name)
            if found is not None and _minor(found) != expected[family]:
                yield Finding(
                    "wrong",
                    f"{name} must be {expected[family]} with torch {torch}, got {found}; {REPAIR}",
                )


def _device(facts: Facts) -> Iterator[Finding]:
    if "gloo" not in facts.backends and facts.versions.get("torch"):
        yield Finding(
            "wrong", "torch has no gloo backend, so CPU workers cannot talk; install a wheel"
        )
    if facts.gpus and facts.fbgemm_builds == ("cpu",):
        yield Finding(
            "note",
            f"the driver reports {facts.gpus} GPU(s), but fbgemm is the CPU build: they stay idle; "
            "`make setup DEVICE=cuda` uses them",
        )
    if facts.gpus and not facts.torch_sees_gpu and facts.versions.get("torch"):
        reason = "a CPU build" if facts.torch_cuda is None else f"built for CUDA {facts.torch_cuda}"
        yield Finding(
            "wrong" if "cuda" in facts.fbgemm_builds else "note",
            f"the driver reports {facts.gpus} GPU(s), but torch ({reason}) cannot use them; "
            "update the driver or install the CUDA build of torch",
        )
    if not facts.gpus and facts.fbgemm_builds == ("cuda",):
        yield Finding(
            "note",
            "fbgemm is the CUDA build and no driver answers here: right for a login node; to train "
            "here `make setup DEVICE=cpu`",
        )


def _minor(version: str) -> str:
    """Major and minor release.

    Example:
        >>> _minor("2.13.0+cpu")
        '2.13'
    """
    return ".".join(version.split("+")[0].split(".")[:2])


def report(facts: Facts) -> str:
    """The facts and the findings as text for a terminal."""
    rows = [("python", ".".join(map(str, facts.python))), ("machine", facts.machine)]
    rows += [(name, version) for name, version in facts.versions.items() if version]
    rows += [
        ("torch built for", f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU"),
        ("NVIDIA driver", facts.driver or "none"),
        ("GPUs", str(facts.gpus) if facts.gpus else "none"),
        ("backends", ", ".join(facts.backends) or "none"),
    ]
    lines = [f"{name:<16} {value}" for name, value in rows]
    findings = diagnose(facts)
    lines += ["", *(f"{finding.level}: {finding.text}" for finding in findings)]
    if not any(finding.level == "wrong" for finding in findings):
        device = "cuda" if facts.torch_sees_gpu and "cuda" in facts.fbgemm_builds else "cpu"
        lines.append(f"ready to train on {device}")
    return "\n".join(lines)


def run() -> int:
    """Print the report; 0 when training can start here, 1 when something must be repaired."""
    facts = gather()
    print(report(facts))
    return int(any(finding.level == "wrong" for finding in diagnose(facts)))
