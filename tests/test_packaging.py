"""The wheel holds the package once, under one name, and nothing else."""

import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import shardrec

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "launch", "modules", "pipeline")


def test_the_package_links_point_at_the_four_folders() -> None:
    package = ROOT / "src" / "shardrec"
    links = {path.name: os.readlink(path) for path in package.iterdir() if path.is_symlink()}
    assert links == {name: f"../../{name}" for name in FOLDERS}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files, as a release would be."""
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    assert wheel.name == f"shardrec-{shardrec.__version__}-py3-none-any.whl"
    for name in ("pyproject.toml", "Dockerfile", "Makefile"):
        named = re.findall(r"shardrec[:-](\d+\.\d+\.\d+)", (ROOT / name).read_text())
        assert not named, f"{name} repeats the version"


def copy(source: Path, target: Path) -> None:
    if not source.is_symlink() and not source.exists():
        return  # deleted in the working tree, not yet in the index
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    else:
        target.write_bytes(source.read_bytes())


def test_the_wheel_holds_every_module_under_one_name(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", *FOLDERS], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = {f"shardrec/{name}" for name in tracked if (ROOT / name).exists()}
    expected |= {"shardrec/__init__.py", "shardrec/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = {name for name in archive.namelist() if ".dist-info/" in name}
    assert held == expected
    assert any(name.endswith("licenses/LICENSE") for name in described)


def test_the_installed_wheel_offers_the_command_and_its_help(wheel: Path, tmp_path: Path) -> None:
    """Unpacked beside nothing of the repository, with this environment's packages."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "shardrec = shardrec.launch.cli:main" in archive.read(entry).decode()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import shardrec.launch.cli as cli; "
        f"assert cli.__file__.startswith({str(tmp_path)!r}), cli.__file__; cli.main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout


TORCHRUN = "#!{python}\nfrom torch.distributed.run import main\nmain()\n"
# Nothing else: a path of this process would lead to the repository.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_installed_wheel_trains_on_a_worker_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip into an environment of its own, which borrows this one's other packages."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, ours = (
        Path(
            subprocess.run([one, "-c", where], capture_output=True, text=True, check=True).stdout[
                :-1
            ]
        )
        for one in (str(python), sys.executable)
    )
    (own / "borrowed.pth").write_text(f"{ours}\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (home / "bin" / "torchrun").write_text(TORCHRUN.format(python=python))
    (home / "bin" / "torchrun").chmod(0o755)
    size = "--users 300 --items 203 --events 3000 --clusters 16 --report-users 100"
    small = "--recipe tiny_cpu limits.max_steps=2 validation.every_steps=none"
    for words in (
        f"synth --output log.parquet {size}",
        "prepare --events log.parquet --output data",
        f"launch train -j 1x1 -- --prepared data --run run {small}",
    ):
        done = subprocess.run(
            [str(home / "bin" / "shardrec"), *words.split()],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "end.json").is_file()
    code = "import shardrec.launch.cli as cli; print(cli.__file__)"
    command = [str(python), "-P", "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(own))


@pytest.mark.parametrize("name", ["shardrec", *(f"shardrec.{folder}" for folder in FOLDERS)])
def test_every_public_name_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
    assert not missing
