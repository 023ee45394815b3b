"""Benchmark results as JSON lines, with the command, commit, versions and machine."""

import contextlib
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "RESULTS",
    "SHARDREC",
    "Results",
    "Watch",
    "call_fresh",
    "median",
    "peak_rss_bytes",
    "peak_rss_since_reset",
    "reset_peak_rss",
    "rss_bytes",
    "run_logged",
    "timed",
]

RESULTS = Path(__file__).parent / "results"
SHARDREC = ("-P", "-m", "shardrec.launch.cli")
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "triton", "pyarrow", "duckdb")


class Results:
    """A file of results, one JSON object per line; an existing row is not measured again.

    Args:
        path: The file; made with its folder when the first row is appended.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the existing rows."""
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines() if line]

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a row with these values is in the file."""
        return self.find(key) is not None

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The last row with this ``key``; None if there is none."""
        # Compared as JSON, so that a tuple equals the list it was stored as.
        wanted = json.dumps(key, sort_keys=True)
        matching = (r for r in self.rows if json.dumps(r["key"], sort_keys=True) == wanted)
        return max(matching, key=lambda row: row["run"]["time"], default=None)

    def append(self, key: dict[str, Any], **measured: Any) -> dict[str, Any]:
        """Adds a row to the file and prints it."""
        row = {"key": key, **measured, "run": _run()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        shown = {name: value for name, value in row.items() if name not in ("run", "times_s")}
        print(json.dumps(shown), flush=True)
        return row


def call_fresh(
    script: str,
    job: dict[str, Any],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs ``python script --job JSON`` in a fresh process; its last line of output is the answer.

    ``environment`` is added to that of this process.

    Raises:
        RuntimeError: the process failed; the message ends with its last lines.
    """
    # Machine paths of the interpreter and of temporary files stay out of the stored command.
    command = [python, script, "--job", json.dumps(job)]
    variables = os.environ | dict(environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {job} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_logged(
    arguments: Sequence[str], threads: int, log: Path, variables: Mapping[str, str] | None = None
) -> int:
    """Runs python with these arguments in a process of its own; its output goes to ``log``.

    ``variables`` are added to the environment of this process.

    Returns:
        Peak resident bytes of the process or child of it that used most.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(variables or {})
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss * 1024


def median(values: Sequence[float]) -> float:
    """Median, rounded to a microsecond."""
    return round(statistics.median(values), 6)


def rss_bytes() -> int:
    """Current resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since its start, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """The most bytes that processes and a folder held, looked at a few times a second.

    Attributes:
        memory: peak resident memory of this process and those it started, by name; processes of one
            name are added up.
        disk: peak bytes of the files in the folder.
        disk_by_name: the same for files with a part of their path that begins with a given name.
    """

    def __init__(self, folder: str, names: Sequence[str] = ()) -> None:
        """Watch this process's descendants and ``folder``, where ``names`` are told apart."""
        self.folder, self.memory, self.disk = folder, dict[str, int](), 0
        self.disk_by_name = dict.fromkeys(names, 0)
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """User and system time by name of the process, as last seen while it ran."""
        found: dict[str, float] = {}
        for name, seconds in self._cpu.values():
            found[name] = round(found.get(name, 0.0) + seconds, 1)
        return found

    def _watch(self) -> None:
        while not self._stop.wait(0.3):
            self._look_at_processes()
            self._look_at_files()

    def _look_at_processes(self) -> None:
        found: dict[str, int] = {}
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                name = "driver" if process == me else process.name()
                found[name] = found.get(name, 0) + process.memory_info().rss
                times = process.cpu_times()
                key = process.pid, process.create_time()
                self._cpu[key] = name, times.user + times.system
        for name, held in found.items():
            self.memory[name] = max(self.memory.get(name, 0), held)

    def _look_at_files(self) -> None:
        total, named = 0, dict.fromkeys(self.disk_by_name, 0)
        for folder, _, files in os.walk(self.folder):  # passes over folders that go meanwhile
            for path in (f"{folder}/{file}" for file in files):
                with contextlib.suppress(OSError):
                    size = os.stat(path).st_size
                    total += size
                    inside = path.removeprefix(self.folder)
                    for name in (name for name in named if f"/{name}" in inside):
                        named[name] += size
        self.disk = max(self.disk, total)
        for name, size in named.items():
            self.disk_by_name[name] = max(self.disk_by_name[name], size)


def reset_peak_rss() -> None:
    """Reset the peak of ``peak_rss_since_reset`` to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_since_reset() -> int:
    """Peak resident memory of this process since ``reset_peak_rss``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _run() -> dict[str, Any]:
    """Metadata of a measurement: time, command, commit, versions, machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": _command(),
        "commit": _commit(),
        "versions": _versions(),
        "machine": _machine(),
    }


def _command() -> str:
    """The command without the folders of its paths, which say nothing elsewhere."""
    arguments = [Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "load": round(os.getloadavg()[0], 2),
    }
