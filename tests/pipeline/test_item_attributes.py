"""`prepare --item-attributes`: what each kind of column becomes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.attribute_files import (
    ITEMS,
    attribute_table,
    brand,
    price,
    tags,
    text,
    write_attributes,
)
from tests.pipeline.small_data import prepare_small

from shardrec.pipeline.log import item_attributes
from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.prepare import prepare_once
from shardrec.pipeline.prepared.attribute_rows import PreparedAttributes
from shardrec.pipeline.prepared.attributes import AttributeColumn, read_columns
from shardrec.pipeline.prepared.folder import Prepared

WRITTEN = Path(__file__).with_name("written_by_c53ea15")


def prepare_with(folder: Path, table: pa.Table | None = None, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = attribute_table() if table is None else table
    pq.write_table(table, folder / "attributes.parquet")
    path = str(folder / "attributes.parquet")
    return Path(prepare_small(folder, item_attributes=path, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_with(tmp_path_factory.mktemp("attributes"), attribute_buckets=4)


def ids_of(folder: Path) -> list[int]:
    ids: list[int] = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    return ids


def column_of(folder: Path, name: str) -> tuple[AttributeColumn, list[Any]]:
    (column,) = (one for one in read_columns(folder) if one.name == name)
    return column, pq.read_table(folder / "item_attributes.parquet")[name].to_pylist()


def test_a_category_gets_the_code_of_its_value(folder: Path) -> None:
    column, codes = column_of(folder, "brand")
    assert column.values == ("brand 0", "brand 1", "brand 2", "brand 3")
    for item, code in zip(ids_of(folder), codes, strict=True):
        value = brand(item) if item in ITEMS else None
        assert (column.values[code - 1] if code else None) == value, item


def test_a_boolean_is_a_category(folder: Path) -> None:
    column, codes = column_of(folder, "on_sale")
    assert column.values == (False, True)
    pairs = zip(ids_of(folder), codes, strict=True)
    assert all(code == (2 - item % 2 if item in ITEMS else 0) for item, code in pairs)


def test_a_list_gets_a_code_for_each_value_and_code_zero_for_none(folder: Path) -> None:
    column, codes = column_of(folder, "tags")
    assert column.values == (0, 10)
    for item, found in zip(ids_of(folder), codes, strict=True):
        values = tags(item) if item in ITEMS else None
        assert [column.values[code - 1] for code in found if code] == (values or [])
        assert bool(values) == (0 not in found)


def test_a_number_gets_a_bucket_of_about_equally_many_items(folder: Path) -> None:
    column, codes = column_of(folder, "price")
    assert len(column.borders) == 3
    for item, code in zip(ids_of(folder), codes, strict=True):
        value = price(item) if item in ITEMS else None
        expected = 0 if value is None else 1 + sum(value >= border for border in column.borders)
        assert code == expected, item
    counts = np.bincount(codes)[1:]
    assert counts.max() - counts.min() <= 3


def test_a_vector_is_scaled_to_a_mean_square_norm_of_one(folder: Path) -> None:
    column, vectors = column_of(folder, "text")
    given = [text(item) if item in ITEMS else None for item in ids_of(folder)]
    scale = 1 / np.sqrt(np.mean([np.square(one).sum() for one in given if one is not None]))
    assert column.scale == pytest.approx(scale, rel=1e-12)
    for vector, values in zip(vectors, given, strict=True):
        expected = np.zeros(3) if values is None else np.array(values) * scale
        assert vector == pytest.approx(expected.tolist(), rel=1e-6)


def test_items_without_events_come_after_those_of_the_log(folder: Path) -> None:
    ids = ids_of(folder)
    manifest = Prepared.open(folder).manifest
    assert ids[-4:] == [56, 57, 58, 59] and sorted(ids[:-4]) == list(range(56))
    counts = pq.read_table(folder / "items.parquet")["count"].to_pylist()
    assert counts[-4:] == [0] * 4
    assert manifest.counts["items"] == 60 and manifest.counts["items_admitted"] == 4
    assert manifest.counts["items_with_attributes"] == 59
    assert manifest.counts["items_without_training_events"] == counts.count(0)


def test_items_without_events_may_stay_outside(tmp_path: Path) -> None:
    folder = prepare_with(tmp_path, admit_items=False)
    manifest = Prepared.open(folder).manifest
    assert sorted(ids_of(folder)) == list(range(56))
    assert manifest.counts["items_admitted"] == 0
    assert manifest.counts["attribute_rows_without_item"] == 4


def test_an_item_that_a_filter_drops_is_not_admitted(tmp_path: Path) -> None:
    folder = prepare_with(tmp_path, min_item_events=9)
    ids = ids_of(folder)
    dropped = sorted(set(range(56)) - set(ids))
    assert dropped and not set(dropped) & set(ids) and set(range(56, 60)) <= set(ids)


def test_sequences_do_not_depend_on_attributes(folder: Path, plain_data: str) -> None:
    ours, plain = Prepared.open(folder).manifest, Prepared.open(plain_data).manifest
    for entry in plain.files:
        if entry.path != "items.parquet":
            assert ours.file(entry.path).sha256 == entry.sha256
    assert ours.fingerprint != plain.fingerprint


def test_a_folder_without_attributes_says_nothing_of_them(plain_data: str) -> None:
    manifest = json.loads((Path(plain_data) / "manifest.json").read_text())
    before = json.loads((WRITTEN / "prepared" / "manifest.json").read_text())
    assert manifest.keys() == before.keys()
    for part in ("config", "source", "counts"):
        assert before[part].keys() <= manifest[part].keys()
        assert not [name for name in manifest[part] if "attribute" in name or "admit" in name]


def test_other_attributes_are_other_data(tmp_path: Path) -> None:
    first = prepare_with(tmp_path / "first")
    log = str(tmp_path / "first" / "log.parquet")
    options: dict[str, Any] = {"events": log, "output": str(first)}
    path = str(tmp_path / "first" / "attributes.parquet")
    settings: dict[str, Any] = {
        "split": "leave_one_out",
        "sequences_per_row_group": 16,
        "item_attributes": path,
    }
    assert not prepare_once(PrepareConfig(**options, **settings)).is_new
    with pytest.raises(FileExistsError, match="attributes"):
        prepare_once(PrepareConfig(**options, **settings, attributes=("brand",)))
    write_attributes(Path(path), ITEMS[:-1])
    with pytest.raises(FileExistsError, match="item_attributes"):
        prepare_once(PrepareConfig(**options, **settings))
    del settings["item_attributes"]
    with pytest.raises(FileExistsError, match="item_attributes"):
        prepare_once(PrepareConfig(**options, **settings))


def test_a_newer_folder_keeps_codes_borders_and_scale(tmp_path: Path, folder: Path) -> None:
    items = list(range(30, 70))
    table = attribute_table(items)
    table = table.set_column(1, "brand", pa.array([f"brand {item % 6}" for item in items]))
    newer = prepare_with(tmp_path, table, items=str(folder / "items.parquet"))
    before = {column.name: column for column in read_columns(folder)}
    after = {column.name: column for column in read_columns(newer)}
    assert after["brand"].values == (*before["brand"].values, "brand 4", "brand 5")
    assert after["price"] == before["price"] and after["text"] == before["text"]
    assert ids_of(newer)[:60] == ids_of(folder)


@pytest.mark.parametrize("rows_in_a_group", [7, 262_144])
def test_every_rank_reads_the_attributes_of_its_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_in_a_group: int
) -> None:
    monkeypatch.setattr(item_attributes, "_GROUP_ROWS", rows_in_a_group)
    prepared = Prepared.open(prepare_with(tmp_path))
    source = PreparedAttributes.open(prepared, None)
    assert source is not None
    columns, table = source.columns, pq.read_table(prepared.path / "item_attributes.parquet")
    firsts = np.cumsum([0, *(column.num_codes for column in columns)])
    for items in (range(60), range(5, 22), range(59, 60), range(60, 60)):
        rows = source.rows(items)
        assert len(rows) == len(items) and rows.offsets[0] == 0
        for row, item in enumerate(items):
            lists = [
                [first + code for code in (value if isinstance(value, list) else [value])]
                for column, first in zip(columns, firsts, strict=False)
                if column.kind != "vector"
                for value in [table[column.name][item].as_py()]
            ]
            part = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
            assert rows.codes[part].tolist() == sum(lists, [])
            shares = [1 / len(codes) for codes in lists for _ in codes]
            assert rows.shares[part].tolist() == pytest.approx(shares)
            assert rows.vectors[row].tolist() == table["text"][item].as_py()
    assert torch.equal(source.trained(range(60)), prepared.item_counts() > 0)
    assert source.sizes.num_values == prepared.manifest.counts["attribute_values"]


def replaced(name: str, values: pa.Array) -> pa.Table:
    table = attribute_table()
    return table.set_column(table.schema.get_field_index(name), name, values)


def longer(values: list[Any]) -> list[Any]:
    return values + [values[-1]] * (len(ITEMS) - len(values))


REFUSED: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "an item twice": (
        lambda: pa.concat_tables([attribute_table(), attribute_table([7])]),
        "one row an item, got 2 for 7",
    ),
    "an item without id": (
        lambda: replaced("item_id", pa.array([None, *ITEMS[1:]], pa.int64())),
        "'item_id' must have no nulls",
    ),
    "ids of another type": (
        lambda: replaced("item_id", pa.array([str(item) for item in ITEMS])),
        "ids of the log's type, int64, got string",
    ),
    "vectors of two lengths": (
        lambda: replaced("text", pa.array(longer([[1.0, 2.0], [1.0]]))),
        "'text' of item_attributes must hold vectors of one length, got 1 and 2",
    ),
    "a vector with NaN": (
        lambda: replaced("text", pa.array(longer([[1.0, float("nan")], [1.0, 2.0]]))),
        "'text' must hold vectors of finite numbers",
    ),
    "an infinite number": (
        lambda: replaced("price", pa.array(longer([float("inf"), 1.0]))),
        "'price' must hold finite numbers",
    ),
    "a structure": (
        lambda: replaced("brand", pa.array([{"a": item} for item in ITEMS])),
        "'brand' of .* must hold text, integers",
    ),
    "no attributes": (
        lambda: attribute_table().select(["item_id"]),
        "a column besides 'item_id'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_attributes_are_refused_in_words(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare_with(tmp_path, make())
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": ("brnad",)}, "did you mean brand"),
        ({"attribute_numbers": ("brand",)}, "must name integer columns, got 'brand'"),
        ({"attribute_numbers": ("cost",)}, "attribute_numbers must be a known name"),
        ({"attribute_item_column": "item"}, "attribute_item_column must be a known name"),
        ({"attribute_buckets": 1}, "attribute_buckets must be at least 2"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_with(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [{"attributes": ("brand",)}, {"attribute_buckets": 4}, {"admit_items": False}],
    ids=str,
)
def test_options_of_attributes_need_a_file(options: Any) -> None:
    with pytest.raises(ValueError, match="must come with item_attributes"):
        PrepareConfig(events="a", output="b", **options)


def test_an_empty_list_of_floats_is_refused_and_a_null_vector_is_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vectors of one length, got none"):
        prepare_with(
            tmp_path, replaced("text", pa.array([None] * len(ITEMS), pa.list_(pa.float64())))
        )


def test_integers_may_be_numbers_and_text_a_dictionary(tmp_path: Path) -> None:
    codes = pa.array([item % 5 for item in ITEMS], pa.uint8())
    table = replaced("brand", attribute_table()["brand"].combine_chunks().dictionary_encode())
    table = table.append_column("year", codes)
    folder = prepare_with(tmp_path, table, attribute_numbers=("year",), attribute_buckets=3)
    year, brands = column_of(folder, "year")[0], column_of(folder, "brand")[0]
    assert year.kind == "number" and len(year.borders) == 2
    assert brands.values == ("brand 0", "brand 1", "brand 2", "brand 3")
