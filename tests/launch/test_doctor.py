import ctypes
import importlib.metadata
from dataclasses import replace

import pytest

from shardrec.launch import cli
from shardrec.launch.doctor import NEEDED, Facts, diagnose, driver_release, gather, report

HEALTHY = Facts(
    python=(3, 12),
    machine="Linux x86_64",
    versions={
        "torch": "2.13.0+cpu",
        "torchrec": "1.8.0",
        "triton": "3.7.1",
        "torchx": "0.7.0",
        "torchmetrics": "1.9.0",
        "pyarrow": "26.0.1",
        "duckdb": "2.0.0",
        "rich": "15.0.0",
        "safetensors": "0.8.0",
        "fbgemm-gpu-cpu": "1.8.0",
        "fbgemm-gpu": None,
    },
    driver=None,
    gpus=0,
    torch_cuda=None,
    torch_sees_gpu=False,
    backends=("gloo",),
    load_errors={},
)


def with_versions(**versions: str | None) -> Facts:
    renamed = {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(HEALTHY, versions=HEALTHY.versions | renamed)


def test_a_matching_set_has_no_findings() -> None:
    assert diagnose(HEALTHY) == []
    assert report(HEALTHY).endswith("ready to train on cpu")


def test_pyspark_without_java_is_a_note() -> None:
    (finding,) = diagnose(replace(with_versions(pyspark="4.3.0"), has_java=False))
    assert finding.level == "note" and "no Java" in finding.text
    assert diagnose(replace(HEALTHY, has_java=False)) == []


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.11.1", "torchrec": "1.6.0", "triton": "3.6.0", "fbgemm_gpu_cpu": "1.6.0"},
        {"torch": "2.14.1", "torchrec": "1.9.2", "triton": "3.8.0", "fbgemm_gpu_cpu": "1.9.0"},
    ],
    ids=["2.11", "2.14"],
)
def test_every_set_that_make_setup_installs_fits_together(versions: dict[str, str]) -> None:
    assert diagnose(with_versions(**versions)) == []
    for name, release in versions.items():
        if name != "torch":
            (finding,) = diagnose(with_versions(**versions | {name: "0.9.1"}))
            assert f"must be {release[:3]} with torch {versions['torch']}" in finding.text


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (with_versions(duckdb=None), "wrong", "duckdb is not installed"),
        (with_versions(fbgemm_gpu_cpu=None), "wrong", "fbgemm is not installed, in neither build"),
        (with_versions(fbgemm_gpu="1.8.0"), "wrong", "overwrite each other's files"),
        (
            with_versions(torch="2.12.0"),
            "wrong",
            "torch must be one of 2.14, 2.13, 2.11, got 2.12.0",
        ),
        (with_versions(torchrec="1.6.0"), "wrong", "torchrec must be 1.8 with torch 2.13.0+cpu"),
        (with_versions(triton="3.6.0"), "wrong", "triton must be 3.7"),
        (replace(HEALTHY, python=(3, 10)), "wrong", "Python must be 3.11 to 3.14, got 3.10"),
        (replace(HEALTHY, gpus=1), "note", "stay idle"),
        (replace(HEALTHY, backends=()), "wrong", "no gloo backend"),
        (
            replace(HEALTHY, load_errors={"fbgemm_gpu": "undefined symbol"}),
            "wrong",
            "fbgemm_gpu is installed but does not load (undefined symbol)",
        ),
        (
            replace(with_versions(fbgemm_gpu_cpu=None, fbgemm_gpu="1.8.0"), torch_cuda="13.0"),
            "note",
            "right for a login node",
        ),
        (
            replace(
                with_versions(fbgemm_gpu_cpu=None, fbgemm_gpu="1.8.0"), torch_cuda="13.0", gpus=2
            ),
            "wrong",
            "torch (built for CUDA 13.0) cannot use them",
        ),
    ],
)
def test_each_mismatch_is_explained_in_a_line(facts: Facts, level: str, words: str) -> None:
    matching = [finding for finding in diagnose(facts) if words in finding.text]
    assert [finding.level for finding in matching] == [level]
    assert all("\n" not in finding.text and "; " in finding.text for finding in diagnose(facts)
               if finding.level == "wrong")  # fmt: skip
    assert f"{level}: {matching[0].text}" in report(facts)


def test_a_login_node_without_a_driver_can_submit_and_says_so() -> None:
    error = "libnvidia-ml.so.1: cannot open shared object file: No such file or directory"
    login = replace(
        with_versions(fbgemm_gpu_cpu=None, fbgemm_gpu="1.8.0"),
        torch_cuda="13.0",
        load_errors={"fbgemm_gpu": error, "torchrec": error},
    )
    assert {finding.level for finding in diagnose(login)} == {"note"}
    assert "fbgemm_gpu and torchrec load where there is a driver" in report(login)
    assert report(login).endswith("ready to submit jobs to machines with a driver")
    with_driver = replace(login, driver="550.54.15", gpus=1, torch_sees_gpu=True)
    assert "wrong" in {finding.level for finding in diagnose(with_driver)}


class Management:
    """The driver's library as it answers on a machine that has a driver, loaded or not."""

    def __init__(self, *, is_loaded: bool) -> None:
        self.is_loaded = is_loaded
        self.users = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802 (the library's own spelling)
        self.users += self.is_loaded
        return 0 if self.is_loaded else 9

    def nvmlSystemGetDriverVersion(self, text: ctypes.Array[ctypes.c_char], size: int) -> int:  # noqa: N802
        assert self.users and len(text) == size
        text.value = b"550.54.15"
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.users -= 1
        return 0


def test_the_driver_is_asked_for_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Management(is_loaded=True)
    monkeypatch.setattr(ctypes, "CDLL", {"libnvidia-ml.so.1": library}.__getitem__)
    assert driver_release() == "550.54.15"
    assert library.users == 0
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Management(is_loaded=False))
    assert driver_release() is None


def test_the_report_names_the_driver_and_the_gpus() -> None:
    lines = [line.split() for line in report(HEALTHY).splitlines()]
    assert ["NVIDIA", "driver", "none"] in lines and ["GPUs", "none"] in lines
    with_gpus = replace(HEALTHY, driver="550.54.15", gpus=2, backends=("gloo", "nccl"))
    lines = [line.split() for line in report(with_gpus).splitlines()]
    assert ["NVIDIA", "driver", "550.54.15"] in lines and ["GPUs", "2"] in lines
    assert ["backends", "gloo,", "nccl"] in lines


def test_the_command_shows_versions_driver_backends_and_whether_they_match(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    for name in NEEDED:
        assert [name, importlib.metadata.version(name)] in lines
    (driver,) = (line[2:] for line in lines if line[:2] == ["NVIDIA", "driver"])
    assert driver == [driver_release() or "none"]
    (backends,) = (line[1:] for line in lines if line[:1] == ["backends"])
    assert "gloo" in backends or "gloo," in backends
    assert text.splitlines()[-1].startswith("ready to train on ")
    monkeypatch.setattr("shardrec.launch.doctor.gather", lambda: with_versions(triton="3.6.0"))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "wrong: triton must be 3.7 with torch 2.13.0+cpu, got 3.6.0" in text
    assert "ready to train" not in text


def test_the_environment_of_the_tests_is_a_matching_set() -> None:
    facts = gather()
    assert [finding for finding in diagnose(facts) if finding.level == "wrong"] == []
    assert "gloo" in facts.backends
    assert facts.load_errors == {}


@pytest.mark.parametrize(
    ("address", "words"),
    [(None, "node-7, has no address"), ("127.0.1.1", "node-7, has the address 127.0.1.1")],
)
def test_a_name_that_others_cannot_reach_is_noted(address: str | None, words: str) -> None:
    (finding,) = diagnose(replace(HEALTHY, host=("node-7", address)))
    assert finding.level == "note"
    assert words in finding.text and "GLOO_SOCKET_IFNAME" in finding.text
    assert not diagnose(replace(HEALTHY, host=("node-7", "10.0.0.7")))
