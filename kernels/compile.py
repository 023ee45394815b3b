"""Compiles the Triton kernels for a GPU that need not be there, and counts what they use."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardrec.kernels.block_logsumexp import gpu_full, gpu_gathered, gpu_listed
from shardrec.kernels.device import alignment
from shardrec.kernels.negatives import gpu as negatives_gpu
from shardrec.kernels.select import gpu as select_gpu
from shardrec.kernels.tiles import Tile, tile_for

__all__ = ["ARCHITECTURES", "MAX_SHARED_BYTES", "Build", "Case", "build", "shipped_cases"]

ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may use, by architecture.
MAX_SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448, 100: 232448}

_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS_TO_FLOAT = (
    "partials logsumexp grad_logsumexp scale grad_states grad_rows grad_entries offsets source "
    "weights total maxima scores signs shares"
).split()
_POINTERS_TO_INT = "position_chunks item_chunks".split()
_OPERANDS = ("states", "rows", "queries", "vectors")
_NUMBERS_64 = "first_entry first_row first_line seed step stream bound".split()


@dataclass(frozen=True, slots=True)
class Build:
    """What one kernel uses on one architecture.

    Attributes:
        registers: Of a thread.
        spilled_bytes: Stores to local memory, of a thread, as ptxas counts them.
        shared_bytes: Of a program.
        matrix_instruction: The widest kind present, "" where there is none.
        num_matrix_instructions: In the PTX.
        multiply_adds: Of a program's matrix instructions, each counted once; 0 where the PTX does
            not name their shape (tcgen05).
        ptxas: Version of the assembler.
        ptx: The code itself.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str
    num_matrix_instructions: int
    multiply_adds: int
    ptxas: str
    ptx: str


def build(
    kernel: triton.JITFunction,
    tile: Tile,
    constants: dict[str, int | bool | str],
    *,
    width: int,
    dtype: torch.dtype,
    architecture: int,
) -> Build:
    """The kernel compiled and assembled for one architecture.

    Args:
        kernel: A kernel whose arguments are named as everywhere here, which gives their types.
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
    registers, spilled = _assemble(ptx, architecture)
    counts = {name: ptx.count(name) for name in _MATRIX_INSTRUCTIONS}
    kind = next((name for name in _MATRIX_INSTRUCTIONS if counts[name]), "")
    return Build(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instruction=kind,
        num_matrix_instructions=counts.get(kind, 0),
        multiply_adds=_multiply_adds(ptx, tile.num_warps),
        ptxas=_ptxas_version(architecture),
        ptx=ptx,
    )


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in _OPERANDS:
        return f"*{_DTYPE_NAMES[dtype]}"
    if name in _POINTERS_TO_FLOAT:
        return "*fp32"
    if name in _POINTERS_TO_INT:
        return "*i32"
    if name in _NUMBERS_64:
        return "i64"
    return "i32" if name.startswith("num_") or name in ("width", "reach") else "*i64"


def _multiply_adds(ptx: str, num_warps: int) -> int:
    """Of the matrix instructions of a program, each counted once for all warps that run it."""
    total = 0
    for name, m, n, k in re.findall(r"(wgmma|mma)\.\S*?\.m(\d+)n(\d+)k(\d+)\.", ptx):
        groups = num_warps // 4 if name == "wgmma" else num_warps
        total += int(m) * int(n) * int(k) * groups
    return total


def _ptxas(architecture: int) -> str:
    name = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(folder / name)


def _ptxas_version(architecture: int) -> str:
    run = subprocess.run(
        [_ptxas(architecture), "--version"], capture_output=True, text=True, check=True
    )
    match = re.search(r"release ([\d.]+)", run.stdout)
    return match.group(1) if match else "unknown"


def _assemble(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers of a thread and bytes it spills."""
    match = re.search(r"\.target (sm_\w+)", ptx)
    assert match, "PTX without a target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_ptxas(architecture), "-v", f"--gpu-name={match.group(1)}", str(path)]
        command += ["-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores", report)
    assert registers and spills, f"ptxas says nothing of registers: {report}"
    return int(registers.group(1)), int(spills.group(1))


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
    constants: dict[str, int | bool | str]

    @property
    def has_product(self) -> bool:
        """Whether the kernel multiplies matrices."""
        return "PRECISION" in self.kernel.arg_names

    def least_multiply_adds(self, tile: Tile) -> int:
        """Multiply-adds of one turn of the innermost loop; 0 without a product."""
        if not self.has_product:
            return 0
        if self.name == "mixed_signs":
            return tile.positions * 128 * tile.width
        out = tile.out if "OUT" in self.kernel.arg_names else 0
        return tile.positions * tile.items * (tile.width + out)

    def build(
        self, *, width: int, dtype: torch.dtype, architecture: int, precision: str = "ieee"
    ) -> tuple[Tile, Build]:
        """The shipped tile, and what the kernel uses with it."""
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
        constants = {name: v for name, v in values.items() if name in self.kernel.arg_names}
        made = build(
            self.kernel, tile, constants, width=width, dtype=dtype, architecture=architecture
        )
        return tile, made


def shipped_cases() -> list[Case]:
    """Every kernel of the package, each in the forms that the losses use."""
    full = [
        Case(name, getattr(gpu_full, f"{name}_kernel"), name, {})
        for name in ("full_forward", "full_states_backward", "full_rows_backward")
    ]
    forms = {"": (False, False), "_offsets": (True, False), "_rounds": (False, True)}
    listed = [
        Case(
            name + form,
            getattr(gpu_listed, f"{name}_kernel"),
            f"{name}_rounds" if rounds else name,
            {"OFFSETS": offsets, "ROUNDS": rounds},
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
        Case("add_rows", gpu_listed.add_rows_kernel, "", {"LINES": 32}),
        Case("draw_below", negatives_gpu.draw_below_kernel, "", {"CALLS": 256}),
        Case("random_signs", negatives_gpu.random_signs_kernel, "", {"LINES": 16}),
    ]
