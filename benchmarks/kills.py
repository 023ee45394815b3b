"""Time that kills cost a run, after checking that nothing is lost.

Runs the test that `make test-slow` runs: one training on two workers, of which a worker, torchrun,
the launcher or all of them are killed at random moments, must end bit-equal to an undisturbed one.
A row is appended when that holds. The seconds to the next step depend on what else the machine
does: see ``load`` in the row, and leave the machine alone where they matter.

    for repeat in 1 2 3 4; do python benchmarks/kills.py --kills 25 --repeat $repeat; done
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results

ROOT = Path(__file__).resolve().parent.parent
TEST = ["-m", "pytest", "-q", "-s", "-m", "soak", "tests/launch/test_elastic.py"]
BEGINNING = '{"kills": '


def main() -> None:
    """Run the test and append its row, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=1, help="seed of the moments: another, a row")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.jsonl")
    options = parser.parse_args()
    key = {"workers": 2, "kills": options.kills, "repeat": options.repeat}
    results = Results(options.output)
    if results.has(key):
        return
    chosen = ["--kills", str(options.kills), "--kills-seed", str(options.repeat)]
    command = [sys.executable, "-P", *TEST, *chosen]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(BEGINNING))
    results.append(key, **json.loads(line), note=options.note)


if __name__ == "__main__":
    main()
