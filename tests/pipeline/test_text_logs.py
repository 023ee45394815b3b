"""CSV and JSON lines as logs, and a shop's first ten minutes with its own export."""

import bz2
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.logs_as_written import columns, expected, prepared, read, sequences, write

from shardrec.launch.cli import main
from shardrec.pipeline.log import text_files
from shardrec.pipeline.serve import Recommender

Row = tuple[Any, ...]
NAMES = ("user_id", "item_id", "timestamp")


def rows() -> Iterator[Row]:
    return zip(*(columns()[name].tolist() for name in NAMES), strict=True)


def as_csv(
    change: Callable[[Row], Row] = lambda row: row, sep: str = ",", names: Row = NAMES
) -> str:
    lines = (sep.join(map(str, change(row))) for row in rows())
    return "\n".join([sep.join(names), *lines, ""])


def as_json(change: Callable[[Row], Row] = lambda row: row) -> str:
    dicts = (dict(zip(NAMES, change(row), strict=True)) for row in rows())
    return "".join(f"{json.dumps(one)}\n" for one in dicts)


def packed(name: str, data: bytes) -> bytes:
    """The bytes by the last suffix of a name."""
    if name.lower().endswith((".zst", ".lz4")):
        codec = "zstd" if "zst" in name else "lz4"
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]
    return (
        gzip.compress(data[:700]) + gzip.compress(data[700:])
        if name.lower().endswith(".gz")
        else bz2.compress(data)
    )


SPELLINGS: dict[str, bytes] = {
    "plain.csv": as_csv().encode(),
    "UPPER.CSV": as_csv().encode(),
    "semicolons.csv": as_csv(sep=";").encode(),
    "tabs.tsv": as_csv(sep="\t").encode(),
    "bars.csv": as_csv(sep="|").encode(),
    "mark.csv": b"\xef\xbb\xbf" + as_csv(sep=";").encode(),
    "utf16.csv": as_csv(sep="\t").encode("utf-16"),
    "windows.csv": as_csv().replace("\n", "\r\n").encode(),
    "no-last-newline.csv": as_csv().rstrip().encode(),
    "empty-lines.csv": as_csv().replace("\n", "\n\n").encode(),
    "quoted.csv": as_csv(lambda row: tuple(f'"{value}"' for value in row)).encode(),
    "blanks.csv": as_csv(lambda row: tuple(f" {value} " for value in row)).encode(),
    "floats.csv": as_csv(lambda row: (f"{row[0]}.0", *row[1:])).encode(),
    "decimals.csv": as_csv(lambda row: (f"{row[0]}.00", *row[1:])).encode(),
    "misnamed.csv.gz": as_csv().encode(),
    "lines.jsonl": as_json().encode(),
    "LINES.NDJSON": as_json().encode(),
    "lines.json": as_json(lambda row: (float(row[0]), *row[1:])).encode(),
    **{
        f"packed.csv{suffix}": packed(suffix, as_csv().encode())
        for suffix in (".gz", ".GZ", ".bz2", ".zst", ".lz4")
    },
    "packed.jsonl.gz": packed(".gz", as_json().encode()),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_log_as_text_gives_the_same_sequences(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SPELLINGS[name])
    assert read(tmp_path / name, tmp_path / "out") == expected()


def test_text_and_parquet_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(as_csv())
    plain = prepared(write(tmp_path / "a.parquet"), tmp_path / "a")
    assert prepared(tmp_path / "a.csv", tmp_path / "b").fingerprint == plain.fingerprint


def test_ids_with_zeros_commas_lines_and_quotes_are_text_as_it_stands(tmp_path: Path) -> None:
    zeros = as_csv(lambda row: (f"{row[0]:02d}", *row[1:]))
    (tmp_path / "zeros.csv").write_text(zeros)
    found = read(tmp_path / "zeros.csv", tmp_path / "zeros")
    assert found == {f"{user:02d}": items for user, items in expected().items()}
    names = ["1.000", "007", "a,b", "one\ntwo", 'say "hi"', "ü", "1e5", "12345678901234567890"]
    quoted = [f'"{name.replace(chr(34), chr(34) * 2)}"' for name in names]
    text = as_csv(lambda row: (row[0], quoted[row[1] % 8], row[2]))
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    found = read(tmp_path / "a.csv", tmp_path / "out")
    assert found == {user: [names[i % 8] for i in items] for user, items in expected().items()}


def test_quotes_are_checked_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ['a,""b"",""""c', "7", 'x""', "one\ntwo,", '5" tv']
    quoted = [*(f'"{name}"' for name in names[:4]), names[4]]
    text = as_csv(lambda row: (row[0], quoted[row[1] % 5], row[2])).encode("utf-8-sig")
    broken = text.replace(b'"7"', b'"7"7', 1)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 64)
    for size in (3, 7, 64):
        assert has_closed_quotes(text, size) and not has_closed_quotes(broken, size)
    monkeypatch.undo()
    (tmp_path / "a.csv").write_bytes(text)
    found = read(tmp_path / "a.csv", tmp_path / "out")
    meant = [name.replace('""', '"') for name in names]
    assert found == {user: [meant[i % 5] for i in items] for user, items in expected().items()}


def has_closed_quotes(text: bytes, size: int) -> bool:
    stream = io.BytesIO(text)
    pieces = SimpleNamespace(read=lambda _: stream.read(size))
    return text_files._has_closed_quotes(pieces, ",", "utf8")


def test_a_folder_of_csv_has_one_type_for_all_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    lines = as_csv().splitlines(keepends=True)
    for part, name in enumerate(("h=2.csv", "h=10.csv.gz")):
        text = "".join([lines[0], *lines[1 + part * 90 : 91 + part * 90]]).encode()
        data = packed(name, text) if name.endswith("gz") else text
        (log / name).write_bytes(data)
    (log / "h=11.csv").write_text(lines[0])
    (log / "h=12.csv").touch()
    manifest = prepared(log, tmp_path / "out")
    assert sequences(tmp_path / "out") == expected()
    assert [file["rows"] for file in manifest.source["files"]] == [90, 90, 0]
    assert manifest.counts["files_passed_over"] == 1
    (log / "h=11.csv").write_text(f"{lines[0]}A7,1,1\n")
    assert set(read(log, tmp_path / "two")) == {str(user) for user in range(30)}


def test_types_are_of_the_whole_file_not_of_its_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 256)
    (tmp_path / "a.csv").write_text(as_csv(lambda row: (row[0] or "A", *row[1:])))
    found = read(tmp_path / "a.csv", tmp_path / "out")
    assert found == {str(user) if user else "A": items for user, items in expected().items()}
    late = as_json(lambda row: (row[0] if row[0] < 29 else "A", *row[1:]))
    (tmp_path / "a.jsonl").write_text(late)
    with pytest.raises(ValueError, match="a.jsonl' must be .* got JSON parse error: Column"):
        prepared(tmp_path / "a.jsonl", tmp_path / "two")


def cut(row: Row) -> Row:
    return row[:2] if row[0] == 7 else row


BROKEN: dict[str, tuple[bytes, str]] = {
    "short-row.csv": (as_csv(cut).encode(), "Expected 3 columns, got 2"),
    "null.csv": (
        as_csv(lambda row: (row[0] or "", *row[1:])).encode(),
        "'user_id' must have no nulls, got 6",
    ),
    "null-word.csv": (
        as_csv(lambda row: (row[0] or "NULL", *row[1:])).encode(),
        "'user_id' must have no nulls, got 6",
    ),
    "negative.csv": (
        as_csv(lambda row: (row[0] - 1, *row[1:])).encode(),
        "'user_id' must hold ids of 0 or more, got -1",
    ),
    "latin1.csv": (
        as_csv(lambda row: (f"é{row[0]}", *row[1:])).encode("latin-1"),
        "in UTF-8, got .*invalid UTF8",
    ),
    "twice.csv": (as_csv(names=("user_id", "user_id", "timestamp")).encode(), "column 'user_id'"),
    "escaped.csv": (
        as_csv(lambda row: (f'"say \\"{row[0]}\\""', *row[1:])).encode(),
        "must double quotes inside of quoted values",
    ),
    "escaped-end.csv": (
        as_csv(lambda row: (f'"{row[0]}\\""', *row[1:])).encode("utf-16"),
        "must double quotes inside of quoted values",
    ),
    "never-closed.csv": (
        as_csv(lambda row: ('"' * (row[0] < 2) + str(row[0]), *row[1:])).encode(),
        "must double quotes inside of quoted values",
    ),
    "times.csv": (as_csv(lambda row: (*row[:2], "soon")).encode(), "'timestamp' must hold times"),
    "truncated.csv.gz": (packed(".gz", as_csv().encode())[:-30], "Truncated compressed stream"),
    "no-header.csv": (as_csv().partition("\n")[2].encode(), "--user-column must be a known name"),
    "array.json": (
        json.dumps([dict(zip(NAMES, row, strict=True)) for row in rows()]).encode(),
        "changed from object to array",
    ),  # fmt: skip
    "missing-key.jsonl": (
        as_json().replace('"item_id": 0, ', "", 1).encode(),
        "'item_id' must have no nulls, got 1",
    ),
    "prose.txt": (b"nothing to see", "must be Parquet, or CSV or JSON lines whose name ends in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_text_that_cannot_be_read_exactly_is_refused(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / name, tmp_path / "out")


def test_weights_and_event_types_are_read_from_text(tmp_path: Path) -> None:
    text = as_csv(lambda row: (*row, "01", row[1] / 8), names=(*NAMES, "kind", "value"))
    (tmp_path / "a.csv").write_text(text)
    options: dict[str, Any] = {"event_column": "kind", "event_types": ("01",)}
    prepared(tmp_path / "a.csv", tmp_path / "out", weight_column="value", **options)
    for row in pq.read_table(tmp_path / "out" / "train").to_pylist():
        items = expected()[row["user_id"]][:5]
        assert row["weights"] == [item / 8 for item in items]
    (tmp_path / "a.csv").write_text(text.replace(".", ",").replace(",", ";", 4))
    with pytest.raises(ValueError, match="must be complete CSV"):
        prepared(tmp_path / "a.csv", tmp_path / "two", weight_column="value", **options)


def test_lists_are_read_from_json(tmp_path: Path) -> None:
    lines = [json.dumps({"user_id": user, "item_id": items}) for user, items in expected().items()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"layout": "sequences", "time_column": None}
    assert read(tmp_path / "a.jsonl", tmp_path / "out", **options) == expected()


def write_shop_export(path: Path) -> None:
    """As German software writes it: a byte order mark, semicolons, decimal commas, offsets."""
    lines = ["Kunden-Nr;Artikel;Größe;Preis (€);Gekauft am"]
    for user, item, time in rows():
        clock = f"2024-03-{1 + time // 1000:02d} 08:{time % 60:02d}:{user:02d} +01:00"
        lines.append(f'K{user:04d};"A-{item:03d}";L;1.{item:03d},99;{clock}')
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())


@pytest.mark.slow
def test_a_shop_gets_from_its_export_to_recommendations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shop_export(tmp_path / "einkäufe.csv")
    commands = [
        ["prepare", "--events", "einkäufe.csv", "--user-column", "Kunden-Nr"]
        + ["--item-column", "Artikel", "--time-column", "Gekauft am", "--output", "prepared"],
        ["train", "--prepared", "prepared", "--run", "run", "--recipe", "demo"]
        + ["limits.max_steps=4", "show_progress=false"],
        ["evaluate", "--prepared", "prepared", "--run", "run"],
        ["recommend", "--run", "run", "--prepared", "prepared", "--output", "lists", "--k", "5"],
        ["export", "--run", "run", "--prepared", "prepared", "--output", "model"],
    ]
    for words in commands:
        assert main(words) == 0, words
    (part,) = Path("lists").glob("part-*.parquet")
    lists = pq.read_table(part).to_pylist()
    assert lists and all(row["user_id"].startswith("K00") for row in lists)
    assert all(item.startswith("A-") for row in lists for item in row["item_ids"])
    assert Recommender.open("model").recommend([["A-021", "A-024"]], k=3)[0]
