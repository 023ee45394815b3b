"""What a path means: a file of that very name, a folder, a glob; and what is no path."""

import os
from pathlib import Path

import pytest

from shardrec.pipeline.prepared.data_files import find_files

FILES = ["plain.parquet", "a[1].parquet", "a1.parquet", "what?.parquet", "whatx.parquet"]
FILES += ["day[2]/x.parquet", "day[2]/y.parquet", "day2/z.parquet", "deep/one/two.parquet"]
FILES += ["*.parquet", "_hidden.parquet", "deep/.old/three.parquet", "deep/notes.txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "plain.parquet": ["plain.parquet"],
        "a[1].parquet": ["a[1].parquet"],
        "a[12].parquet": ["a1.parquet"],
        "what?.parquet": ["what?.parquet"],
        "wha*.parquet": ["what?.parquet", "whatx.parquet"],
        "*.parquet": ["*.parquet"],
        "day[2]": ["day[2]/x.parquet", "day[2]/y.parquet"],
        "day[2]/": ["day[2]/x.parquet", "day[2]/y.parquet"],
        "day[2]/?.parquet": ["day[2]/x.parquet", "day[2]/y.parquet"],
        "day[0-9]/?.parquet": ["day2/z.parquet"],
        "deep": ["deep/one/two.parquet"],
        "**/two.parquet": ["deep/one/two.parquet"],
    }.items(),
)
def test_what_is_there_under_its_name_is_no_glob(
    folder: Path, source: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_files(f"{folder}/{source}").paths == [f"{folder}/{name}" for name in expected]
    monkeypatch.chdir(folder)
    assert [os.path.normpath(path) for path in find_files(source).paths] == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "got ''; the current folder is '.'"),
        ("log\0.parquet", "without NUL"),
        ("log\udcff.parquet", "in UTF-8, got 'log.udcff.parquet'; rename"),
    ],
    ids=["empty", "nul", "not-utf8"],
)
def test_what_is_no_path_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"histories must be a path.*{message}"):
        find_files(source, "histories")


def test_a_file_whose_name_is_not_utf8_is_named_only_where_it_is_meant(folder: Path) -> None:
    os.rename(os.fsencode(folder / "day2" / "z.parquet"), os.fsencode(folder) + b"/day2/\xff.txt")
    assert find_files(str(folder / "d*" / "*.parquet")).paths == [
        f"{folder}/day[2]/x.parquet",
        f"{folder}/day[2]/y.parquet",
    ]
    Path(os.fsdecode(os.fsencode(folder) + b"/day2/\xe9t\xe9.parquet")).touch()
    with pytest.raises(ValueError, match=r"in UTF-8, got '.*/.udce9t.udce9.parquet'; rename"):
        find_files(str(folder / "day2"))
