"""The file format of checkpoints: raw tensor bytes, and JSON metadata that locates them.

A rank writes its tensors, one after another, into one file. ``metadata.json`` names them all::

    {"table.rows": {"dtype": "float32", "shape": [10, 4],
                    "chunks": [{"first": 0, "rows": 5, "file": "rank-00000.bin", "start": 0}, …]}}

A chunk is a run of rows; a tensor that is not sharded is one chunk. Nothing is unpickled.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardrec.pipeline.checkpoint.manifest import (
    BLOCK_BYTES,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
)
from shardrec.pipeline.outputs.json_files import Shape, parse_json, require_shape
from shardrec.pipeline.outputs.storage import Folder

__all__ = [
    "Chunk",
    "Piece",
    "StoredTensor",
    "TensorReader",
    "joined",
    "metadata_from_json",
    "metadata_to_json",
    "write_pieces",
]

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_CHUNK: Shape = {"first": int, "rows": int, "file": str, "start": int}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's rows of a tensor, from ``first`` on, of ``num_rows`` over all ranks."""

    value: Tensor
    first: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [first, first + rows) of a tensor, stored in ``file`` from byte ``start`` on."""

    first: int
    rows: int
    file: str
    start: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Metadata of a tensor: dtype, shape over all ranks, and the chunks that hold its rows."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def write_pieces(
    folder: Folder, file: str, pieces: Mapping[str, Piece]
) -> tuple[dict[str, StoredTensor], FileEntry]:
    """Write tensors into one file; return their metadata, and size and checksum of the file.

    Raises:
        OSError: the file cannot be written.
        TypeError: the format does not support a tensor's dtype.
    """
    digest, start, stored = hashlib.sha256(), 0, {}
    with folder.create(file) as opened:
        for name, piece in pieces.items():
            content = _bytes_of(piece.value.detach().cpu().contiguous())
            stored[name] = _place(name, piece, file, start)
            for block in range(0, len(content), BLOCK_BYTES):
                part = content[block : block + BLOCK_BYTES]
                opened.write(part)
                digest.update(part)
            start += len(content)
    return stored, FileEntry(start, digest.hexdigest())


def joined(parts: Iterable[Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The merged metadata of several files, where each tensor has its chunks from all files."""
    found: dict[str, StoredTensor] = {}
    for part in parts:
        for name, one in part.items():
            before = found[name].chunks if name in found else ()
            found[name] = StoredTensor(one.dtype, one.shape, before + one.chunks)
    return found


class TensorReader:
    """Reads rows of the tensors of a complete checkpoint, written on any number of ranks.

    Each file is compared with its checksum once, before it is first read.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
        """Store what to read: a manifest, and what ``metadata_from_json`` gave."""
        self.manifest, self.tensors = manifest, tensors
        self._checked: set[str] = set()

    def read(self, wanted: Mapping[str, range]) -> dict[str, Tensor]:
        """The ``wanted`` rows of some tensors, by name; a tensor of shape () has one row.

        Raises:
            DamagedCheckpointError: a file differs from the manifest, or rows are missing.
        """
        with contextlib.ExitStack() as files:
            opened = functools.cache(lambda name: files.enter_context(self._open(name)))
            return {name: self._rows(name, rows, opened) for name, rows in wanted.items()}

    def _rows(self, name: str, rows: range, opened: Any) -> Tensor:
        stored = self.tensors[name]
        value = torch.empty((len(rows), *stored.shape[1:]), dtype=DTYPES[stored.dtype])
        content, num_read = _bytes_of(value), 0
        row_bytes = math.prod(stored.shape[1:]) * value.element_size()
        for chunk in stored.chunks:
            start, stop = max(rows.start, chunk.first), min(rows.stop, chunk.first + chunk.rows)
            if start < stop:
                opened(chunk.file).seek(chunk.start + (start - chunk.first) * row_bytes)
                part = slice((start - rows.start) * row_bytes, (stop - rows.start) * row_bytes)
                if not _fill(content[part], opened(chunk.file)):
                    raise self._incomplete(chunk.file, name)
                num_read += stop - start
        if num_read != len(rows):
            raise self._incomplete("metadata.json", name)
        return value if stored.shape else value.reshape(())

    def _open(self, file: str) -> Any:
        if file not in self._checked:
            self.manifest.check(file)
            self._checked.add(file)
        return self.manifest.folder.open(file)

    def _incomplete(self, file: str, name: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self.manifest.folder}/{file} must cover all of {name}, got parts of it; "
            "use another checkpoint"
        )


def metadata_to_json(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The text of ``metadata.json``."""
    return json.dumps({name: asdict(one) for name, one in tensors.items()}).encode()


def metadata_from_json(text: bytes, sizes: Mapping[str, int]) -> dict[str, StoredTensor]:
    """The metadata in the text of ``metadata.json``; the inverse of ``metadata_to_json``.

    Args:
        text: content of the file.
        sizes: size in bytes of each file of the checkpoint, which must hold all chunks.

    Raises:
        ValueError: the text is malformed, or a chunk lies outside its file.
    """
    remedy = "use another checkpoint"
    tensors = {}
    for name, stored in require_shape(parse_json(text), {}, "the metadata", remedy).items():
        shape = {"dtype": str, "shape": list, "chunks": list}
        known = require_shape(stored, shape, name, remedy)
        chunks = [
            require_shape(one, _CHUNK, f"a chunk of {name}", remedy) for one in known["chunks"]
        ]
        tensor = StoredTensor(
            known["dtype"],
            tuple(known["shape"]),
            tuple(Chunk(**{key: one[key] for key in _CHUNK}) for one in chunks),
        )
        _check_tensor(name, tensor, sizes)
        tensors[name] = tensor
    return tensors


def _check_tensor(name: str, tensor: StoredTensor, sizes: Mapping[str, int]) -> None:
    """Refuse a tensor whose chunks are not in their files or do not follow one another."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"dtype of {name} must be a known one, got {tensor.dtype!r}")
    if not all(type(size) is int and size >= 0 for size in tensor.shape):
        raise ValueError(f"shape of {name} must be of sizes, got {list(tensor.shape)}")
    row_bytes = math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype].itemsize
    for chunk in tensor.chunks:
        stop = chunk.start + chunk.rows * row_bytes
        if min(chunk.first, chunk.rows, chunk.start) < 0 or stop > sizes.get(chunk.file, -1):
            raise ValueError(f"chunks of {name} must be inside of their files, got {chunk}")
    runs = sorted((one.first, one.first + one.rows) for one in tensor.chunks if one.rows)
    num_rows = (*tensor.shape, 1)[0]
    edges = [0, *(stop for _, stop in runs)]
    if [start for start, _ in runs] != edges[:-1] or edges[-1] != num_rows:
        raise ValueError(f"chunks of {name} must cover its {num_rows} rows once, got {runs[:9]}")


def _place(name: str, piece: Piece, file: str, start: int) -> StoredTensor:
    dtype, shape = str(piece.value.dtype).removeprefix("torch."), tuple(piece.value.shape)
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be of a type in {', '.join(DTYPES)}, got {piece.value.dtype}")
    chunk = Chunk(piece.first, shape[0] if shape else 1, file, start)
    return StoredTensor(dtype, (piece.num_rows, *shape[1:]) if shape else (), (chunk,))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; writing to them writes to it."""
    flat = tensor.detach().reshape(-1)
    assert flat.data_ptr() == tensor.data_ptr()
    return flat.view(torch.uint8).numpy().data


def _fill(target: memoryview, file: BinaryIO) -> bool:
    """Whether the file had enough bytes to fill ``target``."""
    filled = 0
    while filled < len(target):
        count = file.readinto(target[filled : filled + BLOCK_BYTES])  # type: ignore[attr-defined]
        if not count:
            return False
        filled += count
    return True
