"""TorchX's Slurm scheduler, with fixes that its release 0.7.0 lacks for real clusters.

`shardrec launch -s slurm` uses it; `torchx run -s slurm` uses TorchX's own. Options of Slurm itself
need no code: `-cfg partition=gpu,time=60` passes them on.
"""

import shlex
import subprocess
from dataclasses import dataclass, field
from typing import Any

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import (
    SLURM_STATES,
    SlurmBatchRequest,
    SlurmOpts,
    SlurmScheduler,
)
from torchx.specs import AppDef, AppDryRunInfo, AppState, Role
from typing_extensions import override

__all__ = ["Request", "Scheduler", "create_scheduler", "sentence"]

# What TorchX's table of states lacks; a state that neither knows is not final.
MORE_STATES = {
    "COMPLETING": AppState.RUNNING,
    "CONFIGURING": AppState.PENDING,
    "LAUNCH_FAILED": AppState.FAILED,
    "RECONFIG_FAIL": AppState.FAILED,
    "SPECIAL_EXIT": AppState.FAILED,
    "STOPPED": AppState.PENDING,
}
ORDER = (
    AppState.UNKNOWN,
    AppState.RUNNING,
    AppState.PENDING,
    AppState.FAILED,
    AppState.CANCELLED,
)
SENTENCES = {
    "BOOT_FAIL": "a node did not start; submit the job again",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "it could not end before its deadline",
    "NODE_FAIL": "a node failed; submit it again, with --resume=auto to go on",
    "OUT_OF_MEMORY": "it was killed for its memory; ask for more with --memMB",
    "PREEMPTED": "another job took its place; submit it again, with --resume=auto to go on",
    "TIMEOUT": "it reached its time limit; ask for more with -cfg time=…, and use --resume=auto",
}


def sentence(state: str) -> str:
    """A state of ``sacct`` with its meaning for the user, or alone if it needs no explanation.

    >>> sentence("CANCELLED by 1000")
    'CANCELLED by 1000: it was cancelled'
    """
    meaning = SENTENCES.get(state.partition(" ")[0])
    return f"{state}: {meaning}" if meaning else state


@dataclass(repr=False)
class Request(SlurmBatchRequest):
    """A job script that exports some environment variables itself.

    Attributes:
        exported: values of these variables, by name.
    """

    exported: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, made: SlurmBatchRequest, role: Role) -> "Request":
        """TorchX's request for a role, corrected for real clusters.

        Since Slurm 22.05 `srun` gives a task one CPU unless the number is repeated, and it cuts the
        values in `--export` at commas. A job that cannot resume its run is not requeued, because it
        would only find its own folder and fail. A job that may lose nodes is not ended by the
        first one.
        """
        exported: dict[str, str] = {}
        for replica in made.replicas.values():
            with_commas = {name: value for name, value in replica.env.items() if "," in value}
            exported |= with_commas
            replica.env = {n: value for n, value in replica.env.items() if n not in with_commas}
            if cpus := replica.sbatch_opts.get("cpus-per-task"):
                replica.srun_opts["cpus-per-task"] = cpus
            if can_lose_nodes(role):
                replica.sbatch_opts["no-kill"] = None
                replica.srun_opts |= {"no-kill": None, "kill-on-bad-exit": "0", "wait": "0"}
            if not can_start_again(role):
                del replica.sbatch_opts["requeue"]
                replica.sbatch_opts["no-requeue"] = None
        return cls(made.cmd, made.replicas, made.job_dir, made.max_retries, exported)

    @override
    def materialize(self) -> str:
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.exported.items()]
        head, start, rest = super().materialize().partition("set +e\n")
        return "".join([head, *lines, start, rest])


class Scheduler(SlurmScheduler):
    """Submits a ``Request``, and handles every state that ``sacct`` reports."""

    @override
    def _submit_dryrun(self, app: AppDef, cfg: SlurmOpts) -> AppDryRunInfo[SlurmBatchRequest]:
        made = super()._submit_dryrun(app, cfg).request
        request = Request.of(made, app.roles[0])
        return AppDryRunInfo(request, repr)

    @override
    def describe(self, app_id: str) -> DescribeAppResponse:
        # Accounting is late by some seconds: a job that it does not know yet is waiting.
        states = _sacct(app_id) or ["PENDING"]
        found = [_state(state) for state in states]
        # One command on several nodes: it runs while a part of it does, and fails with a part.
        decides = next((state for state in ORDER if state in found), AppState.SUCCEEDED)
        message = states[found.index(decides)]
        return DescribeAppResponse(app_id=app_id, state=decides, msg=message)


def can_start_again(role: Role) -> bool:
    """Whether a stage may be started again: all may, but training only with ``--resume``."""
    words = shlex.split(" ".join(role.args))
    return role.name != "train" or any(word.startswith("--resume") for word in words)


def can_lose_nodes(role: Role) -> bool:
    """Whether the job goes on with fewer nodes, as by ``-j 2:4x8``."""
    return bool((role.min_replicas or role.num_replicas) < role.num_replicas)


def create_scheduler(session_name: str, **_: Any) -> Scheduler:
    """The factory that TorchX's runner calls for the scheduler."""
    return Scheduler(session_name=session_name)


def _sacct(job: str) -> list[str]:
    """The state of each part of a job."""
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", "-j", job]
    found = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    return found.stdout.split("\n")[:-1]


def _state(state: str) -> AppState:
    """The TorchX state for one of ``sacct``, such as "CANCELLED by 1000"."""
    word = state.partition(" ")[0]
    known: AppState = SLURM_STATES.get(word) or MORE_STATES.get(word, AppState.UNKNOWN)
    return known
