"""Estimate what a run costs each rank: bytes of memory, bytes of traffic, FLOP.

The formulas are next to the code they describe (``*_cost`` of the losses, ``saved_floats`` and
``encoder_flops`` of the encoder, ``state_floats`` of the optimizers); this file adds them up. On a
CPU a test compares the sums with measured peaks. For a GPU the same sums are not measured:
activations are counted in float32, though products in bfloat16 save less. Memory that an allocator
does not return to the system is not included, and a plan says so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.catalog_config import rows_at_once, state_floats
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder, encoder_flops, saved_floats
from shardrec.modules.memory import memory_bytes
from shardrec.pipeline.checkpoint.pinned import PINNED_BYTES
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.layout import choose_layout
from shardrec.pipeline.run.machine import AttributeCounts, Machine

__all__ = ["AttributeCounts", "Machine", "Plan", "count_parameters", "plan", "readable_bytes"]

# (N, D) tensors in addition to those saved for backward: states, gradients of two layers, masks.
PASSING_TENSORS = 8
# Bytes of libraries that the first step loads, and of small tensors.
FIRST_STEP_BYTES = 6 << 20
# Rows composed of attributes at a time, and copies of them.
COMPOSED_ROWS, COMPOSED_COPIES = 8_192, 4
# Printed with a peak: it counts tensors, and an allocator keeps some of what was freed.
CONDITION = {
    "cpu": "The peak holds where freed blocks go back to the system, as with\n"
    "MALLOC_MMAP_THRESHOLD_=1000000. By default glibc keeps blocks of up to 32 MB:\n"
    "activations may then hold a third more.",
    "cuda": "The peak is a sum of tensors, not measured on a GPU. What PyTorch's allocator\n"
    "keeps of freed blocks comes on top.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Costs of one step on the busiest rank.

    Attributes:
        num_items: V.
        condition: a sentence on when the peak holds.
        memory: bytes by term; "gradient" is that of the table.
        peak_bytes: most bytes in use at once; below the sum, as not all terms coexist.
        layout: a sentence on replicas and shards.
        moved: bytes received from other ranks, by part; only gradients of encoder, attributes and
            replicas cross replicas.
        traffic: bytes that the loss reads from memory and writes to it, by part; what stays in a
            cache is not moved so often.
        flops: FLOP of matrix products, by part.
        host_bytes: host memory for the copy that a checkpoint is written from; 0 on a CPU.
        batch_bytes: host memory for the batch in use and the next one; 0 on a CPU.
        memorized_bytes: of a memory of item pairs beside the model, in ranking, not in training.
        largest_num_items: the largest catalog that fits; None where no memory was given.
    """

    num_items: int
    condition: str
    layout: str
    memory: Mapping[str, int]
    peak_bytes: int
    moved: Mapping[str, float]
    traffic: Mapping[str, float]
    flops: Mapping[str, float]
    host_bytes: int = 0
    batch_bytes: int = 0
    memorized_bytes: int = 0
    largest_num_items: int | None = None

    @property
    def dominant(self) -> str:
        """Name of the largest memory term."""
        return max(self.memory, key=self.memory.__getitem__)

    def describe(self) -> str:
        """The plan as a table."""
        rows = [("memory of a rank", ""), *((n, readable_bytes(b)) for n, b in self.memory.items())]
        rows += [("peak", readable_bytes(self.peak_bytes)), ("dominated by", self.dominant)]
        if self.host_bytes:
            rows += [("host memory for a checkpoint", readable_bytes(self.host_bytes))]
        if self.batch_bytes:
            rows += [("host memory for batches", readable_bytes(self.batch_bytes))]
        if self.memorized_bytes:
            rows += [("item pairs, in ranking only", readable_bytes(self.memorized_bytes))]
        rows += [("", ""), ("from other ranks in a step", "")]
        rows += [(name, readable_bytes(value)) for name, value in self.moved.items()]
        rows += [("", ""), ("read and written in a step", "")]
        rows += [(name, readable_bytes(value)) for name, value in self.traffic.items()]
        rows += [("", ""), ("FLOP in a step", "")]
        rows += [(name, f"{value:,.3g}") for name, value in self.flops.items()]
        if self.largest_num_items is not None:
            rows += [("", ""), ("largest catalog that fits", f"{self.largest_num_items:,} items")]
        table = "\n".join(f"{name:<30}{value:>20}".rstrip() for name, value in rows)
        return f"{self.layout}\n\n{table}\n\n{self.condition}"


def plan(
    config: TrainConfig,
    num_items: int,
    machine: Machine,
    attributes: AttributeCounts | None = None,
) -> Plan:
    """Costs of ``config`` over a catalog of ``num_items`` on ``machine``.

    Args:
        config: the config of the run; ``data`` and ``output`` are ignored.
        num_items: V.
        machine: ranks and memory.
        attributes: sizes of the items' attributes; None if they are not used.

    Raises:
        ValueError: the catalog is empty, ``attributes`` does not go with the config, or the ranks
            cannot be laid out as it says.
    """
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}; count the items")
    attributes = attributes or AttributeCounts()
    attributes.check(config.catalog)
    made = _Planner(config, machine, attributes)
    largest = None if machine.memory_gb is None else made.largest(int(machine.memory_gb * 1e9))
    memory, peak = made.memory(num_items)
    return Plan(
        num_items=num_items,
        condition=CONDITION[machine.device],
        layout=made.layout.describe(config.optimizer.accumulate),
        memory=memory,
        peak_bytes=peak,
        moved=made.moved(num_items),
        traffic={"loss": made.turns * config.loss.cost(made.work(num_items)).work.bytes},
        flops=made.flops(num_items),
        host_bytes=0 if made.on_cpu else made.host_copy(num_items),
        batch_bytes=0 if made.on_cpu else made.batches(),
        memorized_bytes=made.memorized(num_items),
        largest_num_items=largest,
    )


def count_parameters(config: EncoderConfig) -> int:
    """Number of weights of an encoder; none of them is allocated.

    Raises:
        ValueError: the number does not fit into 64 bits.
    """
    block = dataclasses.replace(config, num_blocks=1)
    try:
        with torch.device("meta"):
            sizes = {n: one.numel() for n, one in TransformerEncoder(block).named_parameters()}
    except RuntimeError as error:
        raise ValueError(
            f"encoder must be of sizes that a machine can hold, got width {config.width}, "
            f"max_length {config.max_length} and hidden {config.resolved_hidden}; lower them"
        ) from error
    of_block = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    return sum(sizes.values()) + (config.num_blocks - 1) * of_block


class _Planner:
    """The sums, for a config, a machine and attributes."""

    def __init__(self, config: TrainConfig, machine: Machine, attributes: AttributeCounts) -> None:
        self.config, self.machine, self.attributes = config, machine, attributes
        self.on_cpu = machine.device == "cpu"
        accumulate = config.optimizer.accumulate
        self.layout = choose_layout(config.parallel.shards, accumulate, machine.ranks, None)
        self.turns = self.layout.turns(accumulate)
        self.width, self.length = config.encoder.width, config.encoder.max_length
        sequences = config.batches.batch_size
        # The encoder sees hardly any padding (``LengthGroups``).
        self.own_positions = -(-sequences // self.layout.num_shards) * self.length * machine.filled
        self.num_positions = round(sequences * self.length * machine.filled)
        vectors = attributes.attribute_values + attributes.attribute_numbers
        self.of_attributes = vectors * self.width
        self.parameters = count_parameters(config.encoder)
        self.is_averaged = config.optimizer.ema_decay > 0
        # A GPU counts as one of compute capability 8.0 or more: there may be none here to ask.
        precision = config.precision
        self.in_bfloat16 = precision == "bfloat16" or (precision == "auto" and not self.on_cpu)

    @property
    def state_floats(self) -> int:
        """Floats of optimizer state a row; rows composed of attributes alone have none."""
        config = self.config.catalog
        return 0 if config.attributes == "only" else state_floats(config.optimizer, self.width)

    def work(self, num_items: int) -> Workload:
        return Workload(
            num_positions=self.num_positions,
            num_items=num_items,
            num_ranks=self.layout.num_shards,
            width=self.width,
            element_bytes=2 if self.in_bfloat16 else 4,
            is_cast=self.in_bfloat16,
            on_cpu=self.on_cpu,
        )

    def memory(self, num_items: int) -> tuple[dict[str, int], int]:
        """Bytes by term, and the most at once: in the loss, or in the update."""
        work = self.work(num_items)
        cost = self.config.loss.cost(work)
        table, state = 4 * work.num_rows * self.width, 4 * work.num_rows * self.state_floats
        gradient, update = self._update(cost, work)
        terms = {
            "libraries": int(self.machine.libraries_gb * 1e9) + FIRST_STEP_BYTES,
            "table": table,
            "optimizer state": state,
            "gradient": gradient,
            "encoder": 5 * 4 * self.parameters,  # weights, gradients twice, two moments
            **self._averages(work),
            **self._attributes(work),
            # An int64 of the whole catalog on every rank, whatever its shard.
            "item counts": 8 * num_items + cost.table_bytes,
            "activations": self._activations(),
            "loss workspace": cost.workspace_bytes + self._unit_rows(work),
            "update workspace": update,
            "checkpoint copy": self.checkpoint_copy(num_items) * self.on_cpu,
        }
        either = {"activations", "loss workspace"}, {"update workspace", "composing"}
        always = sum(value for name, value in terms.items() if name not in either[0] | either[1])
        return terms, always + max(sum(terms.get(name, 0) for name in names) for names in either)

    def checkpoint_copy(self, num_items: int) -> int:
        """Bytes of host memory for the copy that a background checkpoint is written from."""
        has_ids = self.config.catalog.attributes != "only"
        copies = 1 + self.is_averaged
        floats = copies * self.width * has_ids + self.state_floats
        encoder = (copies + 2) * 4 * (self.parameters + self.of_attributes)  # and two moments
        rows = -(-self.work(num_items).num_rows // self.layout.num_replicas)
        copy = 4 * rows * floats + encoder
        return copy * self.config.checkpoints.background

    def host_copy(self, num_items: int) -> int:
        """Bytes of host memory for the copy of a GPU's state, with the buffers on the way there."""
        copy = self.checkpoint_copy(num_items)
        return copy and copy + PINNED_BYTES

    def batches(self) -> int:
        """Bytes of two batches: items, targets, weights and the indices of real positions."""
        sequences = -(-self.config.batches.batch_size // self.layout.num_shards)
        return 2 * sequences * self.length * (8 + 8 + 4 + 8)

    def memorized(self, num_items: int) -> int:
        """Bytes of the memory beside the model; 0 without one."""
        neighbors, shards = self.machine.neighbors, self.layout.num_shards
        return memory_bytes(num_items, neighbors, shards) if neighbors else 0

    def largest(self, memory_bytes: int) -> int:
        """The largest catalog with a peak within ``memory_bytes``, by bisection; 0 for none."""
        low, high = 0, 1
        while self.memory(high)[1] <= memory_bytes:
            low, high = high, 2 * high
        while high - low > max(1, low // 10_000):
            middle = (low + high) // 2
            fits = self.memory(middle)[1] <= memory_bytes
            low, high = (middle, high) if fits else (low, middle)
        return low

    def moved(self, num_items: int) -> dict[str, float]:
        """Bytes received from other ranks, for all batches of a step."""
        own, others = self.num_positions / self.layout.num_shards, 1 - 1 / self.layout.num_shards
        vectors = 4.0 * own * self.width * others
        of_batch = {
            "ids and vectors looked up": 8.0 * own * others + vectors,
            "gradients of vectors": vectors,
            **self.config.loss.cost(self.work(num_items)).received,
        }
        others = 1 - 1 / self.machine.ranks
        sums = self._replica_sum(num_items) if self.layout.num_replicas > 1 else None
        return {
            **{name: self.turns * value for name, value in of_batch.items()},
            "encoder gradients": 2 * 4.0 * self.parameters * others,
            **self._attribute_gradients(others),
            **({} if sums is None else {"row gradients of replicas": sums}),
        }

    def _replica_sum(self, num_items: int) -> float:
        """As ``Replicas.sum_gradients`` does it: dense, or by pairs where these are fewer bytes."""
        work, copies = self.work(num_items), self.layout.num_replicas
        cost, dense = self.config.loss.cost(work), 2 * (1 - 1 / copies) * work.num_rows
        if cost.is_dense:
            return dense * 4 * self.width
        touched = min(work.num_rows, self.turns * (cost.touched_rows + work.own_positions))
        pairs = (copies - 1) * touched * (8 + 4.0 * self.width)
        return min(pairs, dense * (4 + 4 * self.width))

    def flops(self, num_items: int) -> dict[str, float]:
        """FLOP of matrix products, forward and backward."""
        encoder = self.own_positions * encoder_flops(self.config.encoder, self.length)
        loss = self.config.loss.cost(self.work(num_items)).flops
        return {"encoder": self.turns * encoder, "loss": self.turns * loss}

    def _averages(self, work: Workload) -> dict[str, int]:
        """Bytes of the averages of all weights."""
        has_ids = self.config.catalog.attributes != "only"
        floats = work.num_rows * self.width * has_ids + self.parameters + self.of_attributes
        return {"averaged weights": 4 * floats} if self.is_averaged else {}

    def _attributes(self, work: Workload) -> dict[str, int]:
        """Bytes of codes and vectors, of composed rows, and of composing them."""
        mode, counts, row = self.config.catalog.attributes, self.attributes, 4 * self.width
        if mode == "none":
            return {}
        # Codes with their shares, vectors, an offset, and whether the item has training events.
        item = 8 * counts.attribute_codes + 4 * counts.attribute_numbers + 8 + 1
        block = min(work.num_rows, COMPOSED_ROWS)
        return {
            "attributes": round(item * work.num_rows) + 5 * 4 * self.of_attributes,
            "composed rows": work.num_rows * row * (mode == "add"),
            "composing": block * round(item + COMPOSED_COPIES * row) + 4 * self.of_attributes,
        }

    def _attribute_gradients(self, others: float) -> dict[str, float]:
        moved = 2 * 4.0 * self.of_attributes * others
        return {"attribute gradients": moved} if self.of_attributes else {}

    def _activations(self) -> int:
        kept = saved_floats(self.config.encoder, self.length, on_cpu=self.on_cpu)
        return round(4 * self.own_positions * (kept + PASSING_TENSORS * self.width))

    def _update(self, cost: LossCost, work: Workload) -> tuple[int, int]:
        """Bytes of the table's gradient, and of merging and applying it."""
        row = 4 * self.width
        if cost.is_dense:
            return work.num_rows * row, self._range_copy(work.num_rows)
        merged = min(work.num_rows, cost.touched_rows + work.own_positions) * (row + 8)
        gradient, copies = cost.touched_rows * (row + 8), self.layout.num_replicas
        if copies > 1:  # the pairs of all replicas, or the shard
            merged += min(copies * merged, work.num_rows * (row + 8))
        if self.config.catalog.optimizer == "adam":  # it updates every row, by a dense gradient
            return gradient, max(merged, work.num_rows * row + merged - gradient)
        return gradient, merged + self._range_copy(cost.touched_rows)

    def _range_copy(self, rows: int) -> int:
        """Bytes of what fbgemm reads and sorts of the rows that are updated at a time, on a GPU."""
        if self.on_cpu or self.config.catalog.optimizer == "adam":
            return 0
        return 2 * 4 * self.width * min(rows, rows_at_once(rows, self.width, "cuda"))

    def _unit_rows(self, work: Workload) -> int:
        """The rows at unit length, and their gradient on its way to the table's."""
        cost = self.config.loss.cost(work)
        rows = work.num_rows if cost.is_dense else cost.touched_rows
        return 2 * 4 * rows * self.width * self.config.loss.normalize


def readable_bytes(value: float) -> str:
    """A number of bytes as readable text.

    Example:
        >>> readable_bytes(1536), readable_bytes(2.5e9)
        ('1.5 kB', '2.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:.0f} B"
