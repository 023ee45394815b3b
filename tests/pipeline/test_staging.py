"""Output folders on disks that are full, read-only or in use: whole or not there, the old one kept.

The disks are small tmpfs mounts, so most of these tests need root and are skipped without.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pipeline.disks import mount, small_disk
from tests.pipeline.event_logs import write_random_log

from shardrec.launch import cli
from shardrec.pipeline.outputs import staging
from shardrec.pipeline.outputs.formats import METRICS
from shardrec.pipeline.outputs.json_files import write_atomically
from shardrec.pipeline.outputs.lock import LOCK, RunLock
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.outputs.staging import (
    locked,
    partial_of,
    settle,
    staged_file,
    staged_folder,
)
from shardrec.pipeline.prepare import PrepareConfig, prepare, prepare_once
from shardrec.pipeline.prepared.manifest import read_manifest

DISK_BYTES = 24 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 24 MiB."""
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


def leave_free(disk: Path, num_bytes: int) -> None:
    """Fill the disk with one file, but for so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    status = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - num_bytes)


def origin(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else origin(error.__cause__)


@pytest.mark.slow
def test_a_full_disk_stops_prepare_cleanly_wherever_it_strikes(disk: Path, tmp_path: Path) -> None:
    output = str(disk / "out")
    old = prepare(
        PrepareConfig(events=write_random_log(tmp_path / "old.parquet", 500), output=output)
    )
    log = write_random_log(tmp_path / "log.parquet", 200_000)
    config = PrepareConfig(events=log, output=output, force=True, threads=1)
    struck = []
    for free in range(1 << 17, DISK_BYTES, 3 << 19):
        leave_free(disk, free)
        try:
            prepare(config)
            break
        except OSError as error:
            struck.append(type(origin(error)).__module__)
            assert "must have room for" in str(error), error
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "out"]
        assert read_manifest(disk / "out", verify_checksums=True) == old
    assert {"_duckdb", "builtins"} <= set(struck), struck  # while sorting, and while writing
    new = read_manifest(disk / "out", verify_checksums=True)
    assert new.counts["events_read"] == 200_000
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "out"]


def test_a_disk_that_cannot_be_written_is_said_and_kept(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, output = write_random_log(tmp_path / "log.parquet", 500), str(disk / "out")
    old = prepare(PrepareConfig(events=log, output=output))
    mount(disk, "-o", "remount,ro")
    assert not prepare_once(PrepareConfig(events=log, output=output)).is_new
    for words in (["--output", output, "--force"], ["--output", str(disk / "new")]):
        assert cli.main(["prepare", "--events", log, *words]) == 2
        said = capsys.readouterr().err
        assert "output must be in a folder that can be written" in said
        assert "Read-only file system" in said
    assert read_manifest(disk / "out", verify_checksums=True) == old
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_report_that_cannot_be_written_is_said_before_the_work(disk: Path) -> None:
    mount(disk, "-o", "remount,ro")
    report = StageOutput(path=disk / "deep" / "metrics.json", format=METRICS, request={})
    with pytest.raises(PermissionError, match="output must be in a folder that can be written"):
        report.find()


def test_a_mount_point_is_refused_before_the_work(disk: Path, tmp_path: Path) -> None:
    log = write_random_log(tmp_path / "log.parquet", 500)
    with pytest.raises(ValueError, match="output must be a folder below a mount point"):
        prepare(PrepareConfig(events=log, output=str(disk)))


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_a_folder_is_replaced_only_when_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_rename_exchange", lambda *_: errno.EINVAL)
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(RuntimeError), staged_folder(output, replace=True) as (result, _):
        (result / "half").touch()
        raise RuntimeError
    assert [path.name for path in output.iterdir()] == ["old"]
    with staged_folder(output, replace=True) as (result, _):
        (result / "new").touch()
        assert [path.name for path in output.iterdir()] == ["old"]
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def kill_between_renames(output: Path, new: Path, answer: int) -> None:
    """Replace ``output`` in a process that is killed when it has made room for the new folder."""
    child = os.fork()
    if child == 0:  # pragma: no cover
        rename = Path.rename

        def rename_once(path: Path, target: Path) -> Path:
            if target == output:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = rename_once  # type: ignore[method-assign,assignment]
        staging._rename_exchange = lambda *_: answer
        with staged_folder(output, replace=True) as (result, _):
            shutil.copytree(new, result, dirs_exist_ok=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EINVAL], ids=["ENOSYS", "EINVAL"])
def test_a_kill_between_two_renames_loses_neither_the_old_nor_the_new(
    tmp_path: Path, answer: int
) -> None:
    output, log = tmp_path / "out", write_random_log(tmp_path / "log.parquet", 500)
    prepare(PrepareConfig(events=log, output=str(output)))
    config = PrepareConfig(events=log, output=str(tmp_path / "new"), seed=7)
    new = prepare(config)
    kill_between_renames(output, tmp_path / "new", answer)
    assert not output.exists()
    shutil.copytree(partial_of(output), tmp_path / "left")
    assert read_manifest(output, verify_checksums=True) == new  # a reader finds it
    assert not partial_of(output).exists()
    shutil.rmtree(output)
    shutil.copytree(tmp_path / "left", partial_of(output))  # the next start finds it, too
    again = PrepareConfig(events=log, output=str(output), seed=7)
    assert not prepare_once(again).is_new
    assert read_manifest(output, verify_checksums=True) == new


def test_what_a_killed_process_left_aside_is_left_to_the_one_that_works_on_it(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    with locked(partial_of(output)):
        (partial_of(output) / "former").mkdir()
        settle(output)
        assert not output.exists()
    settle(output)
    assert output.is_dir() and not partial_of(output).exists()


def test_a_folder_that_fills_meanwhile_is_not_overwritten_and_the_result_is_kept(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    message = f"rename {partial_of(output) / 'result'} yourself"
    with pytest.raises(OSError, match=message), staged_folder(output) as (result, _):
        (result / "ours").touch()
        output.mkdir()
        (output / "theirs").touch()
    assert [path.name for path in output.iterdir()] == ["theirs"]
    assert [path.name for path in (partial_of(output) / "result").iterdir()] == ["ours"]
    (output / "theirs").unlink()
    with staged_folder(output) as (result, _):
        (result / "later").touch()
    assert [path.name for path in output.iterdir()] == ["later"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_staging_folder_that_is_deleted_meanwhile_is_said(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(OSError, match="was deleted meanwhile: run it again"):
        with staged_folder(output):
            shutil.rmtree(partial_of(output))


@pytest.mark.parametrize("force", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize("target", ["there", "not/yet/there"])
def test_an_output_that_is_a_link_stays_one(tmp_path: Path, force: bool, target: str) -> None:
    log, scratch = write_random_log(tmp_path / "log.parquet", 500), tmp_path / "scratch"
    (scratch / "there").mkdir(parents=True)
    output = tmp_path / "out"
    output.symlink_to(scratch / target)
    config = PrepareConfig(events=log, output=str(output), force=force)
    made = prepare(config)
    if force:
        made = prepare(dataclasses.replace(config, seed=7))
    assert output.is_symlink() and read_manifest(output, verify_checksums=True) == made
    assert read_manifest(scratch / target) == made
    again = dataclasses.replace(config, seed=7 * force, force=False)
    assert not prepare_once(again).is_new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out", "scratch"]
    assert [path.name for path in (scratch / target).parent.iterdir()] == [Path(target).name]


def test_a_file_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("real.json")
    for text in ("{}", '{"new": 1}'):
        write_atomically(tmp_path / "link.json", text)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "real.json").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_a_link_to_itself_is_refused_before_the_work(tmp_path: Path) -> None:
    log = write_random_log(tmp_path / "log.parquet", 500)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="must be a path that leads somewhere, got .*loop'"):
        prepare(PrepareConfig(events=log, output=str(tmp_path / "loop")))


def test_a_folder_that_is_mounted_elsewhere_is_refused_before_the_work(tmp_path: Path) -> None:
    log, output = write_random_log(tmp_path / "log.parquet", 500), tmp_path / "o ut"
    for name in ("from", "o ut"):
        (tmp_path / name).mkdir()
    mount(output, "--bind", str(tmp_path / "from"))
    try:
        assert not os.path.ismount(output)
        with pytest.raises(ValueError, match="output must be a folder below a mount point"):
            prepare(PrepareConfig(events=log, output=str(output)))
    finally:
        subprocess.run(["umount", str(output)], check=True)


@contextlib.contextmanager
def overlay(lower: Path, folder: Path) -> Iterator[Path]:
    """The folder ``lower`` as a container sees what came with its image."""
    with small_disk(folder, DISK_BYTES) as disk:
        for name in ("upper", "work", "merged"):
            (disk / name).mkdir()
        layers = f"lowerdir={lower},upperdir={disk}/upper,workdir={disk}/work,redirect_dir=off"
        mount(disk / "merged", "-t", "overlay", "overlay", "-o", layers)
        try:
            yield disk / "merged"
        finally:
            subprocess.run(["umount", str(disk / "merged")], check=True)


def test_a_folder_that_came_with_a_container_s_image_is_replaced(tmp_path: Path) -> None:
    log = write_random_log(tmp_path / "log.parquet", 500)
    old = prepare(PrepareConfig(events=log, output=str(tmp_path / "image" / "out")))
    (tmp_path / "image" / "empty").mkdir()
    with overlay(tmp_path / "image", tmp_path / "disk") as folder:
        with pytest.raises(OSError, match="cross-device"):
            (folder / "out").rename(folder / "elsewhere")
        for name in ("out", "empty"):
            output = folder / name
            new = prepare(PrepareConfig(events=log, output=str(output), force=True, seed=7))
            assert read_manifest(output, verify_checksums=True) == new != old
        assert sorted(path.name for path in folder.iterdir()) == ["empty", "out"]


def test_a_kill_while_the_old_folder_is_deleted_loses_nothing_new(tmp_path: Path) -> None:
    log = write_random_log(tmp_path / "log.parquet", 500)
    new = prepare(PrepareConfig(events=log, output=str(tmp_path / "out"), seed=7))
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (tmp_path / "out").rename(partial / "result")
    (partial / "former").mkdir()
    (tmp_path / "out").mkdir()  # half of the old one
    (tmp_path / "out" / "items.parquet").touch()
    assert not prepare_once(PrepareConfig(events=log, output=str(tmp_path / "out"), seed=7)).is_new
    assert read_manifest(tmp_path / "out", verify_checksums=True) == new
    assert not partial.exists()


def test_links_in_the_place_of_locks_and_temporary_files_are_not_written_through(
    tmp_path: Path,
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="lock"), locked(partial):
        raise AssertionError
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(victim)
    with pytest.raises(OSError, match=LOCK):
        RunLock(tmp_path / "run").acquire()
    (tmp_path / ".report.json.partial").symlink_to(victim)
    with staged_file(tmp_path / "report.json") as written:
        written.write_text("report")
    aside = partial_of(tmp_path / "other")
    aside.symlink_to(tmp_path / "run")
    with pytest.raises(FileExistsError, match="a staging folder of its own"), locked(aside):
        raise AssertionError
    assert victim.read_text() == "precious" and not (tmp_path / "report.json").is_symlink()
