"""A stage's output: found when complete for the same request, refused when it is something else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from shardrec.pipeline.outputs.files import describe_file
from shardrec.pipeline.outputs.formats import METRICS, RECOMMENDATIONS
from shardrec.pipeline.outputs.stage_output import StageOutput, read_output


def lists(path: Path, **options: Any) -> StageOutput:
    settings: dict[str, Any] = {"request": {"k": 5, "split": "test"}} | options
    return StageOutput(path=path, format=RECOMMENDATIONS, **settings)


def written(path: Path, text: str = "part", **options: Any) -> dict[str, Any]:
    output = lists(path, **options)
    with output.write() as (folder, work):
        (work / "temporary").touch()
        (folder / "part").write_text(text)
        files = [describe_file(folder, "part", rows=1)]
        return output.finish(lambda: {"counts": {"users": 1}}, folder, files)


def test_a_complete_folder_is_found_by_the_same_request(tmp_path: Path) -> None:
    assert lists(tmp_path / "out").find() is None
    manifest = written(tmp_path / "out")
    assert lists(tmp_path / "out").find() == manifest
    assert read_output(tmp_path / "out", RECOMMENDATIONS) == manifest
    assert manifest["counts"] == {"users": 1} and manifest["files"][0]["bytes"] == 4
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["_manifest.json", "out", "part"]


def test_another_request_is_refused_by_name_and_replaced_by_force(tmp_path: Path) -> None:
    written(tmp_path / "out")
    other = {"request": {"k": 6, "split": "test"}}
    with pytest.raises(FileExistsError, match=r"which differs in k; choose another folder or"):
        lists(tmp_path / "out", **other).find()
    assert lists(tmp_path / "out", **other, force=True).find() is None
    written(tmp_path / "out", "new", **other, force=True)
    assert (tmp_path / "out" / "part").read_text() == "new"


def test_a_block_that_fails_leaves_the_former_output(tmp_path: Path) -> None:
    manifest = written(tmp_path / "out")
    with pytest.raises(RuntimeError), lists(tmp_path / "out", force=True).write() as (folder, _):
        (folder / "half").touch()
        raise RuntimeError
    assert lists(tmp_path / "out").find() == manifest


@pytest.mark.parametrize("name", ["a file is gone", "a file is shorter", "the version", "files"])
def test_a_damaged_folder_is_named_and_replaced_by_force(tmp_path: Path, name: str) -> None:
    manifest = written(tmp_path / "out")
    if name == "a file is gone":
        (tmp_path / "out" / "part").unlink()
    elif name == "a file is shorter":
        (tmp_path / "out" / "part").write_text("p")
    else:
        changed = {"schema_version": 2} if name == "the version" else {"files": 1}
        (tmp_path / "out" / "_manifest.json").write_text(json.dumps(manifest | changed))
    with pytest.raises(FileExistsError, match="a complete result, got .* replace it with --force"):
        lists(tmp_path / "out").find()
    assert lists(tmp_path / "out", force=True).find() is None


def test_other_files_are_refused_also_by_force(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for name, what in (("file", "is another file"), ("folder", "holds other files")):
        with pytest.raises(FileExistsError, match=f"which {what}; choose another folder or delete"):
            lists(tmp_path / name, force=True).find()
    (tmp_path / "folder" / "mine").unlink()
    assert lists(tmp_path / "folder").find() is None, "an empty folder may be filled"


def test_a_report_is_one_file(tmp_path: Path) -> None:
    report = StageOutput(
        path=tmp_path / "deep" / "m.json", format=METRICS, request={"split": "test"}
    )
    assert report.find() is None
    with pytest.raises(FileNotFoundError, match="run `shardrec evaluate` first"):
        read_output(report.path, METRICS)
    stored = report.finish(lambda: {"metrics": {"NDCG@10": 0.5}})
    assert report.find() == stored == json.loads(report.path.read_text())
    other = dataclasses.replace(report, request={"split": "validation"})
    with pytest.raises(FileExistsError, match="output must be a new file .* differs in split"):
        other.find()
    report.path.write_text(json.dumps(stored | {"schema_version": 2}))
    with pytest.raises(
        ValueError, match="must be a report of format 'shardrec.metrics', version 1"
    ):
        read_output(report.path, METRICS)
    with pytest.raises(ValueError, match="Out of range float"):
        report.finish(lambda: {"metrics": {"NDCG@10": float("nan")}})
