"""Compile every Triton kernel for several GPUs, without one, and report what it uses.

Writes a table of registers, spilled bytes, shared memory, matrix instructions and instructions of
the main loop, a line as soon as its form is built, and fails where a form spills in bfloat16, wants
more shared memory than the GPU has, or lacks matrix instructions. Started again it finds compiled
kernels in Triton's cache. Widths that share all of their code share a line.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from compiled.builds import ARCHITECTURES, MAX_SHARED_BYTES, Build, Case, shipped_cases
from compiled.least_work import LeastWork

from shardrec.kernels.device.tiles import Tile

RESULTS = Path(__file__).parent / "results" / "compiled_kernels.md"
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "ieee"),
}
HEAD = """# Compiled kernels

Triton {triton}; {ptxas}. No figure here is a time; nothing ran on a GPU.

- D: widths that share the code. Tile: positions x items x width x out, warps, stages; empty for
  kernels that have no entry in the table of tiles.
- `spilled`: bytes of a thread that ptxas stores to local memory. `of`: the most shared memory that
  a program may have on that GPU.
- `work`: what one turn of the loops does over the least that its tile needs, counted in the PTX:
  multiply-adds (of matrix instructions, of IEEE float32 in fp32), and for kernels without a matrix
  product the bytes asked of global memory, where several lanes that ask for one index count each.
  Products above 1 on sm_100: the first turn of the loop over the width stands in the loop around
  it once more. The 1.50 of `full_rows_backward` on sm_90: both groups of four warps compute all
  logits of a 64 x 64 tile; tiles of 128 rows do not, and spill 12 to 52 bytes.
- `loop`: machine instructions of the longest loop, as ptxas left them, of a thread. An inner loop
  stands in it once.
- `least`: products, one exponential for each logit, and 16 bytes a read, in instructions of a
  thread; not in it are addresses, masks, the running maximum and sum, and conversions.
- `draw_below` and `random_signs` have no loop, product or read to be counted.
{spills}
"""
COLUMNS = (
    "kernel D dtype GPU tile registers spilled shared_bytes of instruction work loop least over"
).split()


@dataclass(frozen=True, slots=True)
class Order:
    """A build for one process: a case, dtype and GPU, with the widths that share its code."""

    case: int
    widths: tuple[int, ...]
    dtype: str
    architecture: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table, what is wrong with it, and which assembler said so."""

    cells: tuple[str, ...]
    wrong: tuple[str, ...]
    ptxas: str

    def __str__(self) -> str:
        """The line of the table."""
        return "| " + " | ".join(self.cells) + " |"


def main() -> int:
    """Build the requested forms; 1 if one breaks a limit."""
    arguments = parsed()
    orders = list(ordered(arguments))
    lines = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for line in built(orders, arguments.jobs):
        lines.append(line)
        print(f"{len(lines)} of {len(orders)}: {line}", flush=True)
        arguments.output.write_text(table(lines))
    wrong = [f"{fault}: {line}" for line in lines for fault in line.wrong]
    print("\n".join(wrong) if wrong else f"{len(lines)} forms hold")
    return 1 if wrong else 0


def parsed() -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--dtypes", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--kernels", nargs="+", help="names as in the table; default all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that build")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def ordered(arguments: argparse.Namespace) -> Iterator[Order]:
    """The builds to make, in the order of the table."""
    for dtype in arguments.dtypes:
        for index, case in enumerate(shipped_cases()):
            if arguments.kernels and case.name not in arguments.kernels:
                continue
            for architecture in arguments.architectures:
                alike: dict[object, list[int]] = {}
                for width in arguments.widths:
                    tile, constants = case.form(width, PRECISIONS[dtype][0], architecture)
                    key = (tile.num_warps, tile.num_stages, *constants.items(), width % 16)
                    alike.setdefault(key, []).append(width)
                for widths in alike.values():
                    yield Order(index, tuple(widths), dtype, architecture)


def built(orders: Iterable[Order], jobs: int) -> Iterator[Line]:
    """The finished lines, in the order of ``orders``."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(line_of, orders)


def line_of(order: Order) -> Line:
    """Builds one form."""
    case = shipped_cases()[order.case]
    dtype, precision = PRECISIONS[order.dtype]
    width, architecture = order.widths[0], order.architecture
    tile, build = case.build(
        width=width, dtype=dtype, architecture=architecture, precision=precision
    )
    least = case.least(width, dtype, architecture, precision)
    shape = f"{tile.positions}x{tile.items}x{tile.width}x{tile.out}, {tile.num_warps}, "
    cells = (
        case.name,
        " ".join(str(width) for width in order.widths),
        order.dtype,
        f"sm_{architecture}",
        shape + str(tile.num_stages) if case.tiles else "",
        build.registers,
        build.spilled_bytes,
        build.shared_bytes,
        MAX_SHARED_BYTES[architecture],
        build.matrix_instruction,
        *work_of(case, tile, build, least),
    )
    wrong = faults(case, order.dtype, architecture, build)
    return Line(
        tuple(str(cell) for cell in cells), tuple(wrong), f"{build.ptxas} sm_{architecture}"
    )


def work_of(case: Case, tile: Tile, build: Build, least: LeastWork) -> tuple[str, ...]:
    """Cells: work over its lower bound; loop instructions, their lower bound, and the ratio."""
    if not least.multiply_adds:
        return "", "", "", ""
    work = build.bytes_read / least.bytes_read
    each = 32.0 * tile.num_warps
    if build.num_products and case.has_product:
        work = build.multiply_adds / least.multiply_adds
        each = build.multiply_adds / build.num_products
    instructions = least.instructions(tile.num_warps, each)
    found = build.loop_instructions
    over = found / instructions
    return f"{work:.2f}", str(found), f"{instructions:.0f}", f"{over:.1f}"


def faults(case: Case, dtype: str, architecture: int, build: Build) -> list[str]:
    """The limits that a form breaks, a few words each."""
    found = []
    if build.spilled_bytes and dtype == "bf16":
        found.append("spills")
    if build.shared_bytes > MAX_SHARED_BYTES[architecture]:
        found.append("too much shared memory")
    if case.has_product and dtype != "fp32" and not build.matrix_instruction:
        found.append("no matrix instruction")
    return found


def table(lines: list[Line]) -> str:
    """The text of the whole file."""
    ptxas: dict[str, list[str]] = {}
    for line in lines:
        version, architecture = line.ptxas.split()
        known = ptxas.setdefault(version, [])
        known += [architecture] if architecture not in known else []
    named = "; ".join(f"ptxas {v} for {', '.join(names)}" for v, names in ptxas.items())
    rule = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    head = HEAD.format(triton=triton.__version__, ptxas=named, spills=spills(lines))
    return head + "\n".join(rule + [str(line) for line in lines]) + "\n"


def spills(lines: list[Line]) -> str:
    """How many forms spill, how much, and with how many registers."""
    wide = [line.cells for line in lines if int(line.cells[COLUMNS.index("spilled")])]
    if not wide:
        return "- No form spills.\n"
    most = max(int(cells[COLUMNS.index("spilled")]) for cells in wide)
    dtypes = " and ".join(sorted({cells[COLUMNS.index("dtype")] for cells in wide}))
    held = " or ".join(sorted({cells[COLUMNS.index("registers")] for cells in wide}, key=int))
    return (
        f"- {len(wide)} of {len(lines)} forms spill, all in {dtypes}, at most {most} bytes. In each"
        f" ptxas\n  stays at {held} registers of the 255 that it may use: of a processor's 65536,"
        " 128 let two\n  programs of 8 warps run side by side and 80 three.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
