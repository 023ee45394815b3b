"""How many cores this process may use."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores(root: Path = Path("/")) -> int:
    """The cores of this process's affinity, or fewer where its control group has a quota of time.

    A container with ``--cpus 4`` on a machine of 64 cores sees all 64.

    Args:
        root: of the file system; only tests give another one.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of the control groups of this process, in cores; of version 2 and 1."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                for group in _upwards(root / "sys/fs/cgroup", path):
                    yield from _ratio(group / "cpu.max")
            elif "cpu" in controllers.split(","):
                for group in _upwards(root / "sys/fs/cgroup/cpu", path):
                    yield from _ratio(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """A group and those around it; in a container the path may be one of the host's."""
    group = top / path.strip("/")
    yield from [group, *(one for one in group.parents if one.is_relative_to(top))]


def _ratio(*files: Path) -> Iterator[float]:
    """The quota by the period; nothing without a quota."""
    with suppress(OSError, ValueError):
        quota, period = " ".join(file.read_text() for file in files).split()
        if float(quota) > 0:  # ValueError for "max", -1 for none
            yield float(quota) / float(period)
