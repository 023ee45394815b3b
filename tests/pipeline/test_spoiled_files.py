"""Every file that we read back, spoiled at random: right data or one line that names the file.

Each try is a process of its own, under limits of memory and time. A hook of Python's counts what
would run a command or write a file. Where an attacker's hand is played, the manifest is made to fit
the spoiled file: then other data may come out, and everything else still holds.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests import ranks
from tests.pipeline.exports import OLD_EXPORT, own_export
from tests.pipeline.spoiling import spoil

from shardrec.launch import cli
from shardrec.pipeline.checkpoint.store import load_checkpoint
from shardrec.pipeline.outputs.formats import METRICS
from shardrec.pipeline.outputs.stage_output import read_output
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import BatchConfig, TrainingBatches
from shardrec.pipeline.report import render
from shardrec.pipeline.report.records import read_runs
from shardrec.pipeline.run.folder import open_checkpoints, read_run
from shardrec.pipeline.run.resume import _read_end
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.served.pointer import read_published

WRITTEN = OLD_EXPORT.parent
MOST_BYTES, MOST_SECONDS = 600 << 20, 20
SECRET = "what stands outside of the folder"
# Without checksums: other values in them look as right as the first.
UNSEALED = ("run", "metrics", "pointer")
# The user names these files: a link there is one more name.
NAMED = ("metrics", "pointer")
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
# Tries that once ended in a traceback: names that are no UTF-8, numbers beyond float, other rows.
FOUND = (1243, 1507, 3236)
# The root is on no path of a new process, which finds functions by the names of their modules.
FIND_TESTS = f"import runpy; runpy.run_path({ranks.__file__!r})['make_tests_importable']()"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def read_export(folder: Path) -> Any:
    return Recommender.open(folder).recommend([[3], [5, 1, 4]], k=4)


def read_checkpoint(folder: Path) -> Any:
    state = load_checkpoint(folder)
    tensors = {**state.encoder, **state.table}
    return {name: one.tolist() for name, one in tensors.items()}, dict(state.progress)


def read_run_folder(folder: Path) -> Any:
    details, config = read_run(folder)
    best = open_checkpoints(folder, config).find("best").name
    end = _read_end(folder / "end.json")
    return details["data"], best, end.step, len(render(read_runs([folder])))


def read_prepared(folder: Path) -> Any:
    prepared = Prepared.open(folder)
    batches = TrainingBatches(prepared, BatchConfig(batch_size=8), max_length=5)
    items = [batch.items.tolist() for batch in batches]
    return items, prepared.item_ids().to_pylist(), prepared.item_counts().tolist()


def read_pointer(folder: Path) -> Any:
    return [one.export for one in read_published(folder / "published.json").publications]


def read_metrics(folder: Path) -> Any:
    return read_output(folder / "metrics.json", METRICS)["metrics"]


Reader = Callable[[Path], Any]


READERS: dict[str, Reader] = {
    "export": read_export,
    "pointer": read_pointer,
    "metrics": read_metrics,
    "checkpoint": read_checkpoint,
    "run": read_run_folder,
    "prepared": read_prepared,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder of each kind."""
    base = tmp_path_factory.mktemp("sound")
    own_export(base / "export")
    (base / "pointer").mkdir()
    words = ["publish", "--export", str(base / "export"), "--force", "--published"]
    assert cli.main([*words, str(base / "pointer/published.json")]) == 0
    metrics = {"request": {"source": {}}, "metrics": {"NDCG@10": 0.5}}
    head = {"format": METRICS.name, "schema_version": METRICS.version}
    (base / "metrics").mkdir()
    (base / "metrics/metrics.json").write_text(json.dumps(head | metrics))
    return {
        **{name: base / name for name in ("export", "pointer", "metrics")},
        "checkpoint": WRITTEN / "run/checkpoints/step-00000005",
        "run": WRITTEN / "run",
        "prepared": WRITTEN / "prepared",
    }


def seal(folder: Path) -> None:
    """Make a manifest fit the files, where it is still one."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else {}
        files = manifest["files"]
        pairs = files.items() if isinstance(files, dict) else ((e["path"], e) for e in files)
        for name, entry in pairs:
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            size = "size" if isinstance(files, dict) else "bytes"
            entry |= {size: len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return


def outcome(read: Reader, folder: Path) -> tuple[str, str]:
    """How a reader ends, in a process of its own: "data", "line" or anything else, and the text."""
    ends, begins = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(ends)
            with os.fdopen(begins, "wb") as answer:
                pickle.dump(_read_under_limits(read, folder), answer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(begins)
    with os.fdopen(ends, "rb") as answer:
        content = answer.read()
    _, status = os.waitpid(child, 0)
    if not content:
        return "killed", f"status {status}"
    kind, text = pickle.loads(content)
    return str(kind), str(text)


def _read_under_limits(read: Reader, folder: Path) -> tuple[str, str]:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_BYTES,) * 2)
    signal.alarm(MOST_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    forbidden: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & WRITES and str(arguments[0]) != os.devnull
        if event in RUNS_CODE or writes:
            forbidden.append(f"{event} {arguments[:2]}")

    sys.addaudithook(watch)
    try:
        kind, text = "data", repr(read(folder))
    except Exception as error:
        is_told = cli.is_for_the_user(error)
        kind = "line" if is_told else "traceback"
        text = cli.one_line(error) if is_told else traceback.format_exc()
    return ("forbidden", "; ".join(forbidden)) if forbidden else (kind, text)


def complaint(
    kind: str, text: str, before: str, names: list[str], *, may_differ: bool, may_lead_out: bool
) -> str | None:
    """What is wrong with an outcome; None if nothing is."""
    if SECRET in text and not may_lead_out:
        return "a file outside was read"
    if kind == "data":
        return None if text == before or may_differ else "other data, without a word"
    if kind == "line":
        return None if any(name in text for name in names) else "the line names no file"
    return kind


@pytest.mark.parametrize(
    "tries",
    [
        pytest.param(120, marks=pytest.mark.slow),
        pytest.param(5000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_a_spoiled_file_gives_right_data_or_one_line_that_names_it(
    tries: int, sound: dict[str, Path], tmp_path: Path
) -> None:
    # A process that has read no Parquet itself: its children inherit no threads of Arrow.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=exec, initargs=(FIND_TESTS,)) as pool:
        wrong = pool.submit(problems, sound, tries, tmp_path).result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]
    assert not wrong, f"{len(wrong)} of {tries}:\n" + "\n".join(one[-1500:] for one in wrong[:12])


def problems(sound: dict[str, Path], tries: int, folder: Path) -> list[str]:
    """What went wrong in ``tries`` tries and those in ``FOUND``, one text each."""
    outside = folder / "outside"
    outside.write_text(json.dumps({"format": SECRET, SECRET: SECRET}))
    before = {name: outcome(READERS[name], path) for name, path in sound.items()}
    assert {kind for kind, _ in before.values()} == {"data"}, before
    found = [
        _one_try(number, sound, folder / "spoiled", {k: v for k, (_, v) in before.items()})
        for number in sorted({*range(tries), *FOUND})
    ]
    return [problem for problem in found if problem is not None]


def _one_try(
    number: int, sound: dict[str, Path], spoiled: Path, before: dict[str, str]
) -> str | None:
    chance = random.Random(number)
    name = chance.choice(list(sound))
    shutil.copytree(sound[name], spoiled)
    files = sorted(p for p in spoiled.rglob("*") if p.is_file() and _is_read(name, p))
    file = chance.choice(files)
    how = spoil(file, spoiled.with_name("outside"), chance)
    is_sealed = chance.random() < 0.5
    if is_sealed:
        seal(spoiled)
    may_differ = is_sealed or name in UNSEALED or file.name == "manifest.json"
    kind, text = outcome(READERS[name], spoiled)
    # Another option may be right by itself, and what it leads to is what is named.
    names = [""] if file.name == "config.json" else [file.name, str(spoiled)]
    may = {"may_differ": may_differ, "may_lead_out": name in NAMED}
    problem = complaint(kind, text, before[name], names, **may)
    shutil.rmtree(spoiled)
    if problem is None:
        return None
    return f"{number}: {name}, {file.name}, {how}, sealed {is_sealed}: {problem}\n{text}"


def _is_read(name: str, path: Path) -> bool:
    """Whether a reader above needs a file."""
    if name == "run":
        return path.name in ("config.json", "run.json", "end.json", "metrics.jsonl")
    return path.name not in ("validation.parquet", "test.parquet")
