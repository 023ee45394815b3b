"""The item table: sharded by rows over the ranks, looked up by item, updated once per step.

The gradient of a row comes from two places, the encoder's input and the loss. Both wait until
``merge_gradients`` has summed them, and ``step`` applies the sum as one update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.row_updates import AdamUpdate, FusedUpdate, RowUpdate, SparseAdamUpdate
from shardrec.modules.torchrec_adapter import FUSED_OPTIMIZERS, ShardedTable

__all__ = ["Catalog"]

INITIAL_BLOCK = 8_192  # rows made from one seed; part of what a seed means, so never changed


class Catalog:
    """(V, D) item vectors, this rank holding rows [first_row, first_row + R).

    Every rank of ``group`` must make the same calls of ``lookup`` and run backward through each
    result (a rank without items looks up an empty tensor). ``step`` and ``merge_gradients`` need no
    other rank. Gradients are sums over ranks, never averages, as the losses of this package expect.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        config: CatalogConfig,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        seed: int,
    ) -> None:
        """Make this rank's rows; they depend on (seed, item) and not on the number of ranks.

        Args:
            num_items: V, at least 1. Ranks beyond the rows hold none.
            width: D, a multiple of 4.
            config: optimizer and initial scale.
            group: the ranks that share the table; None for one process, with or without a
                launcher (a default process group of one rank is made if there is none).
            device: where the rows live.
            seed: of the initial rows.
        """
        _check_shape(num_items, width)
        self.config = config
        self.device = device
        self.num_items = num_items
        self.width = width
        self.num_steps = 0
        self.learning_rate = config.learning_rate
        self._group = _single_process_group(device) if group is None else group
        fused = config.optimizer if config.optimizer in FUSED_OPTIMIZERS else "sgd"
        self._table = ShardedTable(
            num_items, width, optimizer=fused, eps=config.eps, group=self._group, device=device
        )
        _fill_initial_rows(self._table.rows, self._table.first_row, seed, config.init_std)
        self._rows = self._table.rows.requires_grad_()
        self._update = _build_update(config, self._table)

    @property
    def shard(self) -> RowShard:
        """This rank's rows, a leaf that collects the losses' gradients; aliases the table."""
        alone = dist.get_world_size(self._group) == 1
        return RowShard(
            rows=self._rows,
            first_row=self._table.first_row,
            num_rows=self.num_items,
            group=None if alone else self._group,
        )

    @property
    def row_range(self) -> range:
        """Global indices of this rank's rows."""
        return range(self._table.first_row, self._table.first_row + self._rows.shape[0])

    def lookup(self, items: Tensor) -> Tensor:
        """The vectors of ``items``, differentiable.

        Args:
            items: (M,) int64 global item indices; M may be 0 and differ by rank.

        Returns:
            (M, D) float32.

        Raises:
            ValueError: an item is outside [0, V) on any rank (raised on all of them).
            TypeError: ``items`` is not int64.

        Collectives: one all-reduce of a number, all-to-all of ids and vectors; in backward
        all-to-all of gradients.
        """
        return self.begin_lookup(items)()

    def begin_lookup(self, items: Tensor) -> Callable[[], Tensor]:
        """A look-up in two halves: this call sends the ids, the returned function does the rest.

        Work between the two overlaps with the all-to-all of ids; the vectors are those at the time
        of the second call, which may be made once and raises what ``lookup`` does.

        Raises:
            TypeError: ``items`` is not one-dimensional int64.

        Collectives: as ``lookup``; this call starts the all-reduce and the all-to-all of ids.
        """
        if items.dtype != torch.int64 or items.ndim != 1:
            raise TypeError(
                f"items must be one-dimensional int64, got {tuple(items.shape)} {items.dtype}; "
                "flatten and convert with .long()"
            )
        outside = (items < 0) | (items >= self.num_items)
        num_outside, counted = outside.sum(), None
        if dist.get_world_size(self._group) > 1:
            counted = dist.all_reduce(num_outside, group=self._group, async_op=True)
        # TorchRec would read and write beyond its buffers for an item that does not exist.
        vectors = self._table.begin_lookup(items.masked_fill(outside, 0))

        def checked_vectors() -> Tensor:
            found = vectors()
            if counted is not None:
                counted.wait()
            if num_outside:
                raise ValueError(self._describe_outside(items[outside]))
            return found

        return checked_vectors

    def merge_gradients(self) -> None:
        """Sums look-up gradients and loss gradients into ``shard.rows.grad``, one entry a row.

        Afterwards the gradient is None, dense (R, D) or coalesced sparse COO. More micro-batches
        may follow; merge again before the next step or norm.

        Collectives: none.
        """
        pairs, gradient = self._table.pairs, self._rows.grad
        if not pairs and (gradient is None or not gradient.is_sparse or gradient.is_coalesced()):
            return
        with torch.no_grad():
            if gradient is not None and not gradient.is_sparse:
                for rows, values in pairs:
                    gradient.index_add_(0, rows, values)
            else:
                self._rows.grad = self._merge_sparse(gradient)
        pairs.clear()

    def squared_gradient_norm(self) -> Tensor:
        """() float32, the squared norm of this rank's merged gradient; 0 where there is none.

        Sum it over the ranks of the group for the norm of the whole table's gradient.

        Collectives: none.
        """
        self.merge_gradients()
        gradient = self._rows.grad
        if gradient is None:
            return torch.zeros((), device=self.device)
        values = gradient.values() if gradient.is_sparse else gradient
        return torch.linalg.vector_norm(values).square()

    def step(self, scale: float | Tensor = 1.0, learning_rate: float | None = None) -> None:
        """Applies the merged gradient, each row at most once, and clears it.

        Args:
            scale: multiplies the gradient, e.g. the factor of a global norm clip.
            learning_rate: for this step and those after it.

        Collectives: none.
        """
        self.merge_gradients()
        if learning_rate is not None:
            self.learning_rate = learning_rate
        gradient = self._rows.grad
        if gradient is None:
            gradient = _empty_gradient(self._rows)
        self._rows.grad = None
        self.num_steps += 1
        with torch.no_grad():
            if isinstance(scale, Tensor) or scale != 1.0:
                (gradient.values() if gradient.is_sparse else gradient).mul_(scale)
            self._update.apply(gradient, self.learning_rate, self.num_steps)

    def zero_grad(self) -> None:
        """Drop all gradients since the last step."""
        self._table.pairs.clear()
        self._rows.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's rows and optimizer memory, as plain tensors that alias the live ones.

        Keys: ``rows`` (R, D), ``optimizer.<name>`` (R,) or (R, D), and () int64 or float64 numbers
        ``first_row``, ``num_rows``, ``num_steps``, ``learning_rate``. Row-aligned tensors of
        several ranks, concatenated, are the state of a table on fewer ranks.
        """
        return self._row_states() | {
            "first_row": torch.tensor(self._table.first_row),
            "num_rows": torch.tensor(self.num_items),
            "num_steps": torch.tensor(self.num_steps),
            "learning_rate": torch.tensor(self.learning_rate, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state that covers this rank's rows; it may hold more rows than those.

        A state of a smaller catalog leaves the rows beyond it as they are.

        Raises:
            ValueError: a tensor is missing or too many, a shape disagrees, or rows are not covered.
        """
        self._check_state(state)
        start, num_old = int(state["first_row"]), int(state["num_rows"])
        first = self._table.first_row
        count = max(0, min(first + self._rows.shape[0], num_old) - first)
        with torch.no_grad():
            for name, target in self._row_states().items():
                target[:count].copy_(state[name][first - start : first - start + count])
        self.num_steps = int(state["num_steps"])
        self.learning_rate = float(state["learning_rate"])

    def describe(self) -> str:
        """The sharding plan: kernel, ranks, rows and bytes."""
        return self._table.describe(self.config.optimizer, self._row_states())

    def _row_states(self) -> dict[str, Tensor]:
        optimizer = {f"optimizer.{name}": value for name, value in self._update.states().items()}
        return {"rows": self._rows.detach()} | optimizer

    def _merge_sparse(self, gradient: Tensor | None) -> Tensor:
        """Pairs and a sparse gradient as one coalesced COO (R, D)."""
        pairs = list(self._table.pairs)
        if gradient is not None:
            # The public accessors refuse a tensor that is not coalesced yet.
            pairs.append((gradient._indices()[0], gradient._values()))
        rows, positions = torch.cat([rows for rows, _ in pairs]).unique(return_inverse=True)
        values = self._rows.new_zeros((rows.numel(), self.width), requires_grad=False)
        start = 0
        for part, gradients in pairs:
            values.index_add_(0, positions[start : start + part.numel()], gradients)
            start += part.numel()
        return _sparse_gradient(rows, values, self._rows.shape[0])

    def _describe_outside(self, local: Tensor) -> str:
        found = f"{local[0].item()} on this rank" if local.numel() else "an item on another rank"
        return (
            f"items must be in [0, {self.num_items}), got {found}; "
            "prepare the data and build the catalog from the same item list"
        )

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != (expected := self.state_dict()).keys():
            raise ValueError(
                f"state must hold {sorted(expected)}, got {sorted(state)}; "
                f"was it saved with another optimizer than {self.config.optimizer}?"
            )
        for name, target in self._row_states().items():
            if state[name].shape[1:] != target.shape[1:]:
                raise ValueError(
                    f"{name} must be of shape (rows, *{tuple(target.shape[1:])}), got "
                    f"{tuple(state[name].shape)}; build the catalog with the saved width"
                )
        start, num_old = int(state["first_row"]), int(state["num_rows"])
        first, stop = self._table.first_row, self._table.first_row + self._rows.shape[0]
        covered = start <= first and min(stop, num_old) <= start + state["rows"].shape[0]
        if num_old > self.num_items or (first < min(stop, num_old) and not covered):
            raise ValueError(
                f"state must cover rows [{first}, {stop}) of {self.num_items}, got "
                f"[{start}, {start + state['rows'].shape[0]}) of {num_old}; join the saved shards"
            )


def _check_shape(num_items: int, width: int) -> None:
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}; is the item list empty?")
    if width < 4 or width % 4:
        raise ValueError(
            f"width must be a positive multiple of 4, got {width}; use {-(-max(width, 1) // 4) * 4}"
        )


def _single_process_group(device: torch.device) -> dist.ProcessGroup:
    """The default group of one rank, made without a launcher where there is none."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise ValueError(
            f"group must be given where there are several ranks, got None among "
            f"{dist.get_world_size()}; pass torch.distributed.group.WORLD or a subgroup"
        )
    group = dist.group.WORLD
    assert group is not None
    return group


def _fill_initial_rows(rows: Tensor, first_row: int, seed: int, std: float) -> None:
    """Draws rows [first_row, ...) of the table that (seed, width, std) define."""
    digest = hashlib.blake2b(f"item rows {seed}".encode(), digest_size=4).digest()
    base = int.from_bytes(digest, "little")
    generator = torch.Generator()
    last_row = first_row + rows.shape[0]
    for block in range(first_row // INITIAL_BLOCK, -(-last_row // INITIAL_BLOCK)):
        generator.manual_seed((base + block) % 2**32)  # torch's CPU generator reads 32 bits
        values = torch.empty(INITIAL_BLOCK, rows.shape[1]).normal_(0, std, generator=generator)
        base_row = block * INITIAL_BLOCK
        start, stop = max(first_row, base_row), min(last_row, base_row + INITIAL_BLOCK)
        if start < stop:
            rows[start - first_row : stop - first_row] = values[start - base_row : stop - base_row]


def _build_update(config: CatalogConfig, table: ShardedTable) -> RowUpdate:
    if config.optimizer == "adam":
        return AdamUpdate(table.rows, config.betas, config.eps)
    if config.optimizer == "sparse_adam":
        return SparseAdamUpdate(table.rows, config.betas, config.eps)
    return FusedUpdate(table)


def _empty_gradient(rows: Tensor) -> Tensor:
    """A gradient that names no row."""
    none = torch.empty(0, dtype=torch.int64, device=rows.device)
    return _sparse_gradient(none, rows.new_empty((0, rows.shape[1])), rows.shape[0])


def _sparse_gradient(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """Coalesced COO from distinct sorted rows, nothing copied."""
    return torch.sparse_coo_tensor(
        rows[None],
        values,
        (num_rows, values.shape[1]),
        is_coalesced=True,
        check_invariants=False,
    )
