"""Histories for recommendations take the types that logs have, and refuse what does not fit."""

import decimal
import functools
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardrec.pipeline.outputs.files import describe_parquet
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.histories import Histories
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.served.items import read_items

NUMBERS = ItemIds(pa.array([10, 20, 30]))
TEXTS = ItemIds(pa.array(["a", "b", "ü"], pa.large_string()))
UUIDS = [uuid.UUID(int=number) for number in range(3)]


def read(folder: Path, catalog: ItemIds) -> tuple[list[Any], list[list[int]], pa.DataType, int]:
    """Users, dense items, the type of the users in the output, and the number of unknown items."""
    found = Histories(str(folder), catalog, users="user", items="items")
    users, items, unknown = [], [], 0
    for chunk in found.chunks(0, found.num_users, 2):
        users += chunk.user_ids.to_pylist()
        bounds = chunk.offsets.tolist()
        items += [chunk.items[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        unknown += chunk.num_unknown
    return users, items, found.user_type, unknown


def write(path: Path, users: Any, items: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"user": users, "items": items}), path)


USERS: dict[str, tuple[Any, list[Any]]] = {
    "uint16": (pa.array([7, 2, 7], pa.uint16()), [7, 2, 7]),
    "negative": ([-7, 2, 7], [-7, 2, 7]),
    "float": ([7.0, 2.0, None], [7, 2, None]),
    "decimal": (pa.array([decimal.Decimal(x) for x in (7, 2, 1)], pa.decimal128(38, 0)), [7, 2, 1]),
    "text": (["07", " x", None], ["07", " x", None]),
    "binary": ([b"07", b"\xc3\xbc", None], ["07", "ü", None]),
    "uuid": (
        pa.array([UUIDS[0].bytes, None, UUIDS[2].bytes], pa.uuid()),
        [str(UUIDS[0]), None, str(UUIDS[2])],
    ),
}


@pytest.mark.parametrize("case", USERS)
def test_users_of_this_type_are_written_as_they_are(tmp_path: Path, case: str) -> None:
    users, expected = USERS[case]
    write(tmp_path / "h.parquet", users, [[20, 99], [], [30, 10]])
    found, items, _, unknown = read(tmp_path, NUMBERS)
    assert (found, items, unknown) == (expected, [[1], [], [2, 0]], 1)


ITEMS: dict[str, tuple[Any, ItemIds]] = {
    "int32": (pa.array([[20, 99], None, [30, 10]], pa.list_(pa.int32())), NUMBERS),
    "float": ([[20.0, None], None, [30.0, 10.0]], NUMBERS),
    "decimal": (
        pa.array(
            [[decimal.Decimal(x) for x in one] for one in ([20, 5], [], [30, 10])],
            pa.list_(pa.decimal128(38, 0)),
        ),
        NUMBERS,
    ),
    "text": (pa.array([["b", "?"], None, ["ü", "a"]], pa.large_list(pa.string())), TEXTS),
    "binary": ([[b"b", None], None, [b"\xc3\xbc", b"a"]], TEXTS),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_of_this_type_are_found(tmp_path: Path, case: str) -> None:
    items, catalog = ITEMS[case]
    write(tmp_path / "h.parquet", [1, 2, 3], items)
    assert read(tmp_path, catalog)[1:] == ([[1], [], [2, 0]], pa.int64(), 1)


def test_empty_lists_alone_need_no_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1, 2], pa.array([[], None], pa.list_(pa.null())))
    write(tmp_path / "b.parquet", [3], [["b"]])
    assert read(tmp_path, TEXTS)[1:] == ([[], [], [1]], pa.int64(), 0)


def test_files_may_differ_in_width_and_names_but_not_in_kind(tmp_path: Path) -> None:
    write(tmp_path / "h" / "part-2", pa.array([1], pa.int8()), pa.array([[10]]))
    items = pa.array([[30, 20]], pa.list_(pa.int16()))
    write(tmp_path / "h" / "part-10.PARQUET", pa.array([2], pa.uint64()), items)
    none = pa.array([], pa.null())
    write(tmp_path / "h" / "part-11.parquet", none, none)
    assert read(tmp_path / "h", NUMBERS) == ([1, 2], [[0], [2, 1]], pa.int64(), 0)
    write(tmp_path / "h" / "part-12.parquet", ["u1"], [[10]])
    with pytest.raises(ValueError, match="'user' must have one type in all files, got int64 in "):
        read(tmp_path / "h", NUMBERS)


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        ([1.5], [[10]], "row group 0, column 'user' must fit into int64 as whole numbers"),
        ([1], [[0.5]], "row group 0, column 'items' must fit into int64 as whole numbers"),
        ([b"\xff"], [[10]], "column 'user' must hold text in UTF-8"),
        ([True], [[10]], "column 'user' of .* must be integer or string, got bool"),
        ([1], [["10"]], "must be a list of int64 ids as in the catalog"),
    ],
)
def test_histories_that_cannot_be_read_exactly_are_refused(
    tmp_path: Path, users: Any, items: Any, message: str
) -> None:
    write(tmp_path / "h.parquet", users, items)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, NUMBERS)


def test_histories_in_a_text_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("user,items\n1,10\n")
    with pytest.raises(ValueError, match="histories must be Parquet, got csv in .*h.csv'"):
        read(tmp_path, NUMBERS)


def refuse_small_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joins of ``string`` arrays fail, as they do beyond 2 GiB."""
    join = pa.concat_arrays

    def concat_arrays(arrays: Any, *rest: Any) -> Any:
        assert not any(pa.types.is_string(array.type) for array in arrays), "offset overflow"
        return join(arrays, *rest)

    monkeypatch.setattr(pa, "concat_arrays", concat_arrays)


def test_ids_of_a_catalog_are_joined_beyond_2_gib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"item_id": ["b", "a", "ü"], "item": [0, 1, 2], "count": [3, 2, 1]}
    table["vector"] = pa.array([[1.0, 0.0]] * 3, pa.list_(pa.float32(), 2))
    (tmp_path / "items").mkdir()
    pq.write_table(pa.table(table), tmp_path / "items" / "part.parquet", row_group_size=2)
    pq.write_table(pa.table(table), tmp_path / "items.parquet", row_group_size=2)
    refuse_small_offsets(monkeypatch)
    manifest: Any = {"num_items": 3, "width": 2, "files": []}
    manifest["files"] = [{"path": "items/part.parquet", "bytes": 1}]
    served, counts, _ = read_items(tmp_path, manifest)
    assert served.items(pa.array(["ü", "?", "b"])).tolist() == [2, -1, 0]
    assert counts.tolist() == [3, 2, 1]
    listed: Any = SimpleNamespace(file=functools.partial(describe_parquet, tmp_path))
    assert Prepared(tmp_path, listed).item_ids().to_pylist() == ["b", "a", "ü"]
    plain = ItemIds(pa.array(["b", "a", "ü"]))
    assert served.version == plain.version
    assert served.items(pa.array(["a"], pa.large_string()).dictionary_encode()).tolist() == [1]
