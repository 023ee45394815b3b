"""The image: what it copies is in the repository, and its instructions make a working system."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.launch.image import Host, Image, read_dockerfile

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def host() -> Host:
    """This machine's certificates, package settings and local wheels."""
    # The fresh system writes its own file at that place, so the copy gets another.
    copies = {CERTIFICATES: "etc/host.crt"}
    copies |= {Path(name): name[1:] for name in ("/etc/resolv.conf", "/etc/hosts")}
    copies |= {path: str(path)[1:] for path in Path("/etc/apt/apt.conf.d").glob("99*")}
    variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    wheels = [Path(word) for word in variables.get("PIP_FIND_LINKS", "").split()]
    names = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
    return Host(
        copies={path: name for path, name in copies.items() if path.exists()},
        folders=[folder for folder in wheels if folder.is_dir()],
        variables=variables | dict.fromkeys(names, "/etc/host.crt"),
    )


def tracked() -> set[str]:
    words = ["git", "-C", str(ROOT), "ls-files"]
    files = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return {str(parent) for file in files for parent in (Path(file), *Path(file).parents)}


def test_every_copied_file_and_folder_is_in_the_repository() -> None:
    copies = [one.rest.split() for one in read_dockerfile(DOCKERFILE) if one.name == "COPY"]
    sources = {source for *sources, _ in copies for source in sources}
    assert sources <= tracked()
    assert {"kernels", "modules", "pipeline", "launch", "src"} <= sources


def test_the_environment_is_made_by_the_same_make_setup() -> None:
    runs = [one.rest for one in read_dockerfile(DOCKERFILE) if one.name == "RUN"]
    assert runs[-1] == "make setup DEVICE=$DEVICE"
    assert "docker build -t shardrec:$(shardrec --version) ." in DOCKERFILE.read_text()


def clone(folder: Path) -> Path:
    """The tracked files alone, as somebody has them who builds the image."""
    for name in sorted(tracked()):
        source, target = ROOT / name, folder / name
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


@pytest.mark.image
@pytest.mark.timeout(1800)
def test_the_instructions_make_a_system_that_trains(tmp_path: Path) -> None:
    image = Image(tmp_path / "root", host())
    context = clone(tmp_path / "context")
    for instruction in read_dockerfile(context / "Dockerfile"):
        image.carry_out(instruction, context)
    assert "usage: shardrec COMMAND" in image.run(" ".join(image.command))
    image.run("shardrec synth --output log.parquet --users 300 --items 203 --events 3000")
    image.run("shardrec prepare --events log.parquet --output prepared")
    train = "--prepared prepared --run run --recipe tiny_cpu limits.max_steps=2"
    image.run(f"shardrec launch train -j 1x2 -- {train}")
    assert (image.root / image.work.lstrip("/") / "run/metrics.jsonl").is_file()
