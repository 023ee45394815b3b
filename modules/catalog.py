"""The item table: sharded by rows over the ranks, looked up by item, updated once per step.

The phases of a training step:

1. ``begin_lookup`` or ``lookup``: all-to-all of item ids and of vectors, the encoder's input;
2. backward: the gradients of the look-up are recorded as (row, gradient) pairs, and those of the
   loss are accumulated in ``shard.rows.grad``; no row changes yet;
3. ``merge_gradients``: both are summed on the rank that owns the row, and
   ``squared_gradient_norm`` sums over replicas (``modules/replicas.py``), if there are any, and
   gives this rank's part of the norm for clipping;
4. ``step``: one optimizer update for each row.

With attributes (``modules/attributes.py``) look-up and loss see rows composed of the table's and of
the attributes' vectors, and the first ``squared_gradient_norm`` or ``step`` after the last
micro-batch takes their gradient back to both. ``begin_step`` says which rows leave their own out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrec.kernels.shard import RowShard
from shardrec.modules.attributes import ComposedRows, ItemAttributes, check_attributes
from shardrec.modules.catalog_config import CatalogConfig, check_shape
from shardrec.modules.initial_rows import fill_initial_rows
from shardrec.modules.replicas import Replicas
from shardrec.modules.row_updates import build_update, empty_gradient, merged_pairs
from shardrec.modules.torchrec_adapter import FUSED_OPTIMIZERS, ShardedTable, group_of_one

__all__ = ["Catalog"]


class Catalog:
    """A (V, D) table of item vectors; this rank holds rows [first_row, first_row + R).

    Every rank of ``group`` must make the same calls of ``lookup`` and run backward through each
    result (a rank without items looks up an empty tensor). ``merge_gradients`` has no collectives,
    and ``step`` none without replicas. Gradients are summed and not averaged, as losses expect.

    Attributes:
        beside_rows: further (R, D) tensors by name, stored and loaded with the rows.
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
        attributes: ItemAttributes | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        """Creates this rank's rows; initial values depend on (seed, item), not on the rank.

        Args:
            num_items: V, at least 1. With more ranks than rows, some ranks hold none.
            width: D, a multiple of 4.
            config: optimizer and initial scale.
            group: the ranks that share the table; None for one process, with or without a
                launcher (a default process group of one rank is made if there is none).
            device: device of the rows.
            seed: seed of the initial rows.
            attributes: of the items; needed unless ``config.attributes`` is "none".
            replicas: copies of the table on other ranks; None for one copy.
        """
        check_shape(num_items, width)
        check_attributes(config, attributes)
        self.config = config
        self.device = device
        self.num_items = num_items
        self.width = width
        self.replicas = replicas
        self.num_steps = 0
        self.beside_rows: dict[str, Tensor] = {}
        self.learning_rate = config.learning_rate
        self._group = group_of_one(device) if group is None else group
        optimizer = "sgd" if config.attributes == "only" else config.optimizer
        fused = optimizer if optimizer in FUSED_OPTIMIZERS else "sgd"
        self._table = ShardedTable(
            num_items, width, optimizer=fused, eps=config.eps, group=self._group, device=device
        )
        fill_initial_rows(self._table.rows, self._table.first_row, seed, config.init_std)
        self._update = build_update(optimizer, config, self._table)
        self._composed = ComposedRows.of(config, self._table, attributes, seed)
        self._is_fresh = self._is_complete = False
        rows = self._table.rows if self._composed is None else self._composed.rows
        self._rows = rows.requires_grad_()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the table; None for one process."""
        return None if dist.get_world_size(self._group) == 1 else self._group

    @property
    def all_ranks(self) -> dist.ProcessGroup | None:
        """The ranks of all replicas; None for one process."""
        return self.group if self.replicas is None else self.replicas.all_ranks

    @property
    def shard(self) -> RowShard:
        """This rank's rows as input of a loss: a leaf that aliases the table and gets gradients.

        With attributes its rows are the composed ones.
        """
        if self._composed is not None and not self._is_fresh:
            self._composed.compose()
            self._is_fresh = True
        return self._as_shard()

    @property
    def attributes(self) -> nn.Module:
        """The attribute vectors, replicated on every rank; a module without parameters if unused.

        The owner of their optimizer must sum their gradients over the ranks, after
        ``squared_gradient_norm``.
        """
        return nn.Module() if self._composed is None else self._composed.vectors

    def begin_step(self, seed: int, step: int) -> None:
        """Drops the table rows of a random share of items until ``step`` or ``zero_grad``.

        ``catalog.id_dropout`` is the share; the choice depends on (seed, step, item), not on the
        rank. Does nothing without attributes.

        Collectives: none.
        """
        if self._composed is not None:
            self._composed.drop_ids(self.config.id_dropout, seed=seed, step=step)
            self._is_fresh = False

    def shard_for(self, used_rows: Callable[[RowShard], Tensor | None]) -> RowShard:
        """``shard``, with at least the rows up to date that a loss will read.

        With attributes, this avoids composing the other rows.

        Args:
            used_rows: function that returns the (n,) int64 rows of the shard that will be read, or
                None for all; called only if rows are composed.

        Collectives: those of ``used_rows``.
        """
        shard = self._as_shard()
        used = None if self._composed is None else used_rows(shard)
        if self._composed is None or used is None:
            return self.shard
        if not self._is_fresh:
            self._composed.compose(used)
        return shard

    @property
    def row_range(self) -> range:
        """The range of global item indices that this rank holds."""
        return range(self._table.first_row, self._table.first_row + self._rows.shape[0])

    def lookup(self, items: Tensor) -> Tensor:
        """(M, D) float32 vectors of ``items``; differentiable.

        Args:
            items: (M,) int64 global item indices; M may be 0 and differ by rank.

        Returns:
            (M, D) float32.

        Raises:
            ValueError: an item is outside [0, V) on any rank (raised on all of them).
            TypeError: ``items`` is not int64.

        Collectives: one all-reduce of a number, an all-to-all each of ids and of vectors; in
        backward an all-to-all of gradients.
        """
        return self.begin_lookup(items)()

    def begin_lookup(self, items: Tensor) -> Callable[[], Tensor]:
        """Starts a look-up by sending the ids; returns a function that returns the (M, D) vectors.

        Work between the two calls overlaps with the all-to-all of ids. The returned function may be
        called once, reads the table at that time, and raises the errors of ``lookup``.

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
        """Sums look-up gradients and loss gradients into ``shard.rows.grad``, one entry per row.

        Afterwards the gradient is None, dense (R, D) or coalesced sparse COO. More micro-batches
        may follow; ``step`` and ``squared_gradient_norm`` merge again.

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
        """() float32 squared L2 norm of this rank's merged gradient; 0 if there is none.

        The sum over all ranks is the squared norm of the whole table's gradient: replicas but the
        first return 0. With attributes this is of the ids, and the gradient of ``attributes`` is
        complete on this rank. With attributes or replicas no micro-batch may follow.

        Collectives: those of ``Replicas.sum_gradients``, once a step.
        """
        self._complete_gradient()
        gradient = self._rows.grad
        if gradient is None or (self.replicas is not None and self.replicas.index):
            return torch.zeros((), device=self.device)
        values = gradient.values() if gradient.is_sparse else gradient
        return torch.linalg.vector_norm(values).square()

    def step(self, scale: float | Tensor = 1.0, learning_rate: float | None = None) -> None:
        """Updates the rows in place by the merged gradient, each at most once, and clears it.

        Args:
            scale: factor of the gradient, e.g. for clipping by the global norm.
            learning_rate: learning rate of this step and all later ones; None keeps the last one.

        Collectives: as ``squared_gradient_norm``, unless that was called in this step.
        """
        self._complete_gradient()
        if learning_rate is not None:
            self.learning_rate = learning_rate
        gradient = self._rows.grad
        if gradient is None:
            gradient = empty_gradient(self._rows)
        self._end_step()
        self.num_steps += 1
        with torch.no_grad():
            if isinstance(scale, Tensor) or scale != 1.0:
                (gradient.values() if gradient.is_sparse else gradient).mul_(scale)
            self._update.apply(gradient, self.learning_rate, self.num_steps)

    def zero_grad(self) -> None:
        """Drops all gradients since the last step, including recorded pairs."""
        self._table.pairs.clear()
        self._end_step()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's rows and optimizer state, as plain tensors that alias the live ones.

        Keys: ``rows`` (R, D), or (R, 0) with attributes alone; ``optimizer.<name>`` (R,) or (R, D);
        and the () int64 or float64 numbers ``first_row``, ``num_rows``, ``num_steps`` and
        ``learning_rate``. Rows and optimizer states, concatenated over consecutive ranks, are the
        state of a table on fewer ranks.
        """
        return self._row_states() | {
            "first_row": torch.tensor(self._table.first_row),
            "num_rows": torch.tensor(self.num_items),
            "num_steps": torch.tensor(self.num_steps),
            "learning_rate": torch.tensor(self.learning_rate, dtype=torch.float64),
        }

    def stored_state(self) -> dict[str, Tensor]:
        """This rank's part of ``state_dict``: the replicas of a shard save some of its rows each.

        Raises:
            RuntimeError: the replicas differ; raised on all ranks.

        Collectives: those of ``Replicas.require_equal``.
        """
        state = self.state_dict()
        if self.replicas is None:
            return state
        self.replicas.require_equal(value for value in state.values() if value.ndim)
        own = self.replicas.part(self._rows.shape[0])
        parts = {name: value[own] if value.ndim else value for name, value in state.items()}
        return parts | {"first_row": state["first_row"] + own.start}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies this rank's rows and optimizer state from a state that covers them.

        The state may also have rows of other ranks. If it is of a smaller catalog, the rows beyond
        its last one stay unchanged.

        Raises:
            ValueError: keys are missing or unknown, a shape disagrees, or rows are not covered.
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
        self._is_fresh = False

    def describe(self) -> str:
        """The sharding plan as text: kernel, ranks, rows and bytes."""
        text = self._table.describe(self.config.optimizer, self._row_states())
        return text if self.replicas is None else f"{self.replicas.count} replicas of this\n{text}"

    def _row_states(self) -> dict[str, Tensor]:
        optimizer = {f"optimizer.{name}": value for name, value in self._update.states().items()}
        rows = self._table.rows.detach()
        rows = rows[:, :0] if self.config.attributes == "only" else rows
        return {"rows": rows} | self.beside_rows | optimizer

    def _as_shard(self) -> RowShard:
        return RowShard(
            rows=self._rows,
            first_row=self._table.first_row,
            num_rows=self.num_items,
            group=self.group,
        )

    def _complete_gradient(self) -> None:
        """Merges the gradient; once a step takes it back to the ids and sums it over replicas."""
        self.merge_gradients()
        if self._is_complete:
            return
        if self._composed is not None:
            self._rows.grad = self._composed.pull_back(self._rows.grad)
        if self.replicas is not None:
            self._rows.grad = self.replicas.sum_gradients(self._rows.grad, self._rows)
        self._is_complete = self._composed is not None or self.replicas is not None

    def _end_step(self) -> None:
        self._rows.grad = None
        self._is_fresh = self._is_complete = False
        if self._composed is not None:
            self._composed.keep_ids()

    def _merge_sparse(self, gradient: Tensor | None) -> Tensor:
        """The recorded pairs and a sparse gradient, summed as one coalesced COO (R, D)."""
        pairs = list(self._table.pairs)
        if gradient is not None:
            # The public accessors raise an error for a tensor that is not coalesced.
            pairs.append((gradient._indices()[0], gradient._values()))
        return merged_pairs(pairs, self._rows)

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
