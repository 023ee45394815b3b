"""TorchX components: the stages as jobs for a laptop, Slurm or Kubernetes.

By path, ``torchx run -s local_cwd launch/components.py:train -j 1x2 -- --prepared data --run run``;
from an installed wheel, ``shardrec launch train -j 1x2 -- --prepared data --run run``.
The stage's own arguments follow ``--``; ``shardrec train --help`` lists them.

TorchX looks for the ``def`` of a component in the syntax tree of this file, takes its options from
the signature and their help from the docstring. Both are the same for all stages of one kind, so
``_component`` generates them, and a ``def`` holds only what its stage adds to the job.
"""
# TorchX reads signatures from the syntax tree and knows `Optional[Dict]`, not `dict | None`.
# ruff: noqa: UP006, UP035, UP045

import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable
from typing import Any, Dict, List, Optional

from torchx import specs
from torchx.components import dist
from torchx.specs import AppDef

import shardrec
from shardrec.launch import slurm
from shardrec.launch.stages import STAGES

IMAGE = f"shardrec:{shardrec.__version__}"

# The working directory may be a checkout, and its folder `kernels` would shadow that package.
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}

# Seconds that torchrun waits beyond the grace period of its workers before it kills them.
SHUTDOWN_S = 5

# More than any node has cores for; each is a process that loads torch.
MOST_WORKERS = 1024

# From LEAST to NODES nodes, if both are given, of WORKERS each.
PLACES = re.compile(r"(0*(?P<least>[1-9]\d*):)?0*(?P<nodes>[1-9]\d*)x0*(?P<workers>[1-9]\d*)")

# A worker's threads that compute at the same time: its steps, their backward pass, the next batch,
# and a checkpoint.
CPUS_A_GPU = 4

HELP = {
    "arguments": "after ``--``, the arguments of the stage's own command",
    "j": "nodes x workers on each, such as 1x2 or 4x8; one worker a GPU; train: also 2:4x8, from "
    "two to four nodes",
    "image": "container image that has shardrec installed (local_cwd and slurm use no image)",
    "name": "name of the job; for workers, experiment/job or /job",
    "h": "named resource of the scheduler; replaces cpu, gpu and memMB",
    "cpu": "CPUs for each node, divided among its workers; 0: two a worker, or four a GPU",
    "gpu": "GPUs for each node",
    "memMB": "memory for each node, in MB; 0: the scheduler's default (`shardrec plan` counts it)",
    "env": "variables for the workers, such as OMP_NUM_THREADS=4,NCCL_DEBUG=INFO",
    "max_retries": "how often the scheduler restarts a failed job (local_cwd does not)",
    "max_restarts": "how often the workers are restarted within the job after one has died",
    "grace": "seconds after SIGTERM for workers to finish their step and write a checkpoint",
    "mounts": "type=bind,src=/host,dst=/job[,readonly] for schedulers with containers",
    "rdzv_port": "port on the first node where several nodes connect; unused with one node",
}


def _workers(
    stage: str,
    arguments: List[str],
    *,
    j: str = "1x1",
    image: str = IMAGE,
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # noqa: N803 (TorchX's own spelling of this option)
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> AppDef:
    """The TorchX job of one stage: torchrun's workers, on one node or many."""
    workers = _num_workers(stage, j)
    app = dist.ddp(
        "--",  # without it torchrun takes our `--run` for an abbreviation of its own `--run-path`
        stage,
        *arguments,
        m="shardrec.launch.cli",
        image=image,
        name=name,
        j=j,
        env=ENVIRONMENT | (env or {}),
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )
    (role,) = app.roles
    role.name = stage
    role.resource = _resource(cpu or max(2 * workers, CPUS_A_GPU * gpu), gpu, memMB, h)
    role.env.setdefault("OMP_NUM_THREADS", str(max(1, role.resource.cpu // workers)))
    return app


def _num_workers(stage: str, j: str) -> int:
    """Workers on each node, of a valid ``-j``."""
    found = PLACES.fullmatch(j)
    if not found:
        raise ValueError(
            f"-j must be NODESxWORKERS, both 1 or more, got {j!r}; use 1x2 for two workers here"
        )
    if found["least"] and (stage != "train" or int(found["least"]) > int(found["nodes"])):
        raise ValueError(
            f"-j must be LEAST:MOSTxWORKERS for train alone, which can go on with fewer nodes, "
            f"got {j!r} for {stage}; use {found['nodes']}x{found['workers']}"
        )
    workers = int(found["workers"])
    if workers > MOST_WORKERS:
        raise ValueError(
            f"-j must ask for at most {MOST_WORKERS} workers on a node, got {j!r}; take one for "
            "each GPU, or for a few CPUs"
        )
    return workers


def _process(
    stage: str,
    arguments: List[str],
    *,
    image: str = IMAGE,
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 0,
    memMB: int = 0,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """The TorchX job of one stage: one process on one node."""
    role = specs.Role(
        name=stage,
        image=image,
        entrypoint="shardrec",
        args=[stage, *arguments],
        env=ENVIRONMENT | (env or {}),
        resource=_resource(cpu or 1, 0, memMB, h),
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return AppDef(name=name, roles=[role])


def _resource(cpu: int, gpu: int, memory_mb: int, h: Optional[str]) -> specs.Resource:
    """The resource of a node; ``specs.resource`` would ask for a gigabyte instead of no memory."""
    found = specs.resource(cpu=cpu, gpu=gpu, memMB=memory_mb, h=h)
    return found if h else dataclasses.replace(found, memMB=memory_mb)


def _component(add: Callable[..., AppDef]) -> Callable[..., AppDef]:
    """Decorator: a TorchX component that makes the job of a stage and passes it to ``add``.

    Its options are the keyword-only parameters of ``_workers`` or ``_process``, and of ``add``.
    """
    stage, command = add.__name__, STAGES[add.__name__]
    kind, name = (_workers, f"/{stage}") if command.kind == "distributed" else (_process, stage)
    defaults = {"name": name, "cpu": command.cpu, "memMB": command.memory_mb}
    signature = inspect.Signature(
        [
            inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL, annotation=str),
            *(one.replace(default=defaults.get(one.name, one.default)) for one in _options(kind)),
            *_options(add),
        ],
        return_annotation=AppDef,
    )

    def component(*arguments: str, **options: Any) -> AppDef:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        values = bound.kwargs
        app = kind(stage, list(arguments), **{one.name: values[one.name] for one in _options(kind)})
        return add(app, **{one.name: values[one.name] for one in _options(add)})

    described = (f"    {option}: {HELP[option]}" for option in signature.parameters)
    component.__doc__ = "\n".join([inspect.getdoc(add) or "", "", "Args:", *described])
    component.__name__ = component.__qualname__ = stage
    component.__signature__ = signature  # type: ignore[attr-defined]
    return component


def _options(function: Callable[..., AppDef]) -> List[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [one for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]


@_component
def train(app: AppDef, *, max_restarts: int = 0, grace: int = 25) -> AppDef:
    """Trains on a prepared folder, the catalog sharded over all workers of all nodes.

    With `--resume=auto` after the `--`, restarted workers resume from the last complete
    checkpoint, on the same nodes (max_restarts) or in a new job (max_retries). With -j 2:4x8 they
    go on with two to four nodes: each loss of a node is one of max_restarts, its return is none.
    """
    (role,) = app.roles
    if slurm.can_lose_nodes(role):
        if not max_restarts:
            raise ValueError(
                "--max_restarts must be at least 1 where nodes may leave and come back, got 0; "
                "give the number of losses that the job may survive"
            )
        role.retry_policy = specs.RetryPolicy.REPLICA
    words = shlex.split(role.args[-1])
    again = {"max_restarts": max_restarts, "max_retries": role.max_retries}
    given = ", ".join(f"{name}={value}" for name, value in again.items() if value)
    if given and not any(word.startswith("--resume") for word in words):
        raise ValueError(
            "--resume=auto must follow the -- where training may be started again, got none with "
            f"{given}; without it the second start refuses the existing run"
        )
    role.env |= {
        "PET_MAX_RESTARTS": str(max_restarts),  # how torchrun names its options in variables
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace + SHUTDOWN_S),
        # With one store for all restarts, new workers would read the addresses of dead ones.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return app


@_component
def tune(app: AppDef) -> AppDef:
    """Searches options of training; the workers share the table of each trial."""
    return app


@_component
def memorize(app: AppDef) -> AppDef:
    """Adds a memory of item pairs to a trained run, on any number of workers."""
    return app


@_component
def evaluate(app: AppDef) -> AppDef:
    """Ranks the whole catalog for every test user of a prepared folder and writes the metrics.

    The number of nodes and workers may differ from those of the training.
    """
    return app


@_component
def recommend(app: AppDef) -> AppDef:
    """Writes the best items of every user to Parquet; the same on any number of workers."""
    return app


@_component
def similar(app: AppDef) -> AppDef:
    """Writes the nearest items of each item to Parquet; the same on any number of workers."""
    return app


@_component
def export(app: AppDef) -> AppDef:
    """Writes item vectors and the encoder of a run for serving; each worker writes its rows."""
    return app


@_component
def synth(app: AppDef) -> AppDef:
    """Generates an event log, in one process on one node."""
    return app


@_component
def prepare(app: AppDef) -> AppDef:
    """Turns an event log into a prepared folder, in one process on one node."""
    return app


@_component
def baseline(app: AppDef) -> AppDef:
    """Counts popularity and item-to-item scores, in one process on one node."""
    return app


@_component
def gate(app: AppDef) -> AppDef:
    """Decides whether a run may replace the published model, in one process.

    The job fails if it may not; the report says why.
    """
    return app


@_component
def publish(app: AppDef) -> AppDef:
    """Publishes an export that passed its gate, in one process."""
    return app


@_component
def rollback(app: AppDef) -> AppDef:
    """Returns to an earlier publication, in one process."""
    return app
