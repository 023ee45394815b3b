from dataclasses import replace

import pytest

from shardrec.launch.doctor import Facts, diagnose, gather, report

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
        "fbgemm-gpu-cpu": "1.8.0",
        "fbgemm-gpu": None,
    },
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
    older = {"torch": "2.11.1", "torchrec": "1.6.0", "triton": "3.6.0", "fbgemm_gpu_cpu": "1.6.0"}
    assert diagnose(with_versions(**older)) == []
    assert report(HEALTHY).endswith("ready to train on cpu")


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (with_versions(duckdb=None), "wrong", "duckdb is not installed"),
        (with_versions(fbgemm_gpu_cpu=None), "wrong", "fbgemm is not installed, in neither build"),
        (with_versions(fbgemm_gpu="1.8.0"), "wrong", "overwrite each other's files"),
        (with_versions(torch="2.12.0"), "wrong", "torch must be one of 2.13, 2.11, got 2.12.0"),
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


def test_the_environment_of_the_tests_is_a_matching_set() -> None:
    facts = gather()
    assert [finding for finding in diagnose(facts) if finding.level == "wrong"] == []
    assert "gloo" in facts.backends
    assert facts.load_errors == {}
