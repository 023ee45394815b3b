"""Start a TorchX component from Python and show the output of its workers while it runs."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pprint import pformat
from subprocess import CalledProcessError

from torchx.runner import Runner
from torchx.schedulers import get_scheduler_factories
from torchx.schedulers.api import Stream
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import AppDef, AppDryRunInfo, AppState

from shardrec.launch import components, slurm
from shardrec.launch.cli import BAD_INPUT, FAILED, PREEMPTED, REFUSED
from shardrec.launch.cores import usable_cores
from shardrec.launch.orphans import LAUNCHER, logs_of_launch, this_process
from shardrec.launch.signals import leave_terminal, taken
from shardrec.launch.stages import STAGES
from shardrec.pipeline.outputs.addresses import without_keys
from shardrec.pipeline.run.interruption import Interrupted, Preempted

# The error line of a worker's command, after the rank that torchrun puts before each line.
COMPLAINT = re.compile(rf"(\[[^]]*\]:)?shardrec ({'|'.join(STAGES)}): (?P<what>.*)")
# How torchrun reports a worker that failed.
EXIT_CODE = re.compile(r"\s*exitcode\s*: (?P<code>-?\d+) \(pid: \d+\)")
# The last line of a worker's traceback.
CRASH = re.compile(r"\[[^]]*\]:(?P<what>[\w.]*(Error|Exception)(:.*)?)$")

# Of the 63 characters of a name in Kubernetes, those that are left by "-s9c3920ptzvnh" and
# "-recommend-1023-0".
NAME_LENGTH = 32

TELLING = (BAD_INPUT, REFUSED, PREEMPTED)  # exit codes that are passed on; others become FAILED


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A component, its arguments, and where it should run.

    Attributes:
        component: one of ``STAGES``.
        arguments: the component's options, then ``--``, then the stage's own.
        scheduler: local_cwd, slurm, kubernetes or another scheduler that TorchX supports.
        settings: the scheduler's own options, such as ``partition=gpu,time=60``.
        log_dir: folder to keep the output of local workers in; None deletes it at the end.
    """

    component: str
    arguments: tuple[str, ...]
    scheduler: str = "local_cwd"
    settings: str = ""
    log_dir: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether the workers run on this machine, under this process."""
        return self.scheduler.startswith("local")


@dataclass(frozen=True, slots=True)
class Failure:
    """How a job failed.

    Attributes:
        complaint: the error that a worker printed; "" if none did.
        exit_code: 2 (wrong input), 3 (failed gate) or 75 (output in use) if a worker ended with it,
            else 1.
    """

    complaint: str
    exit_code: int


def describe(job: Job) -> str:
    """The request that ``submit`` would send to the scheduler, as text without access keys."""
    with open_runner() as runner:
        request = request_of(runner, job)
        return without_keys(f"{pformat(request._app)}\n\n{request}")


def submit(job: Job) -> str:
    """Submit ``job`` and return its TorchX handle; on Slurm the workers inherit our PATH.

    Raises:
        ValueError: Slurm's programs are not on this machine.
    """
    if job.scheduler == "slurm" and shutil.which("sbatch") is None:
        raise ValueError(
            "-s slurm must find Slurm's sbatch on PATH, got none; submit on a login node, or see "
            "the request with --dryrun"
        )
    _find_our_programs()
    with open_runner() as runner:
        return str(runner.schedule(request_of(runner, job)))


def wait(handle: str, interval_s: float = 5.0) -> str:
    """How a submitted job failed, such as "TIMEOUT: …", after waiting for it; "" for success.

    Args:
        handle: result of ``submit``.
        interval_s: seconds between two status requests to the scheduler.

    Raises:
        RuntimeError: the scheduler does not report the state of its jobs.
    """
    with open_runner() as runner:
        try:
            status = runner.wait(handle, wait_interval=interval_s)
        except CalledProcessError as error:
            raise RuntimeError(
                f"the scheduler must report the state of jobs, got an error of {error.cmd[0]}; on "
                "Slurm, set up job accounting (slurmdbd)"
            ) from error
    if status is None:
        return "UNKNOWN: the scheduler does not know it any more"
    if status.state == AppState.SUCCEEDED:
        return ""
    return slurm.sentence(status.msg or status.state.name)


def print_line(line: str) -> None:
    """Write a worker's line to our own stderr."""
    print(without_keys(line), file=sys.stderr, flush=True)


def run_here(job: Job, show: Callable[[str], None] = print_line) -> Failure | None:
    """Run ``job`` on this machine to its end; call ``show`` with every line of its workers.

    The workers end with this process, even if it is killed. SIGTERM, SIGHUP and the first SIGINT
    reach them as SIGTERM, after which they have their grace period to write a checkpoint; a second
    SIGINT kills them.

    Returns:
        None if every worker succeeded.

    Raises:
        Preempted: the job ended because of a signal; the message is that of a worker.
        Interrupted: the job ended because of SIGINT.
    """
    _find_our_programs()
    with _interrupts_as_usual(), _logs(job) as job, open_runner() as runner:
        request = request_of(runner, job)
        app: AppDef = request._app
        share_cores(request, job)
        name_launcher(request, job)
        handle = runner.schedule(request)
        came = _pass_on_signals()
        role = app.roles[0]
        nodes = [_Node(runner, handle, role.name, node, show) for node in range(role.num_replicas)]
        for one in nodes:
            one.start()
        status = runner.wait(handle, wait_interval=0.2)
        for one in nodes:
            one.join(timeout=10)
        if status is not None and status.state == AppState.SUCCEEDED:
            return None
        codes = [code for one in nodes for code in one.exit_codes]
        codes = codes or _exit_codes(Path(request.request.log_dir))
    was_restarted = role.env.get("PET_MAX_RESTARTS", "0") != "0"
    complaint = _complaint(nodes, was_restarted)
    if came:
        stopped = Interrupted if came[0] == signal.SIGINT else Preempted
        name = signal.Signals(came[0]).name
        raise stopped(complaint or f"the job ended after {name}; start it again")
    return Failure(complaint, next((code for code in codes if code in TELLING), FAILED))


def open_runner() -> Runner:
    """TorchX's runner with our Slurm scheduler."""
    return Runner("torchx", {**get_scheduler_factories(), "slurm": slurm.create_scheduler})


def _complaint(nodes: "Sequence[_Node]", was_restarted: bool) -> str:
    complaints = [line for node in nodes for line in node.complaints]
    crashes = [line for node in nodes for line in node.crashes]
    # The first line is nearest to the cause, but may come from workers that were restarted since.
    return (complaints or crashes or [""])[-1 if was_restarted else 0]


def _exit_codes(log_dir: Path) -> list[int]:
    """Exit codes of the processes that TorchX started, which it stores with their logs."""
    with suppress(OSError, ValueError, KeyError):
        roles = json.loads((log_dir / "SUCCESS").read_text())["roles"].values()
        return [process["exitcode"] for role in roles for process in role]
    return []


def _pass_on_signals() -> list[int]:
    """Send SIGTERM to the child processes when a signal asks to stop; the signals that have come.

    TorchX would kill them after ten seconds, without waiting for a checkpoint.
    """
    came: list[int] = []

    def pass_on(number: int, _: object) -> None:
        came.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT and len(came) > 1:
            for process in _descendants(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            print_line(
                "shardrec launch: Ctrl-C: the workers are asked to end; again, it kills them"
            )
        for child in _children(os.getpid()):
            with suppress(ProcessLookupError):  # it leads no process group, or is gone
                os.killpg(child, signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        for number in taken():
            signal.signal(number, pass_on)
    return came


def _children(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    with suppress(OSError):
        return [int(child) for file in files for child in file.read_text().split()]
    return []


def _descendants(process: int) -> list[int]:
    children = _children(process)
    return [*children, *(one for child in children for one in _descendants(child))]


@contextmanager
def _logs(job: Job) -> Iterator[Job]:
    """Context manager: the job with a folder for its output, which is removed if nobody asked."""
    if job.log_dir is not None:
        yield job
        return
    with logs_of_launch() as folder:
        yield dataclasses.replace(job, log_dir=folder)


def name_launcher(request: AppDryRunInfo, job: Job) -> None:
    """Tell local workers which process to end with; workers in containers cannot see it."""
    if job.scheduler == "local_cwd":
        for group in request.request.role_params.values():
            for one in group:
                one.env[LAUNCHER] = this_process()


def share_cores(request: AppDryRunInfo, job: Job) -> None:
    """Give each local worker its share of this machine's cores, unless the user chose a number."""
    own, _ = split(job.arguments)
    words = " ".join(own)
    is_chosen = "--cpu" in words or "OMP_NUM_THREADS" in words or re.search(r"(^| )-h\b", words)
    if is_chosen or job.scheduler != "local_cwd":  # containers have limits of their own
        return
    replicas = [one for group in request.request.role_params.values() for one in group]
    workers = sum(_num_workers(one.args) for one in replicas)
    threads = max(1, usable_cores() // workers)
    for one in replicas:
        one.env["OMP_NUM_THREADS"] = str(threads)


def _num_workers(command: Sequence[str]) -> int:
    """Workers that a torchrun command starts; 1 for another command."""
    text = " ".join(command)
    found = re.search(r"--nproc_per_node (\d+)", text)
    return int(found[1]) if found else 1


@contextmanager
def _interrupts_as_usual() -> Iterator[None]:
    """Context manager: undo TorchX's signal handlers; an interrupt raises KeyboardInterrupt."""
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    kept = {number: signal.getsignal(number) for number in asking}
    try:
        yield
    except SignalException:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def request_of(runner: Runner, job: Job) -> AppDryRunInfo:
    """The scheduler's request; exits with the component's usage if its options are wrong."""
    settings: Mapping[str, object] = runner.scheduler_run_opts(job.scheduler).cfg_from_str(
        job.settings
    )
    if job.is_local and job.log_dir is not None:
        settings = {**settings, "log_dir": str(job.log_dir)}
    path = f"{components.__file__}:{job.component}"
    try:
        return runner.dryrun_component(path, for_scheduler(job), job.scheduler, cfg=settings)
    except (AssertionError, ValueError) as refused:  # by TorchX, or a component run from its text
        raise ValueError(str(refused)) from refused


def for_scheduler(job: Job) -> list[str]:
    """The arguments of the component, with a port or a name that the scheduler can use.

    On this machine the rendezvous of nodes gets a free port: two jobs with one port would share the
    store of the first, and end with it. Kubernetes appends a unique word, role and number to the
    name of a job and takes 63 characters.
    """
    own, stage = split(job.arguments)
    given = [word.partition("=")[0] for word in own]
    if job.is_local and STAGES[job.component].kind == "distributed" and "--rdzv_port" not in given:
        own += ["--rdzv_port", str(_free_port())]
    if job.scheduler.startswith("kubernetes") and "--name" in given:
        at = given.index("--name")
        words = own[at].split("=", 1) if "=" in own[at] else own[at : at + 2]
        folder, slash, name = words[-1].rpartition("/")
        cut = re.sub(r"[^a-z0-9]+", "-", name.lower())[:NAME_LENGTH].strip("-")
        own[at : at + 1 + ("=" not in own[at])] = ["--name", folder + slash + cut]
    return [*own, "--", *stage] if "--" in job.arguments else own


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


class _Node(threading.Thread):
    """A thread that passes the output of one node to ``show`` and collects its error lines."""

    def __init__(
        self, runner: Runner, handle: str, role: str, node: int, show: Callable[[str], None]
    ) -> None:
        super().__init__(daemon=True)
        self.complaints: list[str] = []  # error lines of the workers
        self.crashes: list[str] = []  # last lines of their tracebacks
        self.exit_codes: list[int] = []  # of the workers that failed, by torchrun
        self._show = show
        self._open = partial(
            runner.log_lines, handle, role, node, should_tail=True, streams=Stream.COMBINED
        )

    def run(self) -> None:
        try:
            for line in self._open():
                self._take(line.rstrip("\n"))
        except FileNotFoundError:  # the job was interrupted, and TorchX removed its logs
            return

    def _take(self, line: str) -> None:
        self._show(line)
        if found := COMPLAINT.match(line):
            self.complaints.append(found["what"].strip())
        elif found := CRASH.match(line):
            self.crashes.append(found["what"].strip())
        elif found := EXIT_CODE.match(line):
            self.exit_codes.append(int(found["code"]))


def _find_our_programs() -> None:
    """Add our environment to PATH, so that workers find ``torchrun`` and ``shardrec``."""
    folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The component's own options, and the stage's arguments after ``--``.

    Example:
        >>> split(["-j", "1x2", "--", "--prepared", "data"])
        (['-j', '1x2'], ['--prepared', 'data'])
    """
    words = list(words)
    if "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]
