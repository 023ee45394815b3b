"""The components as TorchX reads them: by path, with help, and as requests to three schedulers."""

import contextlib
import inspect
import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import main

import shardrec
from shardrec.launch import components
from shardrec.launch.runner import Job, describe
from shardrec.launch.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent.parent
STAGE = ["--", "--prepared", "data", "--run", "run", "loss=sce"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run TorchX in this process, from the root; it replaces handlers of signals for good."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(ROOT)
    for kind in (ArgOnceAction, torchxconfig):  # an option may not come twice, not even in two runs
        kind.called_args.clear()
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def torchx(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``torchx run``."""
    shown, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        try:
            main(["run", *words])
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, shown.getvalue(), errors.getvalue()


def dry_run(scheduler: list[str], component: str, *words: str) -> str:
    path = f"launch/components.py:{component}"
    code, shown, errors = torchx("--dryrun", "-s", *scheduler, "--workspace", "", path, *words)
    assert code == 0, errors
    return shown


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ("train", ["-j str", "one worker a GPU", "--max_retries int", "--image str", "--env str"]),
        ("evaluate", ["-j str", "may differ from those of the training"]),
        ("prepare", ["one process on one node", "--memMB int"]),
    ],
)
def test_the_docstring_is_the_help(component: str, words: list[str]) -> None:
    code, shown, errors = torchx("-s", "local_cwd", f"launch/components.py:{component}", "--help")
    assert code == 0, errors
    text = " ".join(shown.split())
    assert [word for word in words if word not in text] == []


def test_a_misspelt_component_option_is_refused() -> None:
    words = ["-s", "local_cwd", "--dryrun", "launch/components.py:train", "--gpus", "8"]
    code, _, errors = torchx(*words)
    assert code != 0
    assert "unrecognized arguments: --gpus" in errors


def test_local_workers_share_the_cpus_and_leave_the_folder_off_the_path() -> None:
    text = dry_run(["local_cwd"], "train", "-j", "1x2", "--cpu", "8", *STAGE)
    joined = "".join(text.split())
    assert "'PYTHONSAFEPATH':'1'" in joined
    assert "'OMP_NUM_THREADS':'4'" in joined
    assert "--nnodes 1 --nproc_per_node 2" in " ".join(text.replace("'", " ").split())


def test_given_variables_win_over_ours() -> None:
    text = dry_run(["local_cwd"], "train", "--env", "OMP_NUM_THREADS=3,NCCL_DEBUG=INFO", *STAGE)
    assert "'OMP_NUM_THREADS': '3'" in text
    assert "'NCCL_DEBUG': 'INFO'" in text


def test_slurm_is_asked_for_nodes_that_connect_to_the_first() -> None:
    words = ["-j", "2x8", "--cpu", "96", "--gpu", "8", "--memMB", "500000", "--max_retries", "2"]
    text = dry_run(["slurm", "-cfg", "partition=gpu"], "train", *words, *STAGE, "--resume=auto")
    assert text.count("#SBATCH --job-name=train-") == 2
    assert "--cpus-per-task=96 --mem=500000 --gpus-per-task=8" in text
    assert "--partition=gpu" in text
    assert "TORCHX_MAX_RETRIES=2" in text
    assert "--nnodes 2 --nproc_per_node 8" in text
    assert "-m shardrec.launch.cli -- train --prepared data --run run loss=sce" in text
    assert "PYTHONSAFEPATH=1" in text
    assert "OMP_NUM_THREADS=12" in text


def test_kubernetes_is_asked_for_pods_with_image_gpus_and_mounts() -> None:
    pytest.importorskip("kubernetes")
    words = ["-j", "2x4", "--gpu", "4", "--image", "me/shardrec:1", "--max_retries", "3"]
    mounts = ["--mounts", "type=bind,src=/disks,dst=/data"]
    stage = [*STAGE, "--resume=auto"]
    text = dry_run(["kubernetes", "-cfg", "queue=jobs"], "train", *words, *mounts, *stage)
    request = text.partition("=== SCHEDULER REQUEST ===")[2]
    assert request.count("image: me/shardrec:1") == 2
    assert request.count("nvidia.com/gpu: '4'") == 4
    assert "queue: jobs" in request
    assert "maxRetry: 3" in request
    assert "mountPath: /data" in request
    assert "loss=sce" in request


def test_by_default_a_job_asks_for_two_cpus_a_worker_and_no_memory() -> None:
    text = dry_run(["slurm"], "train", "-j", "1x8", *STAGE)
    assert "--cpus-per-task=16" in text and "--mem" not in text
    assert "OMP_NUM_THREADS=2" in text


def test_a_job_on_gpus_asks_for_four_cpus_each() -> None:
    text = dry_run(["slurm"], "train", "-j", "4x8", "--gpu", "8", *STAGE)
    assert "--cpus-per-task=32 --gpus-per-task=8" in text and "--mem" not in text
    assert "OMP_NUM_THREADS=4" in text


@pytest.mark.parametrize("option", ["--max_retries", "--max_restarts"])
def test_training_that_may_start_twice_must_resume(option: str) -> None:
    words = ["--workspace", "", "launch/components.py:train", option, "2", *STAGE]
    with pytest.raises(ValueError, match=f"--resume=auto must follow.* {option[2:]}=2;"):
        torchx("--dryrun", "-s", "slurm", *words)


@pytest.mark.parametrize(
    ("component", "words", "said"),
    [
        ("train", ["-j", "2:4x8"], "--max_restarts must be at least 1 where nodes may leave"),
        ("train", ["-j", "4:2x8"], "LEAST:MOSTxWORKERS .* got '4:2x8' for train; use 2x8"),
        ("evaluate", ["-j", "2:4x8"], "for train alone.* got '2:4x8' for evaluate; use 4x8"),
        ("train", ["-j", "2:4x"], "must be NODESxWORKERS"),
    ],
)
def test_nodes_from_least_to_most_are_for_training_that_restarts(
    component: str, words: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        describe(Job(component=component, arguments=(*words, *STAGE), scheduler="slurm"))


def test_prepare_is_one_process_without_a_rendezvous() -> None:
    text = dry_run(["slurm"], "prepare", "--cpu", "16", "--", "--events", "log.parquet")
    assert "torchrun" not in text
    assert "shardrec prepare --events log.parquet" in text
    assert "--cpus-per-task=16" in text


def test_aws_batch_is_asked_for_nodes_with_image_gpus_and_mounts() -> None:
    words = [
        "-j",
        "2x4",
        "--gpu",
        "4",
        "--image",
        "me/shardrec:1",
        "--max_retries",
        "3",
        "--memMB",
        "9000",
    ]
    mounts = ["--mounts", "type=bind,src=/disks,dst=/data"]
    stage = [*STAGE, "--resume=auto"]
    text = dry_run(["aws_batch", "-cfg", "queue=jobs"], "train", *words, *mounts, *stage)
    request = text.partition("=== SCHEDULER REQUEST ===")[2]
    assert "numNodes: 2" in request and "queue: jobs" in request
    assert "image: me/shardrec:1" in request
    assert "type: GPU value: '4'" in " ".join(request.split())
    assert "attempts: 3" in request
    assert "containerPath: /data" in request
    assert "loss=sce" in request


@pytest.mark.parametrize("component", STAGES)
def test_every_stage_is_a_request_that_runs_its_command(component: str) -> None:
    job = Job(component=component, arguments=("--", "--force"), scheduler="slurm")
    text = " ".join(describe(job).split())
    assert f"shardrec.launch.cli -- {component} --force" in text or (
        f"shardrec {component} --force" in text
    )


def test_the_defaults_of_a_component_are_those_of_its_stage() -> None:
    for stage, command in STAGES.items():
        options = inspect.signature(getattr(components, stage)).parameters
        assert (options["cpu"].default, options["memMB"].default) == (
            command.cpu,
            command.memory_mb,
        )
        assert options["name"].default.lstrip("/") == stage
        assert ("j" in options) == (command.kind == "distributed")
    assert inspect.signature(components.train).parameters["grace"].default == 25


def test_aws_batch_needs_the_memory_to_be_named() -> None:
    with pytest.raises(ValueError, match="memMB to be set to a positive value, got 0"):
        describe(Job(component="train", arguments=(), scheduler="aws_batch", settings="queue=q"))


@pytest.mark.parametrize("scheduler", ["kubernetes", "aws_batch"])
def test_the_default_image_is_the_one_that_the_dockerfile_is_built_as(scheduler: str) -> None:
    memory = ("--memMB", "9000")  # AWS Batch has no default
    job = Job(component="train", arguments=memory, scheduler=scheduler, settings="queue=jobs")
    name = f"shardrec:{shardrec.__version__}"
    assert f"image: {name}" in describe(job)
    built = "docker build -t shardrec:$(shardrec --version) ."
    assert built in (ROOT / "Dockerfile").read_text()
