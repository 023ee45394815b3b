"""Jobs that really run: TorchX starts torchrun, which starts workers that connect over gloo."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardrec.launch import cli
from shardrec.launch.runner import (
    Failure,
    Job,
    describe,
    open_runner,
    request_of,
    run_here,
    share_cores,
    split,
    submit,
)
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.synth import SynthConfig, generate

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("--recipe", "tiny_cpu", "encoder.dropout=0", "limits.max_steps=3", "log_every=1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    size = SynthConfig(users=300, items=203, events=3_000, clusters=16, report_users=100)
    generate(size, folder / "log.parquet")
    prepare(PrepareConfig(events=str(folder / "log.parquet"), output=str(folder / "prepared")))
    return folder / "prepared"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without a launcher."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["train", "--prepared", str(prepared), "--run", str(run), *SMALL]) == 0
    return run


# Two workers on one node: the next test, and tests/launch/test_elastic.py.
@pytest.mark.slow
def test_workers_on_two_nodes_train_as_one_process_does(
    prepared: Path, trained: Path, tmp_path: Path
) -> None:
    run, lines = tmp_path / "run", list[str]()
    component = ("-j", "2x1", "--rdzv_port", str(free_port()), "--cpu", "2")
    stage = ("--prepared", str(prepared), "--run", str(run), *SMALL)
    failure = run_here(Job(component="train", arguments=(*component, "--", *stage)), lines.append)
    assert failure is None, "\n".join(lines)
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)
    assert any("[0]:" in line and "step" in line for line in lines), "rank 0's progress is shown"
    assert not any("PYTHONSAFEPATH" in line for line in lines)


@pytest.mark.slow
def test_torchx_trains_by_the_path_of_the_component(
    prepared: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    scheduler = ["-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'logs'}", "--workspace", ""]
    component = ["launch/components.py:train", "-j", "1x2", "--cpu", "2"]
    stage = ["--", "--prepared", str(prepared), "--run", str(run), *SMALL]
    torchx = str(Path(sys.executable).parent / "torchx")
    done = subprocess.run(
        [torchx, "run", *scheduler, *component, *stage],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "end"


@pytest.mark.slow
def test_a_failing_worker_is_quoted_and_its_exit_code_passed_on(tmp_path: Path) -> None:
    lines = list[str]()
    stage = ("--prepared", str(tmp_path / "nothing"), "--run", str(tmp_path / "run"))
    job = Job(component="train", arguments=("-j", "1x1", "--", *stage), log_dir=tmp_path / "logs")
    failure = run_here(job, lines.append)
    assert failure is not None and "nothing" in failure.complaint, "\n".join(lines)
    assert failure.exit_code == cli.BAD_INPUT
    assert list((tmp_path / "logs").rglob("combined.log"))


@pytest.mark.slow
def test_a_stage_without_torchrun_passes_its_exit_code_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = ["--events", str(tmp_path / "nothing.parquet"), "--output", str(tmp_path / "out")]
    assert cli.main(["launch", "prepare", "--", *stage]) == 2
    assert "shardrec launch: prepare failed: events must be" in capfd.readouterr().err


def test_a_crash_is_no_wrong_input(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.exit(7)\n")
    stage = ("--events", str(prepared.parent / "log.parquet"), "--output", str(tmp_path / "out"))
    broken = ("--env", f"PYTHONPATH={tmp_path}")
    failure = run_here(Job(component="prepare", arguments=(*broken, "--", *stage)), print)
    assert failure == Failure("", cli.FAILED)


@pytest.mark.slow
def test_two_workers_evaluate_what_one_process_trained(
    prepared: Path, trained: Path, tmp_path: Path
) -> None:
    reports = []
    for component in (None, ("-j", "1x2")):
        path = tmp_path / f"{component is None}.json"
        stage = ("--prepared", str(prepared), "--run", str(trained), "--output", str(path))
        if component is None:
            assert cli.main(["evaluate", *stage]) == 0
        else:
            job = Job(component="evaluate", arguments=(*component, "--", *stage))
            assert run_here(job, print) is None
        reports.append(json.loads(path.read_text()))
    assert reports[0]["request"] == reports[1]["request"]
    assert reports[1]["metrics"] == pytest.approx(reports[0]["metrics"], rel=1e-6)


def test_the_command_checks_the_stage_s_options_before_it_starts_anything(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stage = ["--prepared", "data", "--run", str(tmp_path / "run"), "encoder.widht=8"]
    assert cli.main(["launch", "train", "-j", "1x2", "--", *stage]) == 2
    said = capsys.readouterr().err
    assert "did you mean encoder.width" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_prepare_runs_as_a_job(prepared: Path, tmp_path: Path) -> None:
    log = prepared.parent / "log.parquet"
    stage = ("--events", str(log), "--output", str(tmp_path / "out"))
    lines = list[str]()
    failure = run_here(Job(component="prepare", arguments=("--", *stage)), lines.append)
    assert failure is None, "\n".join(lines)
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (("-j", "1x2"), "4"),
        (("-j", "2x1"), "4"),
        (("-j", "1x16"), "1"),
        (("-j", "1x2", "--cpu", "6"), "3"),
        (("-j", "1x2", "--env", "OMP_NUM_THREADS=5"), "5"),
    ],
)
def test_local_workers_share_the_cores_of_this_machine(
    words: tuple[str, ...], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrec.launch.runner.usable_cores", lambda: 8)
    stage = ("--", "--prepared", "data", "--run", "run")
    job = Job(component="train", arguments=(*words, *stage))
    with open_runner() as runner:
        request = request_of(runner, job)
        share_cores(request, job)
    replicas = [one for group in request.request.role_params.values() for one in group]
    assert {one.env["OMP_NUM_THREADS"] for one in replicas} == {threads}


def test_two_jobs_on_this_machine_have_different_ports() -> None:
    """With one port the second job would use the store of the first, and end with it."""
    job = Job(component="train", arguments=("-j", "2x1", "--", "--prepared", "p", "--run", "r"))
    endpoints = [re.findall(r"localhost}:(\d+)", describe(job)) for _ in range(2)]
    assert endpoints[0][0] != endpoints[1][0] and "29500" not in endpoints[0] + endpoints[1]
    asked = dataclasses.replace(job, arguments=("--rdzv_port=4711", *job.arguments))
    assert "localhost}:4711" in describe(asked)
    assert "}:29500" in describe(dataclasses.replace(job, scheduler="slurm"))


def test_names_for_kubernetes_are_cut_to_what_is_allowed() -> None:
    pytest.importorskip("kubernetes")
    name = "weekly/My_Run.of the whole_catalogue-with-a-very-long-name-indeed"
    words = ("--mounts", "type=volume,src=claim,dst=/data", "-j", "2x1")
    for given in (("--name", name), (f"--name={name}",)):
        job = Job(
            component="train",
            arguments=(*words, *given),
            scheduler="kubernetes",
            settings="queue=q",
        )
        text = describe(job).partition("apiVersion:")[2]
        (app,) = re.findall(r"\n  name: (my-run-[-\w]+)\n", text)
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", app) and len(f"{app}-train-1-0") <= 63
        assert "claimName: claim" in text
        # NCCL needs more shared memory than the 64 MB that a container has.
        assert text.count("mountPath: /dev/shm") == 2 and text.count("medium: Memory") == 2


def test_containers_keep_the_threads_that_they_were_given() -> None:
    request: Any = object()  # has no processes of this machine
    share_cores(request, Job(component="train", arguments=(), scheduler="local_docker"))


def test_a_request_for_another_scheduler_is_described_and_not_submitted() -> None:
    text = describe(Job(component="train", arguments=("-j", "2x8"), scheduler="slurm"))
    assert "sbatch" in text
    assert "--nproc_per_node 8" in text


def test_a_machine_without_slurm_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="must find Slurm's sbatch on PATH, got none; .* --dryrun"):
        submit(Job(component="train", arguments=("-j", "2x8"), scheduler="slurm"))


def test_the_stage_s_arguments_follow_two_dashes() -> None:
    assert split(["-j", "1x2"]) == (["-j", "1x2"], [])
    assert split(["--", "a", "--", "b"]) == ([], ["a", "--", "b"])
