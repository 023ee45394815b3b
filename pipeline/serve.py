"""Recommendations from an export, in one process, without the training stack.

Needs torch, numpy and pyarrow: no TorchRec, no fbgemm, no process group; FAISS only for approximate
search.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.kernels.shard import RowShard
from shardrec.modules.ranking import top_items
from shardrec.pipeline.outputs.json_files import Shape, read_object, require_shape
from shardrec.pipeline.outputs.staging import settle
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.prepared.manifest import MANIFEST_NAME, sha256
from shardrec.pipeline.served.ann_index import INDEX, index_top_items, open_index
from shardrec.pipeline.served.pointer import export_folder

__all__ = ["ENCODER", "FORMAT", "Recommender", "read_items", "read_manifest", "read_recommender"]

FORMAT = "shardrec.export"
ENCODER = "encoder.pt2"
_SHAPE: Shape = {
    **{"request": dict, "files": list, "catalog_version": str, "scores": str},
    **{"num_items": int, "width": int, "max_length": int},
}
_AGAIN = "export again"

ItemId = int | str


@dataclass(frozen=True, slots=True)
class Recommender:
    """An encoder and the item vectors it was trained with.

    Attributes:
        manifest: of the export: run, data, catalog version.
        ids: what each row of ``vectors`` is.
        vectors: (V, D) float32, what histories are looked up in.
        scored: (V, D) float32, what states are compared with; ``vectors`` or their unit vectors.
        allowed: (V,) bool, items that may be recommended.
        encoder: (B, L, D) to (B, L, D).
        index: of FAISS, searched instead of all vectors; None searches exactly.
    """

    manifest: dict[str, Any]
    ids: ItemIds
    vectors: Tensor
    scored: Tensor
    allowed: Tensor
    encoder: nn.Module
    index: Any = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        catalog_version: str | None = None,
        min_count: int = 1,
        approximate: bool = False,
    ) -> "Recommender":
        """Load an export after checking that its files belong together.

        The encoder's file is a program of ``torch.export``: open only exports that you trust.

        Args:
            folder: what ``shardrec export`` wrote, or the pointer of ``shardrec publish``.
            catalog_version: of the catalog to be served, where it is known; another is refused.
            min_count: training events an item must have to be recommended; 0 takes all.
            approximate: search the index of `shardrec export --faiss`, which holds the items with
                a training event.

        Raises:
            FileNotFoundError: the export is not complete.
            ValueError: a file is not the manifest's, the catalog is another one, or there is no
                index to search.
        """
        folder = export_folder(Path(folder))
        manifest = read_manifest(folder)
        if approximate:
            _require_index(folder, manifest, min_count)
        served = read_recommender(folder, manifest, min_count)
        if catalog_version is not None:
            _require_version(catalog_version, served.ids.version, f"export {folder}")
        index = open_index(folder / INDEX) if approximate else None
        return dataclasses.replace(served, index=index)

    @torch.no_grad()
    def recommend(
        self, histories: Sequence[Sequence[ItemId]], k: int = 10, *, filter_seen: bool = True
    ) -> list[list[tuple[ItemId, float]]]:
        """The ``k`` best items and their scores for each history.

        Args:
            histories: item ids, most recent last; ids that the catalog lacks are skipped.
            k: items wanted.
            filter_seen: leave out items of the history.

        Returns:
            One list for each history; empty where no item of it is known.
        """
        known = [self._known(history) for history in histories]
        rows = [index for index, items in enumerate(known) if len(items)]
        result: list[list[tuple[ItemId, float]]] = [[] for _ in histories]
        if not rows:
            return result
        states = self.states([known[row] for row in rows])
        seen = torch.cat([known[row] for row in rows]), torch.tensor([len(known[r]) for r in rows])
        scores, items = self._top(states, k, seen if filter_seen else None)
        for row, own_scores, own_items in zip(rows, scores, items, strict=True):
            there = own_items >= 0
            names = self.ids.of(own_items[there].numpy()).to_pylist()
            result[row] = list(zip(names, own_scores[there].tolist(), strict=True))
        return result

    def states(self, histories: Sequence[Tensor]) -> Tensor:
        """(B, D) float32 states after the last item of each history of dense indices."""
        recent = [items[-self.manifest["max_length"] :] for items in histories]
        lengths = torch.tensor([len(items) for items in recent])
        padded = nn.utils.rnn.pad_sequence(recent, batch_first=True)  # (B, L)
        states: Tensor = self.encoder(self.vectors[padded])
        return states[torch.arange(len(recent)), lengths - 1]

    def _top(
        self, states: Tensor, k: int, seen: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Scores and items (B, k), by the index where there is one."""
        if self.index is not None:
            return index_top_items(self.index, states, k, seen)
        shard = RowShard(self.scored, 0, len(self.ids), None)
        return top_items(states, shard, k, seen=seen, allowed=self.allowed)

    def _known(self, history: Sequence[ItemId]) -> Tensor:
        items = self.ids.items(pa.array(history, self.ids.ids.type))
        return items[items >= 0]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete export whose files are the ones it lists.

    Raises:
        FileNotFoundError: there is no manifest, or a file is gone.
        ValueError: it is no export, or a file has changed.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        settle(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"an export must hold {MANIFEST_NAME}, got {folder}; run `shardrec export` to make one"
        )
    manifest = read_object(path, {}, _AGAIN)
    if (manifest.get("format"), manifest.get("schema_version")) != (FORMAT, 1):
        raise ValueError(
            f"{path} must be a manifest of {FORMAT!r}, version 1, got {manifest.get('format')!r}, "
            f"{manifest.get('schema_version')!r}; name a folder that `shardrec export` wrote"
        )
    require_shape(manifest, _SHAPE, str(path), _AGAIN)
    require_shape(manifest["request"], {"source": dict}, f"'request' in {path}", _AGAIN)
    for entry in manifest["files"]:
        where = f"an entry of 'files' in {path}"
        require_shape(entry, {"path": str, "sha256": str}, where, _AGAIN)
        if sha256(folder / entry["path"]) != entry["sha256"]:
            raise ValueError(
                f"the SHA-256 of {folder / entry['path']} must be {entry['sha256']}, got another; "
                "export again: files of two exports do not fit together"
            )
    return manifest


def read_recommender(folder: Path, manifest: dict[str, Any], min_count: int) -> Recommender:
    """What the files of an export hold, for exact search.

    Args:
        folder: of the export.
        manifest: of the export.
        min_count: training events an item must have to be recommended.

    Raises:
        ValueError: the items are not those of the manifest.
    """
    ids, counts, vectors = read_items(folder, manifest)
    _require_version(manifest["catalog_version"], ids.version, f"items of {folder}")
    scored = F.normalize(vectors) if manifest["scores"] == "cosine" else vectors
    encoder = torch.export.load(folder / ENCODER).module()
    return Recommender(manifest, ids, vectors, scored, counts >= min_count, encoder)


def read_items(folder: Path, manifest: dict[str, Any]) -> tuple[ItemIds, Tensor, Tensor]:
    """Ids, training counts (V,) int64 and vectors (V, D) float32 of an export, by item."""
    vectors = torch.empty(manifest["num_items"], manifest["width"])
    ids, counts, first = [], [], 0
    for name in sorted(e["path"] for e in manifest["files"] if e["path"].startswith("items/")):
        for batch in pq.ParquetFile(folder / name).iter_batches(65_536):
            values = batch.column("vector").flatten().to_numpy()
            vectors[first : first + len(batch)].view(-1).numpy()[:] = values
            ids.append(batch.column("item_id"))
            counts.append(batch.column("count").to_numpy())
            first += len(batch)
    return ItemIds(pa.concat_arrays(ids)), torch.from_numpy(np.concatenate(counts)), vectors


def _require_index(folder: Path, manifest: dict[str, Any], min_count: int) -> None:
    if manifest.get("faiss") is None:
        raise ValueError(
            f"an export must hold an index for approximate search, got none in {folder}; "
            "export with --faiss HNSW32, or search exactly"
        )
    if min_count != 1:
        raise ValueError(
            f"min_count must be 1 for approximate search, got {min_count}; the index holds the "
            "items with a training event: search exactly"
        )


def _require_version(expected: str, found: str, what: str) -> None:
    if expected != found:
        raise ValueError(
            f"{what} must be of catalog version {expected}, got {found}; an index means another "
            "item there: export a run that was trained on this catalog"
        )
