"""TorchX components: the stages as jobs for a laptop, Slurm or Kubernetes.

By path, ``torchx run -s local_cwd launch/components.py:train -j 1x2 -- --prepared data --run run``;
from an installed wheel, ``shardrec launch train -j 1x2 -- --prepared data --run run``.
What follows ``--`` is what the stage's own command takes; ``shardrec train --help`` lists it.
"""
# TorchX reads signatures from the syntax tree and knows `Optional[Dict]`, not `dict | None`.
# ruff: noqa: UP006, UP035, UP045

from typing import Dict, List, Optional, Sequence

import torchx.specs as specs
from torchx.components import dist

import shardrec
from shardrec.launch.component_options import check_layout

CLI = "shardrec.launch.cli"
IMAGE = f"shardrec:{shardrec.__version__}"

# The working directory may be a checkout, whose folder `kernels` would hide the package so named.
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}

# What torchrun waits longer than its workers may take after SIGTERM, before it kills them.
SHUTDOWN_S = 5

# Without it torchrun takes our `--run` for an abbreviation of its own `--run-path`.
TO_US = ("--",)


def train(
    *arguments: str,
    j: str = "1x1",
    image: str = IMAGE,
    name: str = "/train",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803 (TorchX's own spelling of this option)
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    grace: int = 25,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains on a prepared folder, the catalog sharded over all workers of all nodes.

    With `--resume=auto` after the `--`, workers that are started again go on from the last whole
    checkpoint: on the same nodes (max_restarts), or as a new job (max_retries).

    Args:
        arguments: after ``--``, everything `shardrec train` takes
        j: nodes x workers on each, such as 1x2 or 4x8; one worker a GPU
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: experiment/job, or /job
        h: named resource of the scheduler; takes the place of cpu, gpu and memMB
        cpu: CPUs for each node, shared out among its workers
        gpu: GPUs for each node
        memMB: memory for each node, in MB
        env: variables for the workers, such as OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        max_retries: how often the scheduler starts the job again (local_cwd does not)
        max_restarts: how often workers are started again in the same job after one has died
        grace: seconds after SIGTERM in which workers may end their step and write a checkpoint
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
        rdzv_port: port on the first node where several nodes meet; unused with one node
    """
    if max_restarts and not any(word.startswith("--resume") for word in arguments):
        raise ValueError(
            "--resume=auto must follow the -- where workers are started again, got none with "
            f"max_restarts={max_restarts}; without it they would refuse the folder that they began"
        )
    app = dist.ddp(
        *TO_US,
        "train",
        *arguments,
        m=CLI,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=check_layout(j),
        env=ENVIRONMENT | (env or {}),
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )
    app = _finish(app, "train", j)
    app.roles[0].env |= {
        "PET_MAX_RESTARTS": str(max_restarts),  # how torchrun spells its options in variables
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace + SHUTDOWN_S),
        # One store for all starts would give workers the addresses of those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return app


def evaluate(
    *arguments: str,
    j: str = "1x1",
    image: str = IMAGE,
    name: str = "/evaluate",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Ranks the whole catalog for every test user of a prepared folder and writes the metrics.

    Args:
        arguments: after ``--``, everything `shardrec evaluate` takes
        j: nodes x workers on each; need not be what the run was trained with
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: experiment/job, or /job
        h: named resource of the scheduler; takes the place of cpu, gpu and memMB
        cpu: CPUs for each node, shared out among its workers
        gpu: GPUs for each node
        memMB: memory for each node, in MB
        env: variables for the workers
        max_retries: how often the scheduler starts the job again
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
        rdzv_port: port on the first node where several nodes meet; unused with one node
    """
    app = dist.ddp(
        *TO_US,
        "evaluate",
        *arguments,
        m=CLI,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=check_layout(j),
        env=ENVIRONMENT | (env or {}),
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )
    return _finish(app, "evaluate", j)


def recommend(
    *arguments: str,
    j: str = "1x1",
    image: str = IMAGE,
    name: str = "/recommend",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Writes the best items of every user of some histories to Parquet.

    Args:
        arguments: after ``--``, everything `shardrec recommend` takes
        j: nodes x workers on each; changes no list
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: experiment/job, or /job
        h: named resource of the scheduler; takes the place of cpu, gpu and memMB
        cpu: CPUs for each node, shared out among its workers
        gpu: GPUs for each node
        memMB: memory for each node, in MB
        env: variables for the workers
        max_retries: how often the scheduler starts the job again
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
        rdzv_port: port on the first node where several nodes meet; unused with one node
    """
    app = dist.ddp(
        *TO_US,
        "recommend",
        *arguments,
        m=CLI,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=check_layout(j),
        env=ENVIRONMENT | (env or {}),
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )
    return _finish(app, "recommend", j)


def export(
    *arguments: str,
    j: str = "1x1",
    image: str = IMAGE,
    name: str = "/export",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Writes item vectors and the encoder of a run for a service.

    Args:
        arguments: after ``--``, everything `shardrec export` takes
        j: nodes x workers on each; each worker writes its rows
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: experiment/job, or /job
        h: named resource of the scheduler; takes the place of cpu, gpu and memMB
        cpu: CPUs for each node, shared out among its workers
        gpu: GPUs for each node
        memMB: memory for each node, in MB
        env: variables for the workers
        max_retries: how often the scheduler starts the job again
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
        rdzv_port: port on the first node where several nodes meet; unused with one node
    """
    app = dist.ddp(
        *TO_US,
        "export",
        *arguments,
        m=CLI,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=check_layout(j),
        env=ENVIRONMENT | (env or {}),
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )
    return _finish(app, "export", j)


def synth(
    *arguments: str,
    image: str = IMAGE,
    name: str = "synth",
    memMB: int = 4096,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Generates an event log, in one process on one node.

    Args:
        arguments: after ``--``, everything `shardrec synth` takes
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: job name
        memMB: memory in MB
        env: variables for the process
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
    """
    role = _role("synth", arguments, specs.resource(cpu=1, memMB=memMB), env, mounts)
    role.image = image
    return specs.AppDef(name=name, roles=[role])


def prepare(
    *arguments: str,
    image: str = IMAGE,
    name: str = "prepare",
    h: Optional[str] = None,
    cpu: int = 4,
    memMB: int = 8192,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Turns an event log into a prepared folder, in one process on one node.

    Args:
        arguments: after ``--``, everything `shardrec prepare` takes
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: job name
        h: named resource of the scheduler; takes the place of cpu and memMB
        cpu: CPUs
        memMB: memory in MB
        env: variables for the process
        max_retries: how often the scheduler starts the job again
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
    """
    role = _role("prepare", arguments, specs.resource(cpu=cpu, memMB=memMB, h=h), env, mounts)
    role.image, role.max_retries = image, max_retries
    return specs.AppDef(name=name, roles=[role])


def gate(
    *arguments: str,
    image: str = IMAGE,
    name: str = "gate",
    cpu: int = 2,
    memMB: int = 8192,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Says whether a run may take the place of the published model, in one process.

    The job fails where it may not; the report that it writes says why.

    Args:
        arguments: after ``--``, everything `shardrec gate` takes
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: job name
        cpu: CPUs
        memMB: memory in MB
        env: variables for the process
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
    """
    role = _role("gate", arguments, specs.resource(cpu=cpu, memMB=memMB), env, mounts)
    role.image = image
    return specs.AppDef(name=name, roles=[role])


def publish(
    *arguments: str,
    image: str = IMAGE,
    name: str = "publish",
    memMB: int = 4096,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Lets a pointer name an export that its gate let pass, in one process.

    Args:
        arguments: after ``--``, everything `shardrec publish` takes, --gate or --force among it
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: job name
        memMB: memory in MB
        env: variables for the process
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
    """
    role = _role("publish", arguments, specs.resource(cpu=1, memMB=memMB), env, mounts)
    role.image = image
    return specs.AppDef(name=name, roles=[role])


def rollback(
    *arguments: str,
    image: str = IMAGE,
    name: str = "rollback",
    memMB: int = 4096,  # noqa: N803
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Lets a pointer name what it named before, in one process.

    Args:
        arguments: after ``--``, everything `shardrec rollback` takes
        image: container image that has shardrec installed (local_cwd and slurm use no image)
        name: job name
        memMB: memory in MB
        env: variables for the process
        mounts: type=bind,src=/host,dst=/job[,readonly] for schedulers with containers
    """
    role = _role("rollback", arguments, specs.resource(cpu=1, memMB=memMB), env, mounts)
    role.image = image
    return specs.AppDef(name=name, roles=[role])


def _role(
    stage: str,
    arguments: Sequence[str],
    resource: specs.Resource,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
) -> specs.Role:
    """One process that runs a stage's command."""
    return specs.Role(
        name=stage,
        image=IMAGE,
        entrypoint="shardrec",
        args=[stage, *arguments],
        env=ENVIRONMENT | (env or {}),
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )


def _finish(app: specs.AppDef, stage: str, j: str) -> specs.AppDef:
    """Name the role after its stage and give each worker its share of the node's CPUs."""
    (role,) = app.roles
    role.name = stage
    workers = int(j.rpartition("x")[2])
    role.env.setdefault("OMP_NUM_THREADS", str(max(1, role.resource.cpu // workers)))
    return app
