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

from shardrec.kernels.tiles import Tile

__all__ = ["ARCHITECTURES", "MAX_SHARED_BYTES", "Build", "build"]

ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may use, by architecture.
MAX_SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448, 100: 232448}

_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS_TO_FLOAT = (
    "partials logsumexp grad_logsumexp scale grad_states grad_rows grad_entries offsets source "
    "weights total maxima scores"
).split()
_POINTERS_TO_INT = "position_chunks item_chunks".split()
_OPERANDS = ("states", "rows", "queries", "vectors")
_NUMBERS_64 = ("first_entry", "seed", "step", "stream", "first_row")


@dataclass(frozen=True, slots=True)
class Build:
    """What one kernel uses on one architecture.

    Attributes:
        registers: Of a thread.
        spilled_bytes: Stores to local memory, of a thread, as ptxas counts them.
        shared_bytes: Of a program.
        matrix_instruction: The widest kind present, "" where there is none.
        num_matrix_instructions: In the PTX.
        ptxas: Version of the assembler.
        ptx: The code itself.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str
    num_matrix_instructions: int
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
