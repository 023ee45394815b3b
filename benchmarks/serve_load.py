"""How many requests does the example service answer, how quickly, in how much memory?

Generates a log, trains one step, exports, starts ``examples/serve_fastapi.py`` under uvicorn on
loopback and asks it for a minute from one connection and from eight, one history a request. Client
and service share the machine's cores, so leave it alone meanwhile. Two rows, in three minutes:

    python benchmarks/serve_load.py
"""

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from record import RESULTS, Results

from shardrec.pipeline.config import override
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.recipes import demo
from shardrec.pipeline.synth import SynthConfig, generate
from shardrec.pipeline.train import train

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAINED = ("limits.max_steps=1", "validation.every_epochs=none", "show_progress=false")


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=42_000)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_cpu.jsonl")
    options = parser.parse_args()
    results = Results(options.output)
    with tempfile.TemporaryDirectory() as folder:
        model = make_export(Path(folder), options.items)
        for connections in options.connections:
            key = {"items": options.items, "width": 64, "connections": connections}
            key["seconds"] = options.seconds
            if not results.has(key):
                results.append(key, **measure(model, connections, options.seconds))


def make_export(folder: Path, items: int) -> Path:
    """An export of this many items."""
    size = SynthConfig(users=5_000, items=items, events=150_000, report_users=100)
    generate(size, folder / "log.parquet")
    data, run, model = (str(folder / name) for name in ("data", "run", "model"))
    prepare(PrepareConfig(events=str(folder / "log.parquet"), output=data))
    train(override(demo(data, run), TRAINED))
    export(ExportConfig(run=run, prepared=data, output=model))
    return Path(model)


def measure(model: Path, connections: int, seconds: float) -> dict[str, Any]:
    """Requests per second, latencies in milliseconds, and the service's peak memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", str(port), "--log-level"]
    service = subprocess.Popen(
        [sys.executable, *words, "warning", "serve_fastapi:app"],
        env=os.environ | {"SHARDREC_PUBLISHED": str(model)},
    )
    try:
        ids = wait_for_ids(port, service)
        times: list[list[float]] = [[] for _ in range(connections)]
        end = time.monotonic() + seconds
        clients = [
            threading.Thread(target=ask, args=(port, ids, end, times[number], number))
            for number in range(connections)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        status = Path(f"/proc/{service.pid}/status").read_text().splitlines()
    finally:
        service.terminate()
        service.wait()
    taken = sorted(one for part in times for one in part)
    cuts = statistics.quantiles(taken, n=100)
    (peak,) = (line for line in status if line.startswith("VmHWM"))
    return {
        "requests": len(taken),
        "requests_per_s": round(len(taken) / seconds, 1),
        "p50_ms": round(1000 * cuts[49], 2),
        "p99_ms": round(1000 * cuts[98], 2),
        "peak_rss_mb": int(peak.split()[1]) // 1024,
    }


def wait_for_ids(port: int, service: subprocess.Popen[bytes]) -> int:
    """The number of items, once the service answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and service.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/version")
            return int(json.loads(connection.getresponse().read())["num_items"])
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the service did not start")


def ask(port: int, items: int, end: float, times: list[float], seed: int) -> None:
    """Ask for the lists of random histories until the end; seconds of each answer."""
    generator, connection = random.Random(seed), http.client.HTTPConnection("127.0.0.1", port)
    while time.monotonic() < end:
        history = [generator.randrange(items) for _ in range(generator.randint(1, 50))]
        body = json.dumps({"histories": [history], "k": 10})
        started = time.monotonic()
        connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:200]!r}")
        times.append(time.monotonic() - started)


if __name__ == "__main__":
    main()
