"""Compile the Triton kernels for a GPU, without one, and count the resources they use."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from compiled.instructions import (
    bytes_read,
    loop_code,
    main_loop,
    matrix_products,
    scalar_products,
)
from compiled.least_work import LeastWork, least_work
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardrec.kernels.block_logsumexp.gpu import add_rows as gpu_add_rows
from shardrec.kernels.block_logsumexp.gpu import full as gpu_full
from shardrec.kernels.block_logsumexp.gpu import gathered as gpu_gathered
from shardrec.kernels.block_logsumexp.gpu import listed as gpu_listed
from shardrec.kernels.block_logsumexp.gpu import tables as gpu_tables
from shardrec.kernels.block_logsumexp.gpu import targets as gpu_targets
from shardrec.kernels.device.backend import alignment
from shardrec.kernels.device.tiles import Tile, tile_for
from shardrec.kernels.hash_chunks import gpu as gpu_hash
from shardrec.kernels.negatives import gpu as negatives_gpu
from shardrec.kernels.select import gpu as select_gpu

__all__ = ["ARCHITECTURES", "MAX_SHARED_BYTES", "Build", "Case", "build", "shipped_cases"]

ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may use, by architecture.
MAX_SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448, 100: 232448}

_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS_TO_FLOAT = (
    "partials logsumexp grad_logsumexp scale grad_states grad_rows offsets source weights total "
    "signs shares logits"
).split()
# Chunks of rows have a dtype of one byte too, where there are at most 256.
_POINTERS_TO_INT = dict.fromkeys(("item_chunks", "best", "in_order", "chunks"), "*i16")
_POINTERS_TO_INT["position_chunks"] = "*i32"
_OPERANDS = ("states", "rows", "queries", "vectors", "directions")
_NUMBERS_64 = "first_entry end_entry first_row first_line seed step stream bound".split()
_NUMBERS = ("width", "reach", "round_of_all", "first_round")


Constants = dict[str, int | bool | str | None]


@dataclass(frozen=True, slots=True)
class Build:
    """The resources that one kernel uses on one architecture.

    Attributes:
        registers: Of a thread.
        spilled_bytes: Stores to local memory, of a thread, as ptxas counts them.
        shared_bytes: Of a program.
        matrix_instruction: The widest kind present, "" where there is none.
        multiply_adds: Of a program in one turn of its loops: of matrix instructions where there
            are any, of IEEE float32 elsewhere.
        num_products: Instructions that do them, of a warp; of one thread for the whole program
            where it starts a product alone (tcgen05).
        bytes_read: From global memory by a program in one turn of its loops.
        ptxas: Version of the assembler.
        ptx: The code itself.
        machine_code: What the assembler made of it.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str
    multiply_adds: int
    num_products: int
    bytes_read: int
    ptxas: str
    ptx: str
    machine_code: bytes

    @property
    def loop_instructions(self) -> int:
        """Machine instructions of the longest loop, of a thread; disassembles the code."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.machine_code)
            file.flush()
            command = [_tool("cuobjdump"), "-sass", file.name]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
        return main_loop(run.stdout)


def build(
    kernel: triton.JITFunction,
    tile: Tile,
    constants: Constants,
    *,
    width: int,
    dtype: torch.dtype,
    architecture: int,
) -> Build:
    """The kernel compiled and assembled for one architecture.

    Args:
        kernel: A kernel of this package; the types of its arguments follow from their names.
        tile: Warps and stages.
        constants: Value of every compile-time argument.
        width: D, whose divisibility by 16 the compiler may use.
        dtype: Of states and rows.
        architecture: 80, 90 or 100.
    """
    signature = {
        name: "constexpr" if name in constants else _type_of(name, dtype)
        for name in kernel.arg_names
    }
    divisible = [
        (index,)
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name == "width" and width % 16 == 0)
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in divisible},
    )
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled, machine_code = _assemble(ptx, architecture)
    kind = next((name for name in _MATRIX_INSTRUCTIONS if name in ptx), "")
    turn = loop_code(ptx)
    products = scalar_products(turn, tile.num_warps)
    if kind:
        products = matrix_products(turn, ptx, tile.num_warps)
    return Build(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instruction=kind,
        multiply_adds=products[0],
        num_products=products[1],
        bytes_read=bytes_read(turn, tile.num_warps),
        ptxas=_ptxas_version(architecture),
        ptx=ptx,
        machine_code=machine_code,
    )


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in _OPERANDS:
        return f"*{_DTYPE_NAMES[dtype]}"
    if name in _POINTERS_TO_FLOAT:
        return "*fp32"
    if name in _POINTERS_TO_INT:
        return _POINTERS_TO_INT[name]
    if name in _NUMBERS_64:
        return "i64"
    return "i32" if name.startswith("num_") or name in _NUMBERS else "*i64"


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _ptxas(architecture: int) -> str:
    return _tool("ptxas-blackwell" if architecture >= 100 else "ptxas")


@cache
def _ptxas_version(architecture: int) -> str:
    run = subprocess.run(
        [_ptxas(architecture), "--version"], capture_output=True, text=True, check=True
    )
    match = re.search(r"release ([\d.]+)", run.stdout)
    return match.group(1) if match else "unknown"


def _assemble(ptx: str, architecture: int) -> tuple[int, int, bytes]:
    """Registers of a thread, bytes it spills, and the machine code."""
    match = re.search(r"\.target (sm_\w+)", ptx)
    assert match, "PTX without a target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_ptxas(architecture), "-v", f"--gpu-name={match.group(1)}", str(path)]
        command += ["-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        machine_code = path.with_suffix(".cubin").read_bytes()
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores", report)
    assert registers and spills, f"ptxas says nothing of registers: {report}"
    return int(registers.group(1)), int(spills.group(1)), machine_code


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel in one of its forms.

    Attributes:
        name: Its name and form.
        kernel: The kernel.
        tiles: Its name in the table of tiles; "" for a kernel that has no entry there.
        constants: Values of compile-time arguments that no tile gives.
    """

    name: str
    kernel: triton.JITFunction
    tiles: str
    constants: Constants

    @property
    def has_product(self) -> bool:
        """Whether the kernel multiplies matrices."""
        return "PRECISION" in self.kernel.arg_names

    def form(
        self, width: int, dtype: torch.dtype, architecture: int, precision: str = "ieee"
    ) -> tuple[Tile, Constants]:
        """The shipped tile and the compile-time arguments; widths with the same share their code.

        Two widths do not, if 16 divides only one of them.
        """
        tile = Tile(16, 64, 64, 64, 4, 2)
        if self.tiles:
            tile = tile_for(self.tiles, width, dtype, architecture)
        values = {
            "POSITIONS": tile.positions,
            "ITEMS": tile.items,
            "WIDTH": tile.width,
            "OUT": tile.out,
            "HOLD": tile.width >= width,
            "ALIGN": alignment(width),
            "PRECISION": precision,
            **self.constants,
        }
        return tile, {name: v for name, v in values.items() if name in self.kernel.arg_names}

    def least(
        self, width: int, dtype: torch.dtype, architecture: int, precision: str = "ieee"
    ) -> LeastWork:
        """Lower bound on the work of one iteration of its loops."""
        constants = self.form(width, dtype, architecture, precision)[1]
        return least_work(self.name, constants, dtype.itemsize)

    def build(
        self, *, width: int, dtype: torch.dtype, architecture: int, precision: str = "ieee"
    ) -> tuple[Tile, Build]:
        """The shipped tile, and what the kernel uses with it."""
        tile, constants = self.form(width, dtype, architecture, precision)
        made = build(
            self.kernel, tile, constants, width=width, dtype=dtype, architecture=architecture
        )
        return tile, made


def shipped_cases() -> list[Case]:
    """Every kernel of the package, each in the forms that the losses use."""
    full = [
        Case(name, getattr(gpu_full, f"{name}_kernel"), name, {"scale": None})
        for name in ("full_forward", "full_states_backward", "full_rows_backward")
    ]
    forms = {"": (False, False), "_offsets": (True, False), "_rounds": (False, True)}
    none = dict.fromkeys(("scale", "covers", "block_rounds"))
    listed = [
        Case(
            name + form,
            getattr(gpu_listed, f"{name}_kernel"),
            f"{name}_rounds" if rounds else name,
            {"OFFSETS": offsets, "ROUNDS": rounds, "BY_ROW": rounds, **none},
        )
        for name in ("listed_forward", "listed_states_backward", "listed_rows_backward")
        for form, (offsets, rounds) in forms.items()
    ]
    gathered = [
        Case(name + form, getattr(gpu_gathered, f"{name}_kernel"), name, {"OFFSETS": offsets})
        for name in ("gathered_forward", "gathered_states_backward")
        for form, offsets in (("", False), ("_offsets", True))
    ]
    return [
        *full,
        *listed,
        *gathered,
        Case(
            "gathered_rows_backward",
            gpu_gathered.gathered_rows_backward_kernel,
            "gathered_rows_backward",
            {},
        ),
        Case("group_maxima", select_gpu.group_maxima_kernel, "group_maxima", {}),
        Case(
            "best_sign_direction", select_gpu.best_sign_direction_kernel, "best_sign_direction", {}
        ),
        Case("mixed_signs", negatives_gpu.mixed_signs_kernel, "mixed_signs", {}),
        Case(
            "score_groups",
            select_gpu.score_groups_kernel,
            "",
            {"ITEMS": select_gpu.CANDIDATES},
        ),
        Case("add_rows", gpu_add_rows.add_rows_kernel, "", {"LINES": 32, "scale": None}),
        Case("target_logits", gpu_targets.target_logits_kernel, "", {"LINES": 16}),
        Case(
            "target_states_backward", gpu_targets.target_states_backward_kernel, "", {"LINES": 16}
        ),
        Case(
            "pair_tiles",
            gpu_tables.pair_tiles_kernel,
            "",
            {
                "TILE": 64,
                "COLUMNS": 64,
                **dict.fromkeys(("item_starts", "item_ends", "block_rounds")),
            },
        ),
        Case(
            "row_tiles",
            gpu_tables.row_tiles_kernel,
            "",
            {"TILE": 64, "COLUMNS": 64, "cover_starts": None},
        ),
        Case("chunks", gpu_hash.chunks_kernel, "", {"VECTORS": 256}),
        Case("draw_below", negatives_gpu.draw_below_kernel, "", {"CALLS": 256}),
        Case("random_signs", negatives_gpu.random_signs_kernel, "", {"LINES": 16}),
    ]
