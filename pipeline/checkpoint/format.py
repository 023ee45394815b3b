"""What ``torch.distributed.checkpoint`` (DCP) needs to know: who writes what, and how files look.

DCP plans, moves plans between ranks, cuts rows for another number of ranks, and hands failures to
all ranks. Its own storage pickles; this one does not. A rank writes its tensors as raw bytes, one
after another, into one file; where they lie is JSON::

    {"table.rows": {"dtype": "float32", "shape": [10, 4],
                    "chunks": [{"first": 0, "rows": 5, "file": "rank-00000.bin", "start": 0}, …]}}

A chunk is a run of rows of a tensor; a tensor that is not cut is one chunk.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import override

from shardrec.pipeline.checkpoint.manifest import (
    BLOCK_BYTES,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
)
from shardrec.pipeline.outputs.storage import Folder

__all__ = [
    "RowReader",
    "RowSavePlanner",
    "RowLoadPlanner",
    "RowWriter",
    "metadata_from_json",
    "metadata_to_json",
]

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chunk lies, and what is known of the whole file once it is written."""

    file: str
    start: int
    entry: FileEntry | None = None


class RowSavePlanner(DefaultSavePlanner):
    """Each rank writes its rows of some tensors; rank 0 writes the tensors that all have alike."""

    def __init__(self, rows: Mapping[str, Tensor], first_row: int, num_rows: int) -> None:
        """Store what is this rank's part.

        Args:
            rows: tensors of which this rank holds rows [first_row, …); there may be none.
            first_row: global index.
            num_rows: of all ranks together.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.rows, self.first_row, self.num_rows = rows, first_row, num_rows

    @override
    def create_local_plan(self) -> SavePlan:
        items = [self._row_item(name, value) for name, value in self.rows.items() if value.shape[0]]
        if self.is_coordinator:
            whole = (name for name in self.state_dict if name not in self.rows)
            items += [_item(name, self.state_dict[name], 0, None) for name in whole]
        self.plan = SavePlan(items)
        return self.plan

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]

    def _row_item(self, name: str, value: Tensor) -> WriteItem:
        return _item(name, value, self.first_row, self.num_rows)


class RowLoadPlanner(DefaultLoadPlanner):
    """Reads a run of rows of some tensors, whoever wrote them, and the whole of the others."""

    def __init__(self, first_row: int, row_names: frozenset[str]) -> None:
        """Store which rows are wanted.

        Args:
            first_row: global index of row 0 of the tensors to fill.
            row_names: which tensors these are.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.first_row, self.row_names = first_row, row_names

    @override
    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, target in self.state_dict.items():
            first = self.first_row if name in self.row_names else 0
            wanted = _chunk(target.shape, first)
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            found = create_read_items_for_chunk_list(name, stored, [wanted])
            if sum(math.prod(item.lengths) for item in found) != target.numel():
                raise DamagedCheckpointError(
                    f"metadata.json must say where all of {name} lies, got parts of it; "
                    "use another checkpoint"
                )
            items += found if target.numel() else []
        return LoadPlan(items)

    @override
    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Tensor = self.state_dict[index.fqn]
        return found

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"a checkpoint must hold tensors only, got bytes {read_item}; refuse it")


class RowWriter(StorageWriter):
    """Writes this rank's tensors into one file; on rank 0 then has the checkpoint completed."""

    def __init__(
        self,
        folder: Folder,
        file: str,
        complete: Callable[[Metadata, dict[str, FileEntry]], None],
    ) -> None:
        """Store where to write.

        Args:
            folder: of the checkpoint.
            file: name of this rank's file.
            complete: called on rank 0 when all ranks have written, with what lies where and the
                files; where it raises, all ranks raise.
        """
        self.folder, self.file, self.complete = folder, file, complete

    @override
    def reset(self, checkpoint_id: Any = None) -> None:
        return None

    @override
    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        return None

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for part in results for result in part]
        metadata.storage_data = {one.index: one.storage_data for one in written}
        files = {one.storage_data.file: one.storage_data.entry for one in written}
        self.complete(metadata, files)

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        digest, start, places = hashlib.sha256(), 0, []
        with self.folder.create(self.file) as file:
            for item in plan.items:
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor)
                content = _bytes_of(value.detach().cpu().contiguous())
                for block in range(0, len(content), BLOCK_BYTES):
                    part = content[block : block + BLOCK_BYTES]
                    file.write(part)
                    digest.update(part)
                places.append((item.index, len(content), start))
                start += len(content)
        entry = FileEntry(start, digest.hexdigest())
        return [
            WriteResult(index, size, _Place(self.file, begin, entry))
            for index, size, begin in places
        ]


class RowReader(StorageReader):
    """Reads what ``RowWriter`` wrote; nothing in it is unpickled.

    Reading again compares no file with its checksum again.
    """

    def __init__(self, manifest: Manifest, metadata: Metadata) -> None:
        """Store what to read: a complete checkpoint, and what ``metadata_from_json`` gave."""
        self.manifest, self.metadata = manifest, metadata
        self._checked: set[str] = set()

    @override
    def reset(self, checkpoint_id: Any = None) -> None:
        return None

    @override
    def read_metadata(self) -> Metadata:
        return self.metadata

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        return None

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._place(item).file, []).append(item)
        for name, items in by_file.items():
            if name not in self._checked:
                self.manifest.check(name)
                self._checked.add(name)
            with self.manifest.folder.open(name) as file:
                for item in items:
                    self._read(file, item, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _place(self, item: ReadItem) -> _Place:
        place: _Place = self.metadata.storage_data[item.storage_index]
        return place

    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        """Fill the rows that an item names; chunks are cut between rows only."""
        target = planner.resolve_tensor(item)
        row_bytes = math.prod(item.lengths[1:]) * target.element_size()
        skipped = item.storage_offsets[0] if item.storage_offsets else 0
        file.seek(self._place(item).start + skipped * row_bytes)
        content = _bytes_of(target)
        filled = 0
        while filled < len(content):
            count = file.readinto(content[filled : filled + BLOCK_BYTES])
            if not count:
                raise DamagedCheckpointError(
                    f"{self.manifest.folder}/{self._place(item).file} must hold all of "
                    f"{item.dest_index.fqn}, got less; use another checkpoint"
                )
            filled += count
        planner.commit_tensor(item, target)


def metadata_to_json(metadata: Metadata) -> bytes:
    """DCP's metadata, which its own storage pickles, as JSON."""
    tensors = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        chunks = []
        for chunk in stored.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            first, rows = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
            chunks.append({"first": first, "rows": rows, "file": place.file, "start": place.start})
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(stored.size), "chunks": chunks}
    return json.dumps(tensors).encode()


def metadata_from_json(text: bytes) -> Metadata:
    """The metadata that ``metadata_to_json`` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is not such a text.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _Place] = {}
    for name, stored in json.loads(text).items():
        shape, chunks = torch.Size(stored["shape"]), []
        for part in stored["chunks"]:
            sizes = torch.Size([int(part["rows"]), *shape[1:]]) if shape else shape
            chunk = _chunk(sizes, int(part["first"]))
            places[MetadataIndex(name, chunk.offsets)] = _Place(part["file"], int(part["start"]))
            chunks.append(chunk)
        properties = TensorProperties(dtype=DTYPES[stored["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, shape, chunks)
    return Metadata(tensors, storage_data=places)


def _item(name: str, value: Tensor, first_row: int, num_rows: int | None) -> WriteItem:
    """The order to write a tensor, or this rank's rows of it."""
    if str(value.dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"{name} must be of a type in {', '.join(DTYPES)}, got {value.dtype}")
    size = value.shape if num_rows is None else torch.Size([num_rows, *value.shape[1:]])
    chunk = _chunk(value.shape, first_row)
    properties = TensorProperties(dtype=value.dtype)
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, size),
    )


def _chunk(shape: torch.Size, first_row: int) -> ChunkStorageMetadata:
    offsets = torch.Size([first_row, *(0 for _ in shape[1:])]) if shape else torch.Size([])
    return ChunkStorageMetadata(offsets=offsets, sizes=shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; writing to them writes to it."""
    flat = tensor.detach().reshape(-1)
    assert flat.data_ptr() == tensor.data_ptr()
    return flat.view(torch.uint8).numpy().data
