"""A verdict on one GPU in minutes: are the kernels right, how fast are they, what bounds them.

Needs this repository, torch and Triton, and nothing else. Results are lines of JSON, the most
telling first, in ``$OUT/verdict_gpu.jsonl`` while it runs: a failure is a line, and so is what the
budget leaves out. The order: rates of the card; each loss at a middle size, with the kernels' own
time, launches and waits; every kernel against its definition; the large sizes beside their limits;
dtypes, autocast and other projects; small widths and the largest catalog.

    make verdict-gpu ARGS="--seconds 440"
    TRITON_INTERPRET=1 python benchmarks/verdict_gpu.py --toy        # tiny, without a GPU
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_limits import Rates
from verdict.checks import LOSSES, check_all, run
from verdict.lines import Lines
from verdict.speed import Size, Step, contests, measure_rates, measured

COLUMNS = (
    *("loss", "by", "N", "D", "V", "dtype", "ms", "limit_ms", "kernels_ms", "launches"),
    *("waits", "peak_mib"),
)
CHECK_S = 150.0  # of the budget, at most
RESERVED_S = 200.0  # that the checks leave for what comes after them
MIDDLE = Size(16_384, 128, 100_000)
TOY = Size(16, 16, 40, "float32")


class Verdict:
    """The stages, on a device, which write their findings to lines."""

    def __init__(self, lines: Lines, device: str) -> None:
        """Stores both; no rates are known yet."""
        self.lines, self.device = lines, device
        self.rates: Rates | None = None

    def machine(self) -> None:
        """Versions, the card, and its rates."""
        import triton

        self.lines.say(
            "begin",
            python=platform.python_version(),
            torch=torch.__version__,
            triton=triton.__version__,
            card=torch.cuda.get_device_name() if self.device == "cuda" else "none",
        )
        if self.device == "cuda":
            self.lines.attempt("rates", {}, self._rates)

    def speed(
        self,
        losses: Iterable[str],
        size: Size,
        *,
        most_s: float,
        needs: float,
        others: bool = False,
    ) -> None:
        """A line for each loss, and for each other way to compute it if asked for."""
        for loss in losses:
            facts = _facts(loss, "ours", size)
            if self.lines.left < needs:
                self.lines.say("left_out", what="speed", **facts)
                continue
            try:
                runs = contests(loss, size, self.device)
            except Exception as error:  # such as a table that does not fit
                self.lines.say("speed_failed", **facts, error=str(error)[:400])
                continue
            chosen = runs if others else {"ours": runs["ours"]}
            for name, step in chosen.items():
                self._time(_facts(loss, name, size), step, size, most_s)
            del runs, chosen
            self._free()

    def autocast(self, size: Size, most_s: float) -> None:
        """The full softmax of float32 states and rows under autocast, as training runs it."""
        batch = size.make(self.device)

        def step() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                run("cce", batch, "auto" if self.device == "cuda" else "triton")

        self._time(_facts("cce", "ours, autocast", size), step, size, most_s)
        self._free()

    def table(self) -> str:
        """The lines of speed so far."""
        rows = [row for row in self.lines.rows if row["kind"] == "speed"]
        cells = [COLUMNS, *([str(row.get(name, "")) for name in COLUMNS] for row in rows)]
        return "\n".join(" ".join(f"{cell:>12}" for cell in line) for line in cells)

    def _rates(self) -> dict[str, Any]:
        self.rates = measure_rates(self.device)
        return {"tflops": round(self.rates.tflops), "tbps": round(self.rates.tbps, 2)}

    def _time(self, facts: dict[str, Any], step: Step, size: Size, most_s: float) -> None:
        found = partial(measured, step, self.device, most_s)
        limit = size.limit_ms(facts["loss"], self.rates)
        self.lines.attempt("speed", facts | limit, found)

    def _free(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _facts(loss: str, by: str, size: Size) -> dict[str, Any]:
    return {"loss": loss, "by": by, "N": size.N, "D": size.D, "V": size.V, "dtype": size.dtype}


def on_gpu(verdict: Verdict) -> None:
    """All stages, the most telling first."""
    lines = verdict.lines
    verdict.speed(LOSSES, MIDDLE, most_s=2, needs=30)
    print(verdict.table(), flush=True)
    seconds = max(20.0, min(CHECK_S, lines.left - RESERVED_S))

    def checked() -> dict[str, Any]:
        check_all(lines, "cuda", seconds, toy=False)
        return {}

    lines.attempt("checking", {}, checked)
    for catalog in (100_000, 1_000_000):
        verdict.speed(LOSSES, Size(131_072, 256, catalog), most_s=4, needs=60)
        print(verdict.table(), flush=True)
    exact = Size(16_384, 128, 100_000, "float32")
    verdict.speed(("cce",), exact, most_s=2, needs=50)
    if lines.left > 50:
        verdict.autocast(exact, 2)
    verdict.speed(("cce",), MIDDLE, most_s=2, needs=45, others=True)
    narrow = Size(32_768, 64, 1_000_000)
    verdict.speed(("cce", "cce_minus", "sce"), narrow, most_s=3, needs=40)
    largest = Size(131_072, 256, 10_000_000)
    verdict.speed(("cce_minus", "sce", "rece"), largest, most_s=4, needs=40)
    verdict.speed(("cce",), largest, most_s=10, needs=90)


def in_interpreter(verdict: Verdict) -> None:
    """Every stage once, at a size that says nothing about speed."""
    check_all(verdict.lines, "cpu", 600, toy=True)
    verdict.speed(LOSSES, TOY, most_s=0, needs=0, others=True)
    verdict.autocast(TOY, 0)


def bad_rows(lines: Lines) -> list[dict[str, Any]]:
    """The checks that were not right, and whatever failed."""
    return [row for row in lines.rows if row["kind"] == "check" or row["kind"].endswith("_failed")]


def main() -> int:
    """Runs the stages; 0 if every check that ran was right and nothing failed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=440.0, help="of the whole verdict")
    parser.add_argument("--toy", action="store_true", help="tiny sizes in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "verdict")))
    options = parser.parse_args()
    lines = Lines(options.out / "verdict_gpu.jsonl", options.seconds)
    verdict = Verdict(lines, "cpu" if options.toy else "cuda")
    verdict.machine()
    in_interpreter(verdict) if options.toy else on_gpu(verdict)
    bad = bad_rows(lines)
    print(verdict.table(), flush=True)
    lines.say("end", bad=len(bad), left_s=round(lines.left))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
