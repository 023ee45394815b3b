"""Estimates of what a run costs each rank: bytes of memory, bytes of traffic, FLOP.

The formulas are next to the code they describe (``*_cost`` of the losses, ``saved_floats`` and
``encoder_flops`` of the encoder, ``state_floats`` of the optimizers); this file adds them up. On a
CPU a test compares the sums with measured peaks. For a GPU they are the same sums, not measured:
activations are counted in float32, though products in bfloat16 keep less. Memory that an allocator
does not give back is not included, and a plan says so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.catalog_config import state_floats
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder, encoder_flops, saved_floats
from shardrec.pipeline.run.config import TrainConfig

__all__ = ["Machine", "Plan", "count_parameters", "plan", "readable_bytes"]

# (N, D) tensors in addition to those saved for backward: states, gradients of two layers, masks.
PASSING_TENSORS = 8
# Bytes of libraries that the first step loads, and of small tensors.
FIRST_STEP_BYTES = 6 << 20
# Printed with a peak: it counts tensors, and an allocator keeps some of what was freed.
CONDITION = {
    "cpu": "The peak holds where freed blocks go back to the system, as with\n"
    "MALLOC_MMAP_THRESHOLD_=1000000. By default glibc keeps blocks of up to 32 MB:\n"
    "activations may then hold a third more.",
    "cuda": "The peak is a sum of tensors, not measured on a GPU. What PyTorch's allocator\n"
    "keeps of freed blocks comes on top.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The ranks that share a run, and the memory of each.

    Attributes:
        ranks: W, workers in one sharding group.
        memory_gb: of each rank, in 10**9 bytes; none: no largest catalog is computed.
        device: "cpu" or "cuda".
        filled: share of the positions of a batch that are real and not padding.
        libraries_gb: what a process or a CUDA context holds before the model is built, in 10**9
            bytes.
    """

    ranks: int = 1
    memory_gb: float | None = None
    device: str = "cpu"
    filled: float = 1.0
    libraries_gb: float = 0.6

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}; count the workers")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}; choose one")
        if not 0 < self.filled <= 1:
            raise ValueError(f"filled must be in (0, 1], got {self.filled}; 1 is no padding")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise ValueError(f"memory_gb must be above 0, got {self.memory_gb}; or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Costs of one step on the busiest rank.

    Attributes:
        num_items: V.
        condition: a sentence on when the peak holds.
        memory: bytes by term; "gradient" is that of the table.
        peak_bytes: most bytes in use at once; below the sum, as not all terms coexist.
        moved: bytes received from other ranks, by part.
        traffic: bytes that the loss reads from memory and writes to it, by part; what stays in a
            cache is not moved so often.
        flops: FLOP of matrix products, by part.
        host_bytes: host memory for the copy that a checkpoint is written from; 0 on a CPU.
        largest_num_items: the largest catalog that fits; None where no memory was given.
    """

    num_items: int
    condition: str
    memory: Mapping[str, int]
    peak_bytes: int
    moved: Mapping[str, float]
    traffic: Mapping[str, float]
    flops: Mapping[str, float]
    host_bytes: int = 0
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
        rows += [("", ""), ("from other ranks in a step", "")]
        rows += [(name, readable_bytes(value)) for name, value in self.moved.items()]
        rows += [("", ""), ("read and written in a step", "")]
        rows += [(name, readable_bytes(value)) for name, value in self.traffic.items()]
        rows += [("", ""), ("FLOP in a step", "")]
        rows += [(name, f"{value:,.3g}") for name, value in self.flops.items()]
        if self.largest_num_items is not None:
            rows += [("", ""), ("largest catalog that fits", f"{self.largest_num_items:,} items")]
        table = "\n".join(f"{name:<30}{value:>20}".rstrip() for name, value in rows)
        return f"{table}\n\n{self.condition}"


def plan(config: TrainConfig, num_items: int, machine: Machine) -> Plan:
    """Costs of ``config`` over a catalog of ``num_items`` on ``machine``.

    Args:
        config: of the run; data and output are not looked at.
        num_items: V.
        machine: ranks and memory.

    Raises:
        ValueError: the catalog is empty.
    """
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}; count the items")
    made = _Planner(config, machine)
    largest = None if machine.memory_gb is None else made.largest(int(machine.memory_gb * 1e9))
    memory, peak = made.memory(num_items)
    return Plan(
        num_items=num_items,
        condition=CONDITION[machine.device],
        memory=memory,
        peak_bytes=peak,
        moved=made.moved(num_items),
        traffic={"loss": config.loss.cost(made.work(num_items)).work.bytes},
        flops=made.flops(num_items),
        host_bytes=0 if made.on_cpu else made.checkpoint_copy(num_items),
        largest_num_items=largest,
    )


def count_parameters(config: EncoderConfig) -> int:
    """Number of weights of an encoder, counted without memory for them.

    Raises:
        ValueError: they are more than 64 bits count.
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
    """The sums, for a config and a machine."""

    def __init__(self, config: TrainConfig, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.on_cpu = machine.device == "cpu"
        self.width, self.length = config.encoder.width, config.encoder.max_length
        sequences = config.batches.batch_size
        self.slots = -(-sequences // machine.ranks) * self.length
        self.num_positions = round(sequences * self.length * machine.filled)
        self.parameters = count_parameters(config.encoder)

    def work(self, num_items: int) -> Workload:
        return Workload(
            num_positions=self.num_positions,
            num_items=num_items,
            num_ranks=self.machine.ranks,
            width=self.width,
            on_cpu=self.on_cpu,
        )

    def memory(self, num_items: int) -> tuple[dict[str, int], int]:
        """Bytes by term, and the most at once: in the loss, or in the update."""
        work = self.work(num_items)
        cost = self.config.loss.cost(work)
        floats = state_floats(self.config.catalog.optimizer, self.width)
        table, state = 4 * work.num_rows * self.width, 4 * work.num_rows * floats
        gradient, update = self._update(cost, work)
        terms = {
            "libraries": int(self.machine.libraries_gb * 1e9) + FIRST_STEP_BYTES,
            "table": table,
            "optimizer state": state,
            "gradient": gradient,
            "encoder": 5 * 4 * self.parameters,  # weights, gradients twice, two moments
            # An int64 of the whole catalog on every rank, whatever its shard.
            "item counts": 8 * num_items + cost.table_bytes,
            "activations": self._activations(),
            "loss workspace": cost.workspace_bytes + self._unit_rows(work),
            "update workspace": update,
            "checkpoint copy": self.checkpoint_copy(num_items) * self.on_cpu,
        }
        either = {"activations", "loss workspace"}, {"update workspace"}
        always = sum(value for name, value in terms.items() if name not in either[0] | either[1])
        return terms, always + max(sum(terms[name] for name in names) for names in either)

    def checkpoint_copy(self, num_items: int) -> int:
        """Bytes of host memory for the copy that a background checkpoint is written from."""
        floats = self.width + state_floats(self.config.catalog.optimizer, self.width)
        encoder = 3 * 4 * self.parameters  # weights, two moments
        copy = 4 * self.work(num_items).num_rows * floats + encoder
        return copy * self.config.checkpoints.background

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
        """Bytes received from other ranks."""
        own, others = self.num_positions / self.machine.ranks, 1 - 1 / self.machine.ranks
        vectors = 4.0 * own * self.width * others
        return {
            "ids and vectors looked up": 8.0 * own * others + vectors,
            "gradients of vectors": vectors,
            **self.config.loss.cost(self.work(num_items)).received,
            "encoder gradients": 2 * 4.0 * self.parameters * others,
        }

    def flops(self, num_items: int) -> dict[str, float]:
        """FLOP of matrix products, forward and backward."""
        return {
            "encoder": self.slots * encoder_flops(self.config.encoder, self.length),
            "loss": self.config.loss.cost(self.work(num_items)).flops,
        }

    def _activations(self) -> int:
        kept = saved_floats(self.config.encoder, self.length, on_cpu=self.on_cpu)
        return round(4 * self.slots * (kept + PASSING_TENSORS * self.width))

    def _update(self, cost: LossCost, work: Workload) -> tuple[int, int]:
        """Bytes of the table's gradient, and of merging and applying it."""
        row = 4 * self.width
        if cost.is_dense:
            return work.num_rows * row, 0
        merged = min(work.num_rows, cost.touched_rows + work.own_positions) * (row + 8)
        gradient = cost.touched_rows * (row + 8)
        if self.config.catalog.optimizer == "adam":  # it updates every row, by a dense gradient
            return gradient, max(merged, work.num_rows * row + merged - gradient)
        return gradient, merged

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
