"""Carries out a Dockerfile without Docker: in a fresh Debian below a folder, entered by chroot.

For machines where no container engine runs. It knows the instructions that our Dockerfile has, and
refuses any other. What a machine needs to reach its package index (certificates, pip's settings,
local wheels) is copied into the fresh system or seen there read-only.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """The instructions, continued lines joined and comments dropped."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    words = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [Instruction(name.upper(), " ".join(rest.split())) for name, _, rest in words]


@dataclass(frozen=True)
class Host:
    """What it takes to reach the package index from here; nothing of it can be changed from there.

    Attributes:
        copies: files, and where in the fresh system a copy is put.
        folders: seen at the same place, read-only.
        variables: for every command.
    """

    copies: Mapping[Path, str]
    folders: Sequence[Path]
    variables: Mapping[str, str]


@dataclass
class Image:
    """What the instructions have made so far.

    Attributes:
        root: the fresh system.
        host: what commands need of this machine.
    """

    root: Path
    host: "Host"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    work: str = "/"
    command: list[str] = field(default_factory=list)

    def carry_out(self, instruction: Instruction, context: Path) -> None:
        known = {
            "FROM": self._from,
            "ARG": self._argument,
            "ENV": self._variable,
            "WORKDIR": self._work,
            "RUN": self.run,
            "CMD": self._default,
        }
        if instruction.name == "COPY":
            self._copy(shlex.split(instruction.rest), context)
        else:
            known[instruction.name](instruction.rest)

    def run(self, command: str) -> str:
        """Runs a shell command in the system; what it printed."""
        known = self.environment | self.arguments | dict(self.host.variables)
        variables = [f"{name}={value}" for name, value in known.items()]
        inside = ["env", "-i", *variables, "sh", "-ec", f"cd {self.work}; {command}"]
        enter = shlex.join(["exec", "chroot", str(self.root), *inside])
        script = "\n".join([*self._mounts(), enter])
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _from(self, image: str) -> None:
        suite = re.fullmatch(r"debian:(\w+)-slim", image)
        assert suite, f"FROM must be a slim Debian, got {image}"
        command = ["debootstrap", "--variant=minbase", suite[1], str(self.root)]
        subprocess.run(command, check=True, capture_output=True)
        for source, target in self.host.copies.items():
            shutil.copy2(source, self.root / target)

    def _argument(self, text: str) -> None:
        name, _, value = text.partition("=")
        self.arguments[name] = value

    def _variable(self, text: str) -> None:
        name, _, value = text.partition("=")
        self.environment[name] = self._expand(value)

    def _work(self, folder: str) -> None:
        self.work = folder
        self._inside(folder).mkdir(parents=True, exist_ok=True)

    def _copy(self, words: Sequence[str], context: Path) -> None:
        *sources, target = words
        folder = self._inside(target)
        for name in sources:
            if (context / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(
                    context / name, folder, symlinks=True, ignore=ignore, dirs_exist_ok=True
                )
            else:
                assert target.endswith("/"), "several files go to a folder"
                shutil.copy2(context / name, folder / name)

    def _default(self, text: str) -> None:
        self.command = [word.strip(' "') for word in text.strip("[]").split(",")]

    def _inside(self, path: str) -> Path:
        return self.root / str(Path("/", self.work.lstrip("/"), path)).lstrip("/")

    def _expand(self, text: str) -> str:
        known: Mapping[str, str] = self.environment | self.arguments
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known[found[1]], text)

    def _mounts(self) -> Iterator[str]:
        """Folders of this machine, which the system sees and cannot change."""
        yield f"mount -t proc proc {self.root}/proc"
        for folder in self.host.folders:
            inside = f"{self.root}{folder}"
            yield f"mkdir -p {inside}; mount --bind {folder} {inside}"
            yield f"mount -o remount,bind,ro {inside}"
