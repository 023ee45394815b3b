"""Time that twenty kills cost a run, after checking that nothing is lost.

Runs the test that `make test-slow` runs: one training on two workers, a worker of which is killed
twenty times at random moments, must end bit-equal to an undisturbed one. A row is appended when
that holds. The seconds to the next step depend on what else the machine does: see ``load`` in the
row, and leave the machine alone where they matter.

    python benchmarks/kills.py
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
    parser.add_argument("--repeat", type=int, default=1, help="number of the run: another, a row")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.jsonl")
    options = parser.parse_args()
    results, key = Results(options.output), {"workers": 2, "repeat": options.repeat}
    if results.has(key):
        return
    command = [sys.executable, "-P", *TEST]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(BEGINNING))
    results.append(key, **json.loads(line), note=options.note)


if __name__ == "__main__":
    main()
