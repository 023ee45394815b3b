"""A small catalog and a training run on it, for the tests of the catalog."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import CatalogConfig

CPU = torch.device("cpu")
WIDTH = 8
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Case:
    """A little training run; ``loss`` says how the loss reaches the rows."""

    optimizer: str
    num_items: int
    loss: str  # "dense", "sparse" or "none"
    num_micro_batches: int = 2

    @property
    def config(self) -> CatalogConfig:
        return CatalogConfig(optimizer=self.optimizer, betas=BETAS, eps=1e-6, init_std=0.5)

    def items(self, step: int, micro_batch: int) -> Tensor:
        """(9,) look-ups of the global batch, duplicates among them."""
        generator = torch.Generator().manual_seed(100 * step + micro_batch)
        return torch.randint(self.num_items, (9,), generator=generator)

    def candidates(self, step: int) -> Tensor:
        """(7,) items that a sparse loss scores: duplicates, and some that are looked up too."""
        looked_up = self.items(step, 0)
        return torch.cat([looked_up[:3], self.items(step + 50, 0)[:3], looked_up[:1]])

    def weight(self) -> Tensor:
        """(V, D) that make the gradient of each row different."""
        return torch.randn(self.num_items, WIDTH, generator=torch.Generator().manual_seed(7))


def learning_rate(step: int) -> float:
    return 0.3 / (step + 1)


def encoder_loss(vectors: Tensor) -> Tensor:
    return (vectors - 1).square().sum() / 9


def table_loss(case: Case, step: int, rows: Tensor, first_row: int) -> Tensor:
    """Depends on the given rows only; summed over shards it is the loss of the whole table."""
    weight = case.weight()[first_row : first_row + rows.shape[0]]
    if case.loss == "dense":
        return (rows * weight).sin().sum()
    local = case.candidates(step) - first_row
    local = local[(local >= 0) & (local < rows.shape[0])]
    return (F.embedding(local, rows, sparse=True) * weight[local]).sin().sum()


def own_part(items: Tensor) -> Tensor:
    """Uneven parts of the global batch; the last of several ranks gets nothing."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_ranks == 1:
        return items
    cuts = torch.tensor([0, 2, 9, 9] if num_ranks == 3 else [0, 9, 9])
    return items[int(cuts[rank]) : int(cuts[rank + 1])]


def build(case: Case) -> Catalog:
    group = dist.group.WORLD
    return Catalog(case.num_items, WIDTH, case.config, group=group, device=CPU, seed=3)


def initial_rows(num_items: int, seed: int) -> Tensor:
    config = CatalogConfig(init_std=0.5)
    catalog = Catalog(num_items, WIDTH, config, group=None, device=CPU, seed=seed)
    return catalog.shard.rows.detach().clone()


def alone(optimizer: str, num_items: int = 20) -> Catalog:
    config = CatalogConfig(optimizer=optimizer, learning_rate=0.1)
    return Catalog(num_items, WIDTH, config, group=None, device=CPU, seed=1)
