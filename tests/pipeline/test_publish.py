"""Publish and rollback: the pointer moves in one step, writers lose nothing, exports are whole."""

import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardrec.launch.cli import main
from shardrec.pipeline.outputs.files import sha256
from shardrec.pipeline.publish import (
    PublishConfig,
    Refused,
    RollbackConfig,
    Served,
    publish,
    rollback,
)
from shardrec.pipeline.served.pointer import export_folder, read_published


def write_export(folder: Path, weights: str) -> str:
    """The parts of an export that publish reads: its manifest, and one file that it lists."""
    folder.mkdir(parents=True)
    (folder / "encoder.pt2").write_text(weights)
    encoder = {"path": "encoder.pt2", "sha256": sha256(folder / "encoder.pt2")}
    manifest = {
        "format": "shardrec.export",
        "schema_version": 1,
        "request": {"source": source_of(weights)},
        "catalog_version": "c" * 16,
        "scores": "inner product",
        **{"num_items": 3, "width": 4, "max_length": 5},
        "files": [encoder | {"bytes": len(weights)}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def source_of(weights: str) -> dict[str, str]:
    return {"run": "r", "checkpoint": "step-1", "weights": weights, "data": "d"}


def write_gate(path: Path, weights: str, *, passed: bool = True, number: int | None = None) -> str:
    report = {
        "format": "shardrec.gate",
        "schema_version": 1,
        "request": {},
        "passed": passed,
        "reason": "NDCG@10 0.1000 is below 0.2000",
        "evaluation": {"source": source_of(weights), "protocol": {}, "metrics": {"NDCG@10": 0.1}},
        "published": {"number": number},
    }
    path.write_text(json.dumps(report))
    return str(path)


@pytest.fixture
def pointer(tmp_path: Path) -> Path:
    """A pointer at the second of two exports, each next to the report of its gate."""
    path = tmp_path / "live" / "published.json"
    for name, before in (("monday", None), ("tuesday", 1)):
        export = write_export(tmp_path / "live" / name, name)
        gate = write_gate(tmp_path / "live" / f"{name}.json", name, number=before)
        assert publish(PublishConfig(export=export, published=str(path), gate=gate)).is_new
    return path


def unasked(export: str, pointer: Path | str, **options: Any) -> PublishConfig:
    """Published by force, without a gate."""
    return PublishConfig(export=export, published=str(pointer), force=True, **options)


def tuesday_again(pointer: Path, *, force: bool = False) -> PublishConfig:
    export, gate = pointer.parent / "tuesday", pointer.parent / "tuesday.json"
    return PublishConfig(export=str(export), published=str(pointer), gate=str(gate), force=force)


def back(pointer: Path, to: int | None = None) -> Served:
    return rollback(RollbackConfig(published=str(pointer), to=to))


def test_rollback_restores_the_export_before(pointer: Path) -> None:
    assert export_folder(pointer) == pointer.parent / "tuesday"
    assert back(pointer).publication.number == 1
    assert export_folder(pointer) == pointer.parent / "monday"
    assert [swap["action"] for swap in read_published(pointer).swaps] == [
        "publish",
        "publish",
        "rollback",
    ]
    with pytest.raises(ValueError, match="a publication before number 1, got none"):
        back(pointer)


def test_publish_and_rollback_are_idempotent(pointer: Path) -> None:
    before = pointer.read_bytes()
    again = publish(tuesday_again(pointer))
    assert not again.is_new and again.publication.number == 2
    assert not back(pointer, to=2).is_new
    assert pointer.read_bytes() == before


def test_publish_refuses_a_rolled_back_export_unless_forced(pointer: Path) -> None:
    back(pointer)
    with pytest.raises(Refused, match="a rollback moved away from, got number 2"):
        publish(tuesday_again(pointer))
    assert publish(tuesday_again(pointer, force=True)).publication.number == 3
    assert back(pointer).publication.number == 1


def test_folders_below_the_pointer_may_move_with_it(pointer: Path, tmp_path: Path) -> None:
    pointer.parent.rename(tmp_path / "moved")
    assert export_folder(tmp_path / "moved" / "published.json") == tmp_path / "moved" / "tuesday"
    elsewhere = write_export(tmp_path / "elsewhere", "wednesday")
    config = unasked(elsewhere, tmp_path / "moved" / "published.json")
    assert publish(config).publication.export == elsewhere


def test_a_changed_or_missing_export_is_not_served(pointer: Path) -> None:
    manifest = pointer.parent / "monday" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(ValueError, match="must be as it was published"):
        back(pointer)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="publication 1 must still have its export"):
        back(pointer)
    (pointer.parent / "tuesday" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="must be as it was published"):
        export_folder(pointer)
    assert read_published(pointer).number == 2


def test_publish_refuses_an_altered_file(pointer: Path, tmp_path: Path) -> None:
    export = write_export(tmp_path / "broken", "wednesday")
    (tmp_path / "broken" / "encoder.pt2").write_text("altered")
    with pytest.raises(ValueError, match="the SHA-256 of"):
        publish(unasked(export, pointer))
    assert read_published(pointer).number == 2


def test_publish_needs_a_gate_unless_forced(
    pointer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write_export(tmp_path / "new", "wednesday")
    before = pointer.read_bytes()
    with pytest.raises(ValueError, match="gate must be the report of a gate .* got none; run"):
        PublishConfig(export=export, published=str(pointer))
    words = ["publish", "--export", export, "--published", str(pointer)]
    for command in (words, ["launch", "publish", "--", *words[1:]]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "give its report with --gate, or publish without it by --force" in said
        assert said.count("\n") == 1
    refusing = write_gate(tmp_path / "g", "wednesday", passed=False, number=2)
    assert main([*words, "--gate", refusing, "--force"]) == 3
    assert pointer.read_bytes() == before
    assert main([*words, "--force"]) == 0
    served = read_published(pointer).current
    assert served is not None and (served.number, served.evaluation) == (3, None)


def test_the_gate_must_be_passed_by_these_weights_against_the_current_publication(
    pointer: Path, tmp_path: Path
) -> None:
    export = write_export(tmp_path / "new", "wednesday")

    def published_with(gate: str) -> Served:
        return publish(PublishConfig(export=export, published=str(pointer), gate=gate))

    with pytest.raises(Refused, match=r"passed its gate, got: NDCG@10 0.1000 is below"):
        published_with(write_gate(tmp_path / "g", "wednesday", passed=False, number=2))
    with pytest.raises(ValueError, match="gate must be about the weights of the export"):
        published_with(write_gate(tmp_path / "g", "other", number=2))
    with pytest.raises(Refused, match="compared with what is published, number 2, got"):
        published_with(write_gate(tmp_path / "g", "wednesday", number=1))
    assert read_published(pointer).number == 2
    done = published_with(write_gate(tmp_path / "g", "wednesday", number=2))
    assert done.publication.number == 3
    assert done.publication.evaluation is not None
    assert done.publication.evaluation["metrics"] == {"NDCG@10": 0.1}
    assert not published_with(str(tmp_path / "g")).is_new


def test_publish_refuses_lists_of_other_weights(pointer: Path, tmp_path: Path) -> None:
    export = write_export(tmp_path / "new", "wednesday")
    lists = tmp_path / "lists"
    lists.mkdir()
    config = unasked(export, pointer, lists=str(lists))
    with pytest.raises(FileNotFoundError, match="lists must hold _manifest.json"):
        publish(config)
    for weights, message in [("other", "lists must come from the weights"), ("wednesday", "")]:
        written = {"request": {"source": source_of(weights)}, "files": []}
        head = {"format": "shardrec.recommendations", "schema_version": 1}
        (lists / "manifest.json").write_text(json.dumps(head | written))
        if message:
            with pytest.raises(ValueError, match=message):
                publish(config)
    assert publish(config).publication.lists == str(lists)


def test_a_file_that_is_not_a_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="must be a pointer of format 'shardrec.published'"):
        export_folder(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError, match="published must be a pointer"):
        back(tmp_path / "none.json")


def publish_some(pointer: str, folder: str, process: int) -> None:
    for number in range(8):
        export = write_export(Path(folder) / f"{process}-{number}", f"{process}-{number}")
        publish(unasked(export, pointer))


def test_concurrent_writers_lose_nothing_and_readers_see_whole_files(tmp_path: Path) -> None:
    pointer, done = tmp_path / "published.json", threading.Event()
    export = write_export(tmp_path / "first", "first")
    publish(unasked(export, pointer))

    def read() -> list[int]:
        seen = []
        while not done.is_set():
            seen.append(read_published(pointer).number or 0)
            export_folder(pointer)
        return seen

    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=publish_some, args=(str(pointer), str(tmp_path), process))
        for process in range(2)
    ]
    for writer in writers:
        writer.start()
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        for writer in writers:
            writer.join()
        done.set()
    seen = reader.result()
    assert [writer.exitcode for writer in writers] == [0, 0]
    published = read_published(pointer)
    assert [publication.number for publication in published.publications] == list(range(1, 18))
    assert published.number == 17 and seen == sorted(seen) and seen[0] > 0


def test_commands_report_the_publication_and_exit_with_3_when_refused(
    pointer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live: dict[str, Any] = {"published": str(pointer), "export": str(pointer.parent / "tuesday")}
    words = ["--published", live["published"], "--export", live["export"]]
    words += ["--gate", str(pointer.parent / "tuesday.json")]
    assert main(["publish", *words]) == 0
    assert "number 2 already: nothing to do" in capsys.readouterr().out
    assert main(["rollback", "--published", live["published"]]) == 0
    assert "names monday, number 1" in capsys.readouterr().out
    assert main(["publish", *words]) == 3
    said = capsys.readouterr().err
    assert said.startswith("shardrec publish: the export must not be one") and "\n" not in said[:-1]
    assert main(["rollback", "--published", live["published"], "--to", "9"]) == 2
    assert "must be that of a publication (1, 2), got 9" in capsys.readouterr().err
