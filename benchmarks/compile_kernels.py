"""What every shipped form of every Triton kernel uses, built for GPUs that need not be there.

Writes a table of registers, spilled bytes, shared memory and matrix instructions, and fails where a
form spills in bfloat16, wants more shared memory than the GPU has, or lacks matrix instructions.
"""

import argparse
import sys
from pathlib import Path

import torch
import triton

from shardrec.kernels.compile import ARCHITECTURES, MAX_SHARED_BYTES, Build, Case, shipped_cases
from shardrec.kernels.tiles import Tile

RESULTS = Path(__file__).parent / "results" / "compiled_kernels.md"
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
HEAD = """# Compiled kernels

Triton {triton}; ptxas {ptxas}. No figure here is a time.
Tile: positions x items x width x out, warps, stages. `products`: multiply-adds of the matrix
instructions in the code over those of one tile; 1 is the least, more is an unrolled or peeled loop.
Float32 in IEEE precision has no matrix instruction. Where float32 spills, ptxas keeps to 128
registers a thread, so that two programs share a processor.

"""
COLUMNS = "kernel D dtype GPU tile registers spilled shared_bytes of instruction products".split()


def main() -> int:
    """Builds what is asked for; 1 where a form does not hold."""
    arguments = parsed()
    lines, wrong, versions = [], [], {}
    for name in arguments.dtypes:
        dtype, precision = PRECISIONS[name]
        for case in shipped_cases():
            for width in arguments.widths:
                for architecture in arguments.architectures:
                    tile, build = case.build(
                        width=width, dtype=dtype, architecture=architecture, precision=precision
                    )
                    versions[architecture] = build.ptxas
                    lines.append(line_of(case, width, name, architecture, tile, build))
                    wrong += faults(case, name, architecture, lines[-1], build)
                    print(lines[-1], flush=True)
    ptxas = ", ".join(f"{version} for sm_{number}" for number, version in versions.items())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(triton=triton.__version__, ptxas=ptxas)
    rule = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    arguments.output.write_text(head + "\n".join(rule + lines) + "\n")
    print("\n".join(wrong) if wrong else f"{len(lines)} forms hold")
    return 1 if wrong else 0


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--dtypes", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def line_of(case: Case, width: int, dtype: str, architecture: int, tile: Tile, build: Build) -> str:
    """One line of the table."""
    shape = f"{tile.positions}x{tile.items}x{tile.width}x{tile.out}, {tile.num_warps}, "
    cells = [
        case.name,
        width,
        dtype,
        f"sm_{architecture}",
        shape + str(tile.num_stages) if case.tiles else "",
        build.registers,
        build.spilled_bytes,
        build.shared_bytes,
        MAX_SHARED_BYTES[architecture],
        build.matrix_instruction,
        products_of(case, tile, build),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def products_of(case: Case, tile: Tile, build: Build) -> str:
    """Multiply-adds in the code over those of one tile."""
    least = case.least_multiply_adds(tile)
    if not build.matrix_instruction:
        return ""
    return f"{build.multiply_adds / least:.2f}" if build.multiply_adds else "not in the PTX"


def faults(case: Case, dtype: str, architecture: int, line: str, build: Build) -> list[str]:
    """What a form breaks, one line each."""
    found = []
    if build.spilled_bytes and dtype == "bf16":
        found.append(f"spills: {line}")
    if build.shared_bytes > MAX_SHARED_BYTES[architecture]:
        found.append(f"too much shared memory: {line}")
    if case.has_product and dtype != "fp32" and not build.matrix_instruction:
        found.append(f"no matrix instruction: {line}")
    return found


if __name__ == "__main__":
    sys.exit(main())
