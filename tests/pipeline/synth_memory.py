"""Peak memory of ``generate`` in a process of its own; prints the bytes added to what it held.

Run with a file to write and the number of events. Blocks are small, so that few events are many.
"""

import sys
from pathlib import Path

from shardrec.pipeline.log import generator
from shardrec.pipeline.synth import SynthConfig, generate

BLOCK_EVENTS = 1 << 16


def status_bytes(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def write(path: str, events: int) -> None:
    config = SynthConfig(
        users=5_000,
        items=2_000,
        events=events,
        chunk_events=BLOCK_EVENTS,
        report_users=500,
        markov_events=100_000,
    )
    generate(config, path, force=True)


if __name__ == "__main__":
    generator.EVENTS_PER_BLOCK = BLOCK_EVENTS
    write(sys.argv[1], 20_000)  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    write(sys.argv[1], int(sys.argv[2]))
    print(status_bytes("VmHWM") - before)
