"""Time candidate tiles on this GPU and print entries for the table of tiles.

The shipped table is derived from counted limits; an entry printed here is measured. Each candidate
must give the results of the shipped tile before it is timed. Minutes for each kernel and width.

    python benchmarks/tune_tiles.py --widths 64 256 --dtypes bf16
    TRITON_INTERPRET=1 python benchmarks/tune_tiles.py --toy        # shows that it runs
"""

import argparse
import subprocess
from pathlib import Path

import torch
from compiled.tile_search import Size, search

from shardrec.kernels.device.tiles import KERNELS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    """Search the requested kernels, widths and dtypes."""
    options = parsed()
    device = "cpu" if options.toy else "cuda"
    card = "the interpreter" if options.toy else torch.cuda.get_device_name()
    origin = f"measured: {card}, {commit()}"
    for name in options.dtypes:
        for width in options.widths:
            for kernel in options.kernels:
                size = size_of(options, width, DTYPES[name])
                found = search(kernel, size, device, options.most)
                if found.seconds[0] < found.seconds[1]:
                    print(f"{found.entry(origin)}  ({name})", flush=True)
                else:
                    print(f"# {kernel}, {name}, D={width}: the shipped tile of {found.tried + 1}")


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--positions", type=int, default=32_768)
    parser.add_argument("--catalog", type=int, default=100_000)
    parser.add_argument("--most", type=int, default=60, help="candidates of a kernel")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU's interpreter")
    return parser.parse_args()


def size_of(options: argparse.Namespace, width: int, dtype: torch.dtype) -> Size:
    """The problem size that candidates are timed on."""
    if options.toy:
        return Size(
            positions=40,
            items=70,
            width=min(width, 16),
            dtype=dtype,
            negatives=8,
            queries=9,
            repeats=1,
        )
    return Size(positions=options.positions, items=options.catalog, width=width, dtype=dtype)


def commit() -> str:
    """The short hash of the tree."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
