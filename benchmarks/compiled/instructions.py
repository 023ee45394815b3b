"""Count loops, matrix instructions, products and reads in the code of a compiled kernel.

The compiler's own comments say which blocks of PTX are in a loop. They also separate the loop from
an unrolled copy of it, and from a first iteration that was moved out so that loads run ahead.
"""

import re

__all__ = ["bytes_read", "loop_code", "main_loop", "matrix_products", "scalar_products"]

_BLOCK = re.compile(r"^(?:\$L__BB\w+:|// %bb\.\d+:)", re.MULTILINE)
_WARP_PRODUCT = re.compile(r"\b(wgmma|mma)\.\S*?\.m(\d+)n(\d+)k(\d+)\.")
_DESCRIBED_PRODUCT = re.compile(
    r"tcgen05\.mma\.cta_group::1\.kind::(\w+) \[[^\]]*\], (?:%\w+|\[[^\]]*\]), %\w+, (%r\d+)"
)
# Depth of one matrix instruction of the fifth generation, by kind of operands.
_DEPTHS = {"f16": 16, "tf32": 8}
_READ = re.compile(r"\bld\.global(?:\.L\S+?|\.nc)*(?:\.v(\d))?\.b(\d+)\b")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)$")


def loop_code(ptx: str) -> str:
    """The blocks of code that are in a loop; all of the code if there is none."""
    starts = [match.start() for match in _BLOCK.finditer(ptx)] + [len(ptx)]
    blocks = [ptx[first:end] for first, end in zip(starts, starts[1:], strict=False)]
    inside = [block for block in blocks if "Depth=" in block]
    return "".join(inside) if inside else ptx


def matrix_products(code: str, ptx: str, num_warps: int) -> tuple[int, int]:
    """Multiply-adds of the matrix instructions of a program, and instructions of one warp.

    The instructions of the fifth generation name no shape: it is in a descriptor, whose bits 17 to
    22 are an eighth of the columns and bits 24 to 28 a sixteenth of the lines.

    Args:
        code: PTX in which instructions are counted.
        ptx: The whole code, which holds the descriptors.
        num_warps: Warps of the program.
    """
    total = count = 0
    for name, m, n, k in _WARP_PRODUCT.findall(code):
        groups = num_warps // 4 if name == "wgmma" else num_warps
        total += int(m) * int(n) * int(k) * groups
        count += 1
    for kind, register in _DESCRIBED_PRODUCT.findall(code):
        described = re.search(rf"mov\.b32\s+{register}, (\d+);", ptx)
        assert described, f"no descriptor in {register}"
        bits = int(described.group(1))
        total += (bits >> 24 & 31) * 16 * (bits >> 17 & 63) * 8 * _DEPTHS[kind]
        count += 1
    return total, count


def scalar_products(code: str, num_warps: int) -> tuple[int, int]:
    """Multiply-adds of IEEE float32 of a program, and instructions of one thread.

    Those of exponentials flush small numbers to zero and are left out.
    """
    single, double = len(re.findall(r"fma\.rn\.f32\s", code)), code.count("fma.rn.f32x2")
    return (single + 2 * double) * 32 * num_warps, single + double


def bytes_read(code: str, num_warps: int) -> int:
    """Bytes that all threads of a program read from global memory, repeated reads included."""
    total = sum(int(many or 1) * int(bits) // 8 for many, bits in _READ.findall(code))
    total += sum(int(size, 0) for size in _COPY.findall(code))
    return total * 32 * num_warps


def main_loop(assembly: str) -> int:
    """Machine instructions from the head of the longest loop to its end, 0 where there is none.

    Code behind the exit is left out: waits that a loop jumps to when a barrier is not ready.
    """
    lines = [(int(address, 16), text) for address, text in _LINE.findall(assembly)]
    exits = [address for address, text in lines if text == "EXIT"]
    longest = (0, 0)
    for address, text in lines:
        branch = _BRANCH.search(text)
        if branch and int(branch.group(1), 16) < address < max(exits, default=0):
            longest = max(longest, (address - int(branch.group(1), 16), address))
    length, end = longest
    return sum(1 for address, _ in lines if end - length <= address <= end) if length else 0
